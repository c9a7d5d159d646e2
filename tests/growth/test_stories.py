"""A model that somebody trained: stories260K grows in every dimension at once and keeps telling its story.

Its weights and its tokenizer are in the format of llama2.c (Andrej Karpathy's "tinyllamas"; MIT).
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from cambia.growth import AddKVHeads, AddLayers, AddTokens, WidenFFN, WidenHeadDim, WidenHidden, grow
from tests.laws.examples import logits, loss_of, relative_error
from tests.laws.fresh import check_read, write

BEGIN = 1  # the token that begins every story
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but it was too high"
)
"""What it says when the likeliest token is always taken, as published beside the weights."""

EVERY_DIMENSION = (
    WidenHidden(to=96),
    AddKVHeads(to=6),  # and 12 query heads, two for each as before
    WidenHeadDim(factor=2),
    WidenFFN(to=256),
    AddLayers(to=8),
    AddTokens(to=576),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    root = os.environ.get("CAMBIA_DATA")
    if not root:
        pytest.skip("CAMBIA_DATA is not set: no trained checkpoint on this machine")
    found = Path(root) / "stories260K"
    if not found.exists():
        pytest.skip(f"there is no {found}: no trained checkpoint on this machine")
    return found


@pytest.fixture
def model(folder: Path, peers: ModuleType) -> LlamaForCausalLM:
    """The weights in a stock Llama."""
    return peers.llama.stories(folder).eval()


@pytest.fixture(scope="module")
def vocabulary(folder: Path, peers: ModuleType) -> Any:
    """The tokenizer."""
    return peers.llama.Pieces(folder / "tok512.bin")


def told(model: LlamaForCausalLM, vocabulary: Any, *, use_cache: bool = True) -> str:
    """As much of its story as is published."""
    begin = torch.tensor([[BEGIN]])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(begin, max_new_tokens=64, use_cache=use_cache, **settings)[0, 1:]
    piece_of = {number: piece for piece, number in vocabulary.number.items()}
    return b"".join(piece_of[i] for i in said.tolist()).decode().lstrip()[: len(STORY)]


@pytest.fixture(scope="module")
def batch(folder: Path, vocabulary: Any) -> Tensor:
    """(4, 96) tokens of stories."""
    text = gzip.decompress((folder / "tinystories_sample.txt.gz").read_bytes()).decode()
    rows = [[BEGIN, *vocabulary(text[start : start + 400])][:96] for start in range(0, 1600, 400)]
    return torch.tensor(rows)


def test_it_is_the_model_that_was_published(model: LlamaForCausalLM, vocabulary: Any, batch: Tensor) -> None:
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert told(model, vocabulary) == STORY
    assert loss_of(model, batch).item() < 2.0


def test_it_grows_in_every_dimension_at_once(
    model: LlamaForCausalLM, vocabulary: Any, batch: Tensor, tmp_path: Path
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(model, optimizer, batch, steps=1)
    before, story = logits(model, batch), told(model, vocabulary)

    event = grow(model, *EVERY_DIMENSION, optimizer=optimizer, check_batch=batch)
    assert event.exactness == "old tokens"
    assert event.logit_error is not None and event.logit_error <= 1e-5
    assert relative_error(logits(model, batch)[..., :512], before) <= 1e-5
    assert told(model, vocabulary) == told(model, vocabulary, use_cache=False) == story
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (96, 256, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 6, 16)
    assert config.num_hidden_layers == len(model.model.layers) == 8
    assert sum(p.numel() for p in model.parameters()) == event.parameters_after

    losses = trained(model, optimizer, batch, steps=6)
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad.any() for p in model.parameters()), "everything takes part"
    folder, said = write(model, tmp_path, "stories", batch)
    check_read(tmp_path, {folder: said})


def trained(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Tensor, *, steps: int
) -> list[float]:
    """Losses before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_says_the_published_story_after_growing(model: LlamaForCausalLM, vocabulary: Any) -> None:
    grow(model, *EVERY_DIMENSION)
    assert told(model, vocabulary) == STORY
