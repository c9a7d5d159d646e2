"""Law 8: what a model says at a position depends on nothing that comes later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cambia.growth import AddLayers, WidenFFN, grow
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "all heads their own keys": {"num_key_value_heads": 4},
}
WAYS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda batch: {"use_cache": False},
    "with a cache": lambda batch: {"use_cache": True},
    "with a mask": lambda batch: {"use_cache": False, "attention_mask": torch.ones_like(batch)},
    "padded": lambda batch: {
        "use_cache": False,
        "attention_mask": (torch.arange(batch.shape[1]) > 2).expand_as(batch).long(),
    },
    "with positions": lambda batch: {
        "use_cache": False,
        "position_ids": torch.arange(batch.shape[1])[None] + 5,
    },
}
"""The ways into a model: each may take another road through its attention."""
LONG = 75
EDGES = [0, 1, 15, 16, 31, 32, 33, 47, 63, 64, 65, 74]
"""Positions around the edges of whatever blocks a kernel may work in."""


@torch.no_grad()
def leaks(
    model: PreTrainedModel, *, length: int = 9, positions: Iterable[int] | None = None, way: str = "plain"
) -> list[int]:
    """Positions of which a change was seen before them."""
    batch = tokens(model, length=length)
    said = model(input_ids=batch, **WAYS[way](batch)).logits
    found = []
    for position in range(length) if positions is None else positions:
        changed = batch.clone()
        changed[:, position] = (batch[:, position] + 1) % model.config.vocab_size
        says = model(input_ids=changed, **WAYS[way](changed)).logits
        if way != "padded":
            assert not torch.equal(says[:, position], said[:, position])
        if not torch.equal(says[:, :position], said[:, :position]):
            found.append(position)
    return found


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_nothing_before_them(family: str, sizes: dict[str, Any]) -> None:
    assert leaks(tiny(family, **sizes)) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_by_any_other_way_into_the_model(family: str, way: str) -> None:
    model = tiny(family, max_position_embeddings=128).eval()
    assert leaks(model, way=way) == []
    assert leaks(model, length=LONG, positions=EDGES, way=way) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_nor_in_another_precision(family: str, dtype: torch.dtype) -> None:
    assert leaks(tiny(family, dtype, max_position_embeddings=128), length=LONG, positions=EDGES) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_in_a_grown_model(family: str) -> None:
    model = tiny(family, max_position_embeddings=128)
    if ARCHITECTURES[family].uneven:
        grow(model, WidenFFN(layers=[0], add=3))
    grow(model, AddLayers(add=2, initial="random", preserve=False), WidenFFN(add=5))
    assert leaks(model) == []
    assert leaks(model, length=LONG, positions=EDGES) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_to_what_comes_later(family: str) -> None:
    """Training looks at the same past as scoring does."""
    model = tiny(family, max_position_embeddings=128).train()
    embedded = model.get_input_embeddings()(tokens(model, length=LONG)).detach().requires_grad_(True)
    for position in EDGES:
        said = model(inputs_embeds=embedded, use_cache=False).logits[:, position]
        (gradient,) = torch.autograd.grad(said.square().sum(), embedded)
        assert not gradient[:, position + 1 :].any()
        assert all(gradient[:, earlier].any() for earlier in range(position + 1))


def test_a_model_that_looks_ahead_is_caught() -> None:
    model = tiny("llama")
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out + out.roll(-1, dims=1))
    assert leaks(model) == list(range(1, 9))
