"""What benchmarks of LoRA experts share: a base that has read an encyclopedia, streams, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cambia.data.tokenizers import BytesTokenizer, build_tokenizer
from cambia.experiment.tree import read_tree
from forgetting.rows import RATE, Settings
from forgetting.runs import FAR, NATIVE, NEAR, pretrained, source

RECURRING = (0, 1, 0, 2, 1)
PREFIX = 64
"""Bytes from which is decided who answers; only what follows them is scored."""


def base_model(
    kind: str, data: Path, folder: Path, *, steps: int, rows: int, shape: Mapping[str, Any] = NATIVE
) -> Path:
    """A model that has read WikiText-2, by default one of a million parameters.

    Args:
        kind: llama or gpt2.
        folder: of its run.
        shape: of a llama.
    """
    model: dict[str, Any] = dict(shape)
    if kind == "gpt2":
        # With Cambia's tokens: 256 bytes and what it marks.
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=264,
            n_positions=256,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=256,
            eos_token_id=256,
        )
        random = folder.with_name(f"{folder.name}-random")
        if not random.exists():
            GPT2LMHeadModel(config).save_pretrained(random)
            build_tokenizer(BytesTokenizer()).save(random)
        model = {"type": "pretrained", "path": str(random)}
    text = source("wikitext", data, plain=False)
    return pretrained(folder, text, model, steps=steps, rows=rows)


def turned(domains: Sequence[str], by: int) -> list[str]:
    """The same, beginning elsewhere: over as many seeds as domains, each stands once at each place."""
    by %= len(domains)
    return [*domains[by:], *domains[:by]]


def domains_of(stream: str, seed: int) -> dict[str, bool]:
    """The domains of a stream in their order, and of each whether the marks of its making are removed."""
    kinds = {"near": NEAR, "near_raw": NEAR, "recurring": FAR[1:], "stationary": ("wikitext",)}
    return dict.fromkeys(turned(kinds.get(stream, FAR), seed), stream == "near")


def experiment(
    stream: str, seed: int | None, data: Path, base: Path, *, steps: int, rows: int, scored_bytes: int
) -> dict[str, Any]:
    """The settings that all methods share on a stream: far, near, near_raw, recurring, gradual, stationary.

    Args:
        seed: which domain comes first; None: each run's own seed says so (not of recurring and gradual ones).
    """
    domains = domains_of(stream, seed or 0)
    layout: dict[str, Any] = {"type": "sequence", "order_by_seed": seed is None}
    if stream == "recurring":
        layout["order"] = [list(domains)[i] for i in RECURRING]
    elif stream == "gradual":
        layout = {"type": "gradual", "overlap": 0.5}
    return {
        "data": {
            "tasks": [{"name": n, "source": source(n, data, plain=plain)} for n, plain in domains.items()],
            "stream": layout,
        },
        "model": {"type": "pretrained", "path": str(base)},
        "training": {"steps": steps, "batch_size": rows, "sequence_length": 128},
        "evaluation": {
            "every_steps": None,
            "max_bytes": scored_bytes,
            "batch_size": 32,
            "context_tokens": PREFIX,
        },
        "checkpoint": {"every_steps": None, "keep_tasks": False},
        "growth": {"enabled": False},
    }


def learner(**method: Any) -> Settings:
    """Experts, as the recipe `learn` has them.

    Args:
        method: other settings of theirs.
    """
    recipe, _ = read_tree("learn")
    return {
        RATE: recipe["optimizer"]["learning_rate"],
        "optimizer.weight_decay": recipe["optimizer"]["weight_decay"],
        "methods": [{**recipe["methods"][0], **method}],
        "growth": {"enabled": True, "rules": recipe["growth"]["rules"]},
        "data.stream.boundaries": False,
    }
