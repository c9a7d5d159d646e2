"""Law 1: growth that promises to be exact leaves every logit where it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.growth import AddLayers, Operator, WidenFFN, WidenHeadDim, grow, plan_growth
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import tiny
from tests.laws.examples import (
    EVERY,
    EXACT,
    FAMILIES,
    JUMPING,
    TOLERANCE,
    logits,
    once,
    parameters,
    possible,
    relative_error,
    tokens,
    without_upcasts,
)

KEPT = [form for form in EVERY if form.contract.exactness != "none"]
DTYPES = [torch.float32, torch.float64]
MODES = ["append", "interpose", "stack", "middle"]
UNEVEN = [name for name in FAMILIES if ARCHITECTURES[name].uneven]


def error_of(model: Any, *events: list[Operator]) -> float:
    """Relative error of the old tokens' logits after growing several times."""
    with without_upcasts(model):
        batch = tokens(model)
        before = logits(model, batch)
        for event in events:
            grow(model, *event)
        return relative_error(logits(model, batch)[..., : before.shape[-1]], before)


@pytest.mark.parametrize(("family", "operator"), parameters(EXACT))
def test_each_operator_is_exact(family: str, operator: Operator) -> None:
    model = tiny(family, torch.float64, attention_bias=True, mlp_bias=True)
    count = sum(p.numel() for p in model.parameters())
    assert error_of(model, [operator]) <= TOLERANCE[torch.float64]
    assert sum(p.numel() for p in model.parameters()) > count


@pytest.mark.parametrize(("family", "operator"), parameters(once(EXACT, "preserve", "where", "layers")))
def test_and_to_float32s_rounding_with_stock_norms(family: str, operator: Operator) -> None:
    model = tiny(family, attention_bias=True, mlp_bias=True)
    before = logits(model)
    grow(model, operator)
    assert relative_error(logits(model), before) <= TOLERANCE[torch.float32]


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


NAMES = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "units": "intermediate_size",
    "layers": "num_hidden_layers",
    "tokens": "vocab_size",
}


def amounts(kind: str, family: str, now: dict[str, int]) -> list[int]:
    """Sizes to grow to that the family's config takes, from the sizes as they are now."""
    table = ARCHITECTURES[family]
    hidden, heads, groups, size = (now[name] for name in ("hidden", "heads", "groups", "size"))
    if kind == "AddHeads":
        more = range(heads + groups, 5 * heads, groups)
        return [h for h in more if table.uneven or hidden % h == 0]
    if kind == "AddKVHeads":
        more = range(groups + 1, 4 * groups + 1)
        return [g for g in more if table.uneven or hidden % (heads // groups * g) == 0]
    if kind == "WidenHidden":
        unit = 1 if table.uneven else heads if table.head_dim_apart else size
        return [hidden + unit * more for more in range(1, 2 * hidden // unit + 1)]
    old = {"AddLayers": "layers", "AddTokens": "tokens", "WidenFFN": "units"}[kind]
    return list(range(now[old] + 1, now[old] + (4 if kind == "AddLayers" else 2 * now[old] + 2)))


@st.composite
def operators_in_a_row(draw: st.DrawFn, family: str, sizes: dict[str, Any]) -> list[Operator]:
    """One to three operators in a row, each legal after those before it."""
    now = {ours: sizes[name] for ours, name in NAMES.items()}
    now["size"] = now["hidden"] // now["heads"]
    found: list[Operator] = []
    for _ in range(draw(st.integers(1, 3))):
        kinds = sorted({type(operator).__name__ for operator in possible(family, KEPT)})
        legal = [kind for kind in kinds if kind == "WidenHeadDim" or amounts(kind, family, now)]
        kind = draw(st.sampled_from(legal))
        form = draw(st.sampled_from([f for f in possible(family, KEPT) if type(f).__name__ == kind]))
        if kind == "WidenHeadDim":
            form = WidenHeadDim(factor=draw(st.integers(2, 3)))
        else:
            to = draw(st.sampled_from(amounts(kind, family, now)))
            if getattr(form, "initial", None) == "clone":
                to = now["hidden"] * draw(st.integers(2, 3))
            form = dataclasses.replace(form, add=None, factor=None, to=to)
        found.append(form)
        now = after(form, family, now)
    return found


def after(operator: Any, family: str, now: dict[str, int]) -> dict[str, int]:
    """The sizes once an operator was there; of uneven layers the largest."""
    to = getattr(operator, "to", None)
    match type(operator).__name__:
        case "AddHeads":
            return {**now, "heads": to}
        case "AddKVHeads":
            return {**now, "heads": now["heads"] // now["groups"] * to, "groups": to}
        case "WidenHeadDim":
            return {**now, "size": now["size"] * operator.factor}
        case "WidenHidden":
            heads = now["heads"] if ARCHITECTURES[family].head_dim_apart else to // now["size"]
            return {**now, "hidden": to, "heads": heads, "groups": min(heads, now["groups"])}
        case "AddLayers":
            return {**now, "layers": to}
        case "AddTokens":
            return {**now, "tokens": to}
    return {**now, "units": to}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(sizes=shapes(), data=st.data())
def test_any_operators_in_a_row_are_exact(
    family: str, dtype: torch.dtype, sizes: dict[str, Any], data: st.DataObject
) -> None:
    operators = data.draw(operators_in_a_row(family, sizes))
    first = data.draw(st.sampled_from([len(operators), 1]))  # in one event, mostly, or in two
    model = tiny(family, dtype, **sizes).eval()
    assert error_of(model, *filter(None, [operators[:first], operators[first:]])) <= TOLERANCE[dtype]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = tokens(model, rows=2, length=5)
    with without_upcasts(model):
        said = [
            model.generate(batch, attention_mask=torch.ones_like(batch), use_cache=use, **settings)
            for use in (True, False)
        ]
    assert torch.equal(*said)
    assert said[0].shape == (2, 9)


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
