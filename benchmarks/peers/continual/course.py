"""What both sides share: the model, the tasks' rows, the numbers of the methods, and how a model is scored.

It needs torch, transformers and safetensors alone, for Avalanche lives in an environment of its own.
"""

# B batch (rows), T time (tokens of a row), N rows of a task, V vocabulary, J tasks

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 8, 64
RATES = {"adamw": 3e-3, "sgd": 0.05}
BETAS = (0.9, 0.95)
MEMORY, REPLAYED = 200, 2
"""Rows that replay keeps of all tasks, and rows on top of each batch."""
PATTERNS, COMPARED = 96, 16
"""Rows that A-GEM keeps of each task, and rows whose gradient a batch's is held against."""
IGNORED = -100

Matrix = list[list[float]]
"""Row 0 is the untrained model, row i after task i; a column for each task; bits per byte."""


@dataclass(frozen=True)
class Run:
    """One training through all tasks, as either side can do it."""

    method: Literal["naive", "ewc", "replay", "agem"]
    stream: Literal["unlike", "alike", "one_row"]
    """Three tasks of different symbols, or of the same ones; or two, of which the first is one row again and
    again."""
    seed: int
    optimizer: str
    """A key of `RATES`."""
    steps: int
    """On each task."""
    strength: float = 0.0
    """Of EWC, on Cambia's side."""
    ewc_lambda: float = 0.0
    """Of EWC, on Avalanche's side."""
    lent: bool = False
    """Avalanche writes down its Fisher information, and Cambia takes that for its own."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A stream laid down, so that both sides read the same."""

    train: list[Tensor]
    """For each stage (N, T + 1): the windows of all its batches, in order."""
    held_out: list[tuple[Tensor, Tensor, int]]
    """For each task inputs and targets, (N, T) each, -100 where there is none; and their bytes."""

    def save(self, path: Path) -> None:
        tensors = {f"train.{j}": rows for j, rows in enumerate(self.train)}
        for j, (inputs, targets, num_bytes) in enumerate(self.held_out):
            tensors |= {f"inputs.{j}": inputs, f"targets.{j}": targets, f"bytes.{j}": torch.tensor(num_bytes)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    @staticmethod
    def load(path: Path) -> Rows:
        tensors = load_file(path)
        trained, scored = (sum(n.startswith(kind) for n in tensors) for kind in ("train.", "bytes."))
        return Rows(
            [tensors[f"train.{j}"] for j in range(trained)],
            [
                (tensors[f"inputs.{j}"], tensors[f"targets.{j}"], int(tensors[f"bytes.{j}"]))
                for j in range(scored)
            ],
        )


def rows_file(folder: Path, run: Run) -> Path:
    """Where the rows of a run are."""
    return folder / f"{run.stream}-{run.steps}-{run.seed}.safetensors"


def fisher_file(folder: Path, run: Run, task: int) -> Path:
    """What Avalanche holds for the Fisher information after a task."""
    return folder / f"fisher-{run.seed}-{task}.safetensors"


def new_model(seed: int, vocabulary: int) -> LlamaForCausalLM:
    """A stock Llama of 68,000 parameters, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


class Logits(nn.Module):
    """A causal language model as most libraries call models: (B, T) in, (B, T, V) out."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def new_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    """Plain SGD, or AdamW without decay, at a constant rate."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=RATES[name])
    return torch.optim.AdamW(parameters, lr=RATES[name], betas=BETAS, weight_decay=0.0, fused=True)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens of all rows: (B, T, V) and (B, T)."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def scores(model: nn.Module, held_out: Sequence[tuple[Tensor, Tensor, int]]) -> list[float]:
    """Bits per byte of each task's text; the model takes rows of tokens and gives logits."""
    model.eval()
    found = []
    for inputs, targets, num_bytes in held_out:
        nats = 0.0
        for some, wanted in zip(inputs.split(32), targets.split(32), strict=True):
            nats += mean_loss(model(some), wanted).item() * int((wanted != IGNORED).sum())
        found.append(nats / math.log(2) / num_bytes)
    return found
