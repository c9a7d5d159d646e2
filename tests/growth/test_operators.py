"""Operators: how much, where, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.config import build, resolve
from cambia.errors import ConfigError, GrowthError
from cambia.growth import OPERATORS, AddLayers, GrowthRule, WidenFFN, grow, plan_growth
from cambia.growth.operators import Amount
from cambia.models.architectures import ARCHITECTURES, layer_ids
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, gate, layers_of, logits

SIZES = st.integers(1, 10_000)


# ---- how much ------------------------------------------------------------------------------------


@given(size=SIZES, factor=st.floats(1.0001, 8), multiple_of=st.integers(1, 64))
def test_a_factor_lands_on_the_nearest_multiple_above(size: int, factor: float, multiple_of: int) -> None:
    after = Amount(factor=factor).after(size, multiple_of=multiple_of)
    assert after > size
    assert after % multiple_of == 0
    nearest = round(size * factor / multiple_of) * multiple_of
    assert after == nearest or (nearest <= size and after - size <= multiple_of)


@given(size=SIZES, more=SIZES)
def test_add_and_to_are_taken_at_their_word(size: int, more: int) -> None:
    assert Amount(add=more).after(size, multiple_of=8) == size + more
    assert Amount(to=size + more).after(size, multiple_of=8) == size + more
    with pytest.raises(GrowthError, match=f"to={size} is not larger than the present size {size}"):
        Amount(to=size).after(size)


@pytest.mark.parametrize(
    ("amount", "problem"),
    [
        ({"factor": 2, "add": 1}, r"got \['factor', 'add'\]"),
        ({"add": 1, "to": 5}, r"got \['add', 'to'\]"),
        ({"factor": 1.0}, "must be above 1"),
        ({"factor": 0.5}, "must be above 1"),
        ({"factor": float("nan")}, "must be above 1"),
        ({"factor": float("inf")}, "must be above 1"),
        ({"add": 0}, "must be at least 1"),
        ({"add": -3}, "must be at least 1"),
        ({"factor": 2, "multiple_of": 0}, "multiple_of=0 must be at least 1"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(amount: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        WidenFFN(**amount)


@pytest.mark.parametrize(
    ("old", "ours"),
    [("growth_factor", "factor"), ("add_hidden", "add"), ("new_d_ff", "to"), ("layers_per_event", "add")],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_old_spellings_are_refused_with_ours_named(operator: str, old: str, ours: str) -> None:
    takes_amounts = issubclass(resolve(operator, OPERATORS, "operator"), Amount)
    problem = f"{old}.* is called '{ours}' here" if takes_amounts else f"{old}: not a setting|is called"
    with pytest.raises(ConfigError, match=problem):
        build(GrowthRule, {"when": {"type": "schedule", "at_steps": [1]}, "then": {"type": operator, old: 2}})


# ---- which layers widen --------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[2], [-1], [0, 7], []])
def test_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    with pytest.raises(GrowthError, match="the model has layers 0 to 1"):
        plan_growth(tiny("cambia"), WidenFFN(layers=layers, add=1))


def test_naming_every_layer_is_naming_all_of_them() -> None:
    assert plan_growth(tiny("llama"), WidenFFN(layers=[1, 0], add=1)).config.intermediate_size == 21


def test_a_size_to_grow_to_must_be_above_every_layer() -> None:
    model = tiny("cambia")
    grow(model, WidenFFN(layers=[0], to=30))
    assert model.config.intermediate_size == [30, 20]
    with pytest.raises(GrowthError, match="to=25 is not larger than the present size 30"):
        grow(model, WidenFFN(to=25))
    grow(model, WidenFFN(layers=[1], to=30))
    assert model.config.intermediate_size == 30, "equal widths are one number again"


# ---- where layers go -----------------------------------------------------------------------------


def order(depth: int, operator: AddLayers) -> list[str]:
    """Each layer afterwards: old ones by number, new ones as + and the number they are copies of."""
    model = tiny(num_hidden_layers=depth)
    originals = [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]
    plan = plan_growth(model, operator)
    grow(model, operator)
    names = []
    for place, layer in zip(plan.layers, model.model.layers, strict=True):
        (like,) = (i for i, w in enumerate(originals) if torch.equal(w, layer.self_attn.q_proj.weight))
        names.append(f"+{like}" if place is None else str(like))
        assert place in (None, like)
    ids = layer_ids(model.config)
    assert [i for i in ids if i < depth] == list(range(depth))
    assert [i for i in ids if i >= depth] == list(range(depth, len(ids)))
    assert [i < depth for i in ids] == [not name.startswith("+") for name in names]
    return names


@pytest.mark.parametrize(
    ("depth", "where", "count", "expected"),
    [
        (3, "append", 1, "0 1 2 +2"),
        (3, "append", 2, "0 1 2 +1 +2"),
        (2, "append", 5, "0 1 +0 +1 +0 +1 +0"),
        (3, "stack", 1, "0 1 2 +0"),
        (3, "stack", 3, "0 1 2 +0 +1 +2"),
        (2, "stack", 5, "0 1 +0 +1 +0 +1 +0"),
        (4, "middle", 2, "0 1 2 +1 +2 3"),
        (3, "middle", 1, "0 1 +1 2"),
        (2, "middle", 4, "0 1 +0 +1 +0 +1"),
        (4, "interpose", 2, "0 1 +1 2 3 +3"),
        (3, "interpose", 3, "0 +0 1 +1 2 +2"),
        (4, "interpose", 1, "0 1 2 +2 3"),
        (1, "interpose", 3, "0 +0 +0 +0"),
        (2, "interpose", 6, "0 +0 +0 +0 1 +1 +1 +1"),
    ],
)
def test_where_new_layers_go(depth: int, where: Any, count: int, expected: str) -> None:
    assert order(depth, AddLayers(add=count, where=where)) == expected.split()


@settings(max_examples=10)
@given(depth=st.integers(1, 5), count=st.integers(1, 7))
def test_interposed_copies_spread_evenly(depth: int, count: int) -> None:
    names = order(depth, AddLayers(add=count, where="interpose"))
    copies = [names.count(f"+{i}") for i in range(depth)]
    assert sum(copies) == count
    assert max(copies) - min(copies) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layers_are_new_and_copies_are_copies(family: str) -> None:
    table = ARCHITECTURES[family]
    for initial in ("copy", "random"):
        model = tiny(family, attention_bias=True, mlp_bias=True, initializer_range=0.05)
        grow(model, AddLayers(add=1, where="append", initial=initial))
        old, new = (dict(layer.named_parameters()) for layer in layers_of(model)[1:])
        for name, parameter in new.items():
            if any(writer in name for writer in table.layer_writers):
                assert not parameter.any()
            elif initial == "copy":
                assert torch.equal(parameter, old[name])
                assert parameter is not old[name]
            elif table.inside[name].is_gain:
                assert torch.equal(parameter, torch.ones_like(parameter))
            elif name.endswith("bias"):
                assert not parameter.any()
            else:
                assert parameter.std().item() == pytest.approx(0.05, rel=0.25)


def test_stacking_without_preserving_is_the_stack_run_twice() -> None:
    """G_stack: the same layers once more, so the grown model is the old one with its body applied again."""
    model, twice = tiny("llama"), tiny("llama", num_hidden_layers=4)
    body = model.model.state_dict()
    for name in list(body):
        if name.startswith("layers."):
            _, place, rest = name.split(".", 2)
            body[f"layers.{int(place) + 2}.{rest}"] = body[name]
    twice.model.load_state_dict(body)
    twice.lm_head.load_state_dict(model.lm_head.state_dict())
    grow(model, AddLayers(factor=2, where="stack", preserve=False))
    assert torch.equal(logits(model), logits(twice))


def test_a_model_without_layers_has_nothing_to_copy() -> None:
    with pytest.raises(GrowthError, match="no layer that new ones could be like"):
        plan_growth(tiny("llama", num_hidden_layers=0), AddLayers(add=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_units_speak_as_loudly_as_old_ones(family: str) -> None:
    model = tiny(family, hidden_size=64, intermediate_size=64)
    gate(model, 0).mul_(7)
    gate(model, 1).zero_()
    grow(model, WidenFFN(add=64))
    for place, expected in ((0, None), (1, model.config.initializer_range)):
        weight = gate(model, place)
        old = weight[:64].pow(2).mean().sqrt().item()
        new = weight[64:].pow(2).mean().sqrt().item()
        assert new == pytest.approx(expected or old, rel=0.1)


@pytest.mark.parametrize("layers", ["highest", None, 2])
def test_layers_that_cannot_be_meant_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match="expected places, or one of all, top"):
        WidenFFN(layers=layers)
