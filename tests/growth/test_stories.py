"""A model that somebody trained: stories260K grows in every dimension at once and keeps telling its story.

Its weights and its tokenizer are in the format of llama2.c (Andrej Karpathy's "tinyllamas"; MIT).
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> list[tuple[bytes, float]]:
    """Each token's text and how early it is merged: an int, then (float, int, bytes) for each token."""
    data, place, found = (folder / "tok512.bin").read_bytes(), 4, []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        found.append((data[place + 8 : place + 8 + length], score))
        place += 8 + length
    return found


IN_THE_FILE = (
    ("input_layernorm", ("width",)),
    ("self_attn.q_proj", ("width", "width")),
    ("self_attn.k_proj", ("keys", "width")),
    ("self_attn.v_proj", ("keys", "width")),
    ("self_attn.o_proj", ("width", "width")),
    ("post_attention_layernorm", ("width",)),
    ("mlp.gate_proj", ("units", "width")),
    ("mlp.down_proj", ("width", "units")),
    ("mlp.up_proj", ("units", "width")),
)
"""Seven sizes, the embedding, these for all layers at a time, and the last norm."""


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    """The weights in a stock Llama."""
    data = (folder / "stories260K.bin").read_bytes()
    width, units, layers, heads, groups, tokens, context = struct.unpack_from("<7i", data)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    sizes = {"width": width, "units": units, "keys": width // heads * groups}
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    embedding, numbers = numbers[: tokens * width], numbers[tokens * width :]
    state = {"model.embed_tokens.weight": embedding.view(tokens, width)}
    for name, axes in IN_THE_FILE:
        shape = [layers, *(sizes[axis] for axis in axes)]
        every, numbers = numbers[: math.prod(shape)].view(shape), numbers[math.prod(shape) :]
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            # Theirs turns neighbors in a head together, Llama's each entry of one half with one of the other.
            pairs = every.view(layers, -1, width // heads // 2, 2, width)
            every = pairs.transpose(2, 3).reshape(shape)
        state |= {f"model.layers.{i}.{name}.weight": weight for i, weight in enumerate(every)}
    state |= {"model.norm.weight": numbers[:width], "lm_head.weight": state["model.embed_tokens.weight"]}
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(state)
    return llama.eval()


def told(model: LlamaForCausalLM, vocabulary: list[tuple[bytes, float]], *, use_cache: bool = True) -> str:
    """As much of its story as is published."""
    begin = torch.tensor([[BEGIN]])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(begin, max_new_tokens=64, use_cache=use_cache, **settings)[0, 1:]
    return b"".join(vocabulary[i][0] for i in said.tolist()).decode().lstrip()[: len(STORY)]


def encoded(text: str, vocabulary: list[tuple[bytes, float]]) -> list[int]:
    """Tokens of a text: its letters, of which the best-scored pair is merged again and again."""
    number = {token: i for i, (token, _) in enumerate(vocabulary)}
    # A letter without a token of its own is its bytes, whose tokens come after the three special ones.
    letters = [[number[x]] if x in number else [3 + b for b in x] for x in (c.encode() for c in f" {text}")]
    found = list(itertools.chain(*letters))
    while True:
        pairs = [vocabulary[a][0] + vocabulary[b][0] for a, b in itertools.pairwise(found)]
        known = [(vocabulary[number[pair]][1], -i) for i, pair in enumerate(pairs) if pair in number]
        if not known:
            return [BEGIN, *found]
        best = -max(known)[1]
        found[best : best + 2] = [number[pairs[best]]]


@pytest.fixture(scope="module")
def batch(folder: Path, vocabulary: list[tuple[bytes, float]]) -> Tensor:
    """(4, 96) tokens of stories."""
    text = gzip.decompress((folder / "tinystories_sample.txt.gz").read_bytes()).decode()
    rows = [encoded(text[start : start + 400], vocabulary)[:96] for start in range(0, 1600, 400)]
    return torch.tensor(rows)


def test_it_is_the_model_that_was_published(
    model: LlamaForCausalLM, vocabulary: list[tuple[bytes, float]], batch: Tensor
) -> None:
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert told(model, vocabulary) == STORY
    assert loss_of(model, batch).item() < 2.0


def test_it_grows_in_every_dimension_at_once(
    model: LlamaForCausalLM, vocabulary: list[tuple[bytes, float]], batch: Tensor, tmp_path: Path
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


def test_it_says_the_published_story_after_growing(
    model: LlamaForCausalLM, vocabulary: list[tuple[bytes, float]]
) -> None:
    grow(model, *EVERY_DIMENSION)
    assert told(model, vocabulary) == STORY
