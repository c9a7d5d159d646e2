"""Law 1: growth that promises to be exact leaves every logit where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.growth import AddLayers, Operator, WidenFFN, grow, plan_growth
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import tiny
from tests.laws.examples import (
    EXACT,
    EXACT_BY_ANY_AMOUNT,
    FAMILIES,
    JUMPING,
    TOLERANCE,
    logits,
    parameters,
    possible,
    relative_error,
    without_upcasts,
)

DTYPES = [torch.float32, torch.float64]
MODES = ["append", "interpose", "stack", "middle"]
UNEVEN = [name for name in FAMILIES if ARCHITECTURES[name].uneven]


def error_of(model: Any, *events: list[Operator]) -> float:
    """Relative error of the logits after growing several times."""
    with without_upcasts(model):
        before = logits(model)
        for event in events:
            grow(model, *event)
        return relative_error(logits(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "operator"), parameters(EXACT))
def test_each_operator_is_exact(family: str, operator: Operator, dtype: torch.dtype) -> None:
    model = tiny(family, dtype, attention_bias=True, mlp_bias=True)
    count = sum(p.numel() for p in model.parameters())
    assert error_of(model, [operator]) <= TOLERANCE[dtype]
    assert sum(p.numel() for p in model.parameters()) > count


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes as a user might choose them, odd ones among them."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return {
        "hidden_size": heads * 2 * draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 37)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(2, 67)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(sizes=shapes(), data=st.data())
def test_any_growths_of_any_shape_are_exact(
    family: str, dtype: torch.dtype, sizes: dict[str, Any], data: st.DataObject
) -> None:
    operators = st.sampled_from(possible(family, EXACT_BY_ANY_AMOUNT))
    events = data.draw(st.lists(st.lists(operators, min_size=1, max_size=3), min_size=1, max_size=2))
    assert error_of(tiny(family, dtype, **sizes), *events) <= TOLERANCE[dtype]


@pytest.mark.parametrize("where", MODES)
@pytest.mark.parametrize("family", UNEVEN)
def test_uneven_layers_grow_exactly(family: str, where: Any) -> None:
    model = tiny(family, torch.float64, num_hidden_layers=3)
    error = error_of(
        model,
        [WidenFFN(layers=[1], add=5)],
        [AddLayers(add=2, where=where), WidenFFN(layers=[0, 3], factor=1.5, multiple_of=1)],
        [WidenFFN(add=2)],
    )
    assert error <= TOLERANCE[torch.float64]
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert len(set(widths)) > 1
    assert model.config.intermediate_size == widths


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_stock_table_cannot_say_is_refused(family: str) -> None:
    model = tiny(family)
    if ARCHITECTURES[family].uneven:
        assert plan_growth(model, WidenFFN(layers=[1], add=5)).config.intermediate_size == [20, 25]
    else:
        with pytest.raises(Exception, match="one FFN width for all layers"):
            plan_growth(model, WidenFFN(layers=[1], add=5))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_exact_to_its_own_rounding(family: str) -> None:
    model = tiny(family, torch.bfloat16)
    before = logits(model)
    event = grow(model, WidenFFN(add=3), AddLayers(add=2))
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative_error(logits(model), before) <= 3e-2
    assert event.exactness == "tolerance"


@pytest.mark.parametrize(("family", "operator"), parameters(JUMPING))
def test_a_jump_that_was_asked_for_happens_and_is_told(family: str, operator: Operator) -> None:
    model = tiny(family)
    before = logits(model)
    event = grow(model, operator)
    assert event.exactness == "none"
    assert relative_error(logits(model), before) > 1e-2
    assert event.logit_error is not None and event.logit_error > 1e-2
    assert event.loss_after != event.loss_before


def test_one_jump_in_an_event_makes_the_whole_event_jump() -> None:
    plan = plan_growth(tiny(), WidenFFN(add=1), AddLayers(add=1, preserve=False))
    assert plan.contract.exactness == "none"
