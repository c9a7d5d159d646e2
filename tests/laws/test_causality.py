"""Law 8: what a model says at a position depends on nothing that comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cambia.growth import AddLayers, WidenFFN, grow
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, logits, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "all heads their own keys": {"num_key_value_heads": 4},
}


def leaks(model: PreTrainedModel, length: int = 9) -> list[int]:
    """Positions of which a change was seen before them."""
    batch = tokens(model, length=length)
    said = logits(model, batch)
    found = []
    for position in range(length):
        changed = batch.clone()
        changed[:, position] = (batch[:, position] + 1) % model.config.vocab_size
        says = logits(model, changed)
        assert not torch.equal(says[:, position], said[:, position])
        if not torch.equal(says[:, :position], said[:, :position]):
            found.append(position)
    return found


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_nothing_before_them(family: str, sizes: dict[str, Any]) -> None:
    assert leaks(tiny(family, **sizes)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_in_a_grown_model(family: str) -> None:
    model = tiny(family)
    if ARCHITECTURES[family].uneven:
        grow(model, WidenFFN(layers=[0], add=3))
    grow(model, AddLayers(add=2, initial="random", preserve=False), WidenFFN(add=5))
    assert leaks(model) == []


def test_a_model_that_looks_ahead_is_caught() -> None:
    model = tiny("llama")
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out + out.roll(-1, dims=1))
    assert leaks(model) == list(range(1, 9))
