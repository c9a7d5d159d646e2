"""Plans: all that is known about a growth before a weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cambia.errors import GrowthError
from cambia.growth import AddLayers, Contract, Operator, WidenFFN, WidenHeadDim, grow, plan_growth
from cambia.growth.operators import Shape, Step
from cambia.growth.plan import describe
from cambia.models.bodies import count_parameters, flops_per_token, on_meta
from cambia.nn.param_map import AxisMap, ParamMap, TensorMap
from tests.conftest import tiny
from tests.laws.examples import EVERY, FAMILIES, field, logits, makers, once, parameters


# What new weights hold is nothing that a plan knows.
@pytest.mark.parametrize(("family", "operator"), parameters(once(EVERY, "initial", "preserve")))
def test_a_plan_foretells_the_growth_and_touches_nothing(family: str, operator: Operator) -> None:
    model = tiny(family)
    before = (logits(model).tolist(), model.config.to_dict(), [id(p) for p in model.parameters()])
    plan = plan_growth(model, operator, context=32)
    assert (logits(model).tolist(), model.config.to_dict(), [id(p) for p in model.parameters()]) == before
    assert all(parameter.is_meta for parameter in plan.after.parameters())
    assert plan.parameters_before == count_parameters(model)
    assert plan.flops_per_token_before == flops_per_token(model, 32)

    event = grow(model, operator, context=32)
    assert plan.parameters_after == count_parameters(model) == event.parameters_after
    assert plan.flops_per_token_after == flops_per_token(model, 32) == event.flops_per_token_after
    assert plan.config.to_dict() == model.config.to_dict()
    assert plan.config_changes == event.config_changes
    planned = {name: p.shape for name, p in plan.after.named_parameters()}
    assert planned == {name: p.shape for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_memory_can_be_planned(family: str) -> None:
    model = tiny(family)
    operators = (WidenFFN(factor=1.5), AddLayers(add=2))
    empty = plan_growth(on_meta(type(model), model.config), *operators)
    assert empty.parameters_after == plan_growth(model, *operators).parameters_after


def test_a_large_model_is_planned_without_its_memory() -> None:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=4,
        num_attention_heads=32,
    )
    plan = plan_growth(on_meta(LlamaForCausalLM, config), WidenFFN(factor=2), AddLayers(factor=2))
    assert plan.parameters_after > 2e9
    assert plan.config.num_hidden_layers == 8


def test_flops_are_counted_as_said() -> None:
    """3 (2 N + layers 2 T H D) by hand, for untied and tied heads alike."""
    for tie in (False, True):
        model = tiny("llama", tie_word_embeddings=tie)
        attention = 24 * 24 + 2 * 12 * 24 + 24 * 24
        matrices = 2 * (attention + 3 * 24 * 20) + 31 * 24
        assert flops_per_token(model, 16) == 3 * (2 * matrices + 2 * 2 * 16 * 24)


def test_the_memory_held_while_growing_is_that_of_the_old_copies() -> None:
    model = tiny("llama")
    plan = plan_growth(model, WidenFFN(add=20))
    largest = 24 * 20  # one matrix, as it was; the others have been let go of by then
    assert plan.extra_bytes(bytes_per_value=4, moments=2) == largest * 4 * 3
    assert plan_growth(model, AddLayers(add=1)).extra_bytes() == 0, "added layers replace nothing"
    # Queries are multiplied, so they are kept until it has succeeded.
    held = plan_growth(model, WidenHeadDim()).extra_bytes(bytes_per_value=1, moments=0)
    queries, largest_of_the_rest = 2 * 24 * 24, 24 * 24
    assert held == queries + largest_of_the_rest


def test_layers_are_followed_through_several_operators() -> None:
    model = tiny(num_hidden_layers=2)
    plan = plan_growth(model, AddLayers(add=2, where="interpose"), AddLayers(add=1, where="stack"))
    assert plan.layers == (0, None, 1, None, None)
    lineage = plan.lineages["model.layers.2.mlp.up_proj.weight"]
    assert lineage.origin == lineage.sibling == "model.layers.1.mlp.up_proj.weight"
    assert lineage.is_same
    newborn = plan.lineages["model.layers.4.mlp.down_proj.weight"]
    assert newborn.origin is None
    assert newborn.sibling == "model.layers.0.mlp.down_proj.weight"


def test_waiting_adds_up_and_the_weakest_promise_counts() -> None:
    assert plan_growth(tiny(), WidenFFN(add=1)).contract == Contract("tolerance", 2)
    assert plan_growth(tiny(), *[WidenFFN(add=1)] * 3).contract == Contract("tolerance", 4)
    assert plan_growth(tiny(), WidenFFN(add=1), AddLayers(add=1, preserve=False)).contract.exactness == "none"


# ---- operators that are wrong --------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(Operator):
    """Says what config and maps it is told to."""

    changed: Any = None
    config_fields: Any = None
    contract = Contract("tolerance", 1)

    def step(self, shape: Shape) -> Step:
        tensors = {name: TensorMap(name) for name in shape.shapes} | (self.changed or {})
        config = shape.with_sizes()
        for name, value in (self.config_fields or {}).items():
            setattr(config, name, value)
        return Step(config, ParamMap({k: v for k, v in tensors.items() if v}), list(range(shape.num_layers)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda gate, dim, size: Wrong({gate: TensorMap(gate, {dim: AxisMap.lengthened(20, 23)})}),
        lambda gate, dim, size: Wrong({gate: None}),
        lambda gate, dim, size: Wrong({"surplus": TensorMap(gate)}),
        lambda gate, dim, size: Wrong(None, {size: 23}),
        lambda gate, dim, size: Wrong({gate: TensorMap(None, shape=(25,))}),
    ],
    ids=[
        "longer than the config says",
        "forgotten",
        "surplus",
        "config without map",
        "fresh in a wrong shape",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_must_give_exactly_the_grown_models_tensors(family: str, wrong: Any) -> None:
    model = tiny(family)
    before = logits(model)
    gate, dim = next(iter(makers(model, "ffn").items()))
    with pytest.raises(GrowthError, match="the operator or the architecture table is wrong"):
        grow(model, wrong(gate, dim, field(model, "intermediate_size")))
    assert torch.equal(logits(model), before)


def test_a_config_that_its_own_class_refuses_is_one_line() -> None:
    with pytest.raises(GrowthError, match="num_key_value_heads=3 does not divide") as caught:
        plan_growth(tiny("cambia"), Wrong(None, {"num_key_value_heads": 3}))
    assert "\n" not in str(caught.value)


def test_operators_are_described_by_what_was_said() -> None:
    assert describe(WidenFFN(factor=1.5)) == {
        "type": "widen_ffn",
        "factor": 1.5,
        "layers": "all",
        "count": 1,
        "multiple_of": 8,
        "initial": "random",
    }
    assert describe(Wrong())["type"] == f"{__name__}:Wrong"
