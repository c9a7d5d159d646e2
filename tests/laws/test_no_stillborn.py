"""Law 2: whatever growth adds gets a gradient within the number of steps that was declared.

And the two ways in which it famously does not: zeros on both sides of new units, and zeroed norm gains.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cambia.growth import AddLayers, Contract, Operator, WidenFFN, grow, plan_growth
from cambia.growth.operators import Shape, Step
from cambia.growth.operators.widen import lengthened
from cambia.models.architectures import architecture_of
from cambia.nn.param_map import Fill, TensorMap
from tests.conftest import tiny
from tests.laws.examples import EVERY, FAMILIES, loss_of, parameters, tokens


def new_entries(model: PreTrainedModel, operators: tuple[Operator, ...]) -> dict[str, Tensor]:
    """For each parameter after the growth that is about to happen: which of its entries will be new."""
    plan = plan_growth(model, *operators)
    old = dict(model.named_parameters())
    masks = {}
    for name, parameter in plan.after.named_parameters():
        lineage = plan.lineages[name]
        reference = old[lineage.origin] if lineage.inherits else torch.empty(parameter.shape)
        mask = lineage.new_mask(reference.detach()).expand(parameter.shape).clone()
        # Clones are new as well, though they have a source: whatever lies outside the old block.
        outside = torch.ones_like(mask)
        outside[tuple(slice(0, size) for size in reference.shape)] = False
        mask |= outside
        if mask.any():
            masks[name] = mask
    return masks


def asleep_after(model: PreTrainedModel, operators: tuple[Operator, ...], steps: int) -> dict[str, float]:
    """New parameters whose new entries had no gradient in the first steps of AdamW, with their share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    born = new_entries(model, operators)
    assert born, "nothing is new"
    waiting = dict(born)
    grow(model, *operators, optimizer=optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        waiting = {name: mask & (gradients[name] == 0) for name, mask in waiting.items()}
        optimizer.step()
    waiting = {name: mask & reachable(model, name, mask) for name, mask in waiting.items()}
    return {name: (mask.sum() / born[name].sum()).item() for name, mask in waiting.items() if mask.any()}


def reachable(model: PreTrainedModel, name: str, mask: Tensor) -> Tensor:
    """Which entries can have a gradient at all, new or old."""
    axes = architecture_of(model.config).axes(name)
    reached = torch.ones_like(mask)
    # The last token of a row is only a target: nothing is predicted from it, and nothing looks it up.
    seen = tokens(model)[:, :-1]
    if axes.names[0] == "position":
        reached[seen.shape[1] :] = False
    if axes.names[0] == "vocab" and axes.read is None and not model.config.tie_word_embeddings:
        absent = torch.ones(len(mask), dtype=torch.bool)
        absent[seen] = False
        reached[absent] = False  # a tied row is reached by the head
    if axes.names[0] == "vocab" and getattr(model.config, "predictable_tokens", None):
        reached[model.config.predictable_tokens :] = False  # hidden until somebody says otherwise
    if axes.names == ("query_key_value",):
        third = len(mask) // 3
        reached[third : 2 * third] = False  # without rotary positions a key's bias shifts all scores alike
    return reached


@pytest.mark.parametrize(("family", "operator"), parameters(EVERY))
def test_everything_new_wakes_up_in_time(family: str, operator: Operator) -> None:
    model = tiny(family, torch.float64, attention_bias=True, mlp_bias=True)
    assert asleep_after(model, (operator,), operator.contract.alive_within) == {}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_no_gradient_can_reach_is_exempt(family: str, tied: bool) -> None:
    model = tiny(family, torch.float64, tie_word_embeddings=tied)
    loss_of(model).backward()
    exempt = 0
    for name, parameter in model.named_parameters():
        reached = reachable(model, name, torch.ones_like(parameter, dtype=torch.bool))
        if parameter.dim() == 2:
            assert torch.equal(parameter.grad != 0, reached), name
        exempt += int((~reached).sum())
    assert (exempt > 0) == (not tied or family == "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_operators_wake_up_within_the_sum_of_their_steps(family: str) -> None:
    model = tiny(family, torch.float64)
    operators = (AddLayers(add=1, where="append"), WidenFFN(add=3), AddLayers(add=2, initial="random"))
    within = plan_growth(model, *operators).contract.alive_within
    assert within == 1 + sum(operator.contract.alive_within - 1 for operator in operators)
    assert asleep_after(model, operators, within) == {}


@pytest.mark.parametrize("operator", [WidenFFN(add=3), AddLayers(add=1)])
def test_the_declared_number_of_steps_is_not_generous(operator: Operator) -> None:
    model = tiny("llama", torch.float64)
    assert asleep_after(model, (operator,), operator.contract.alive_within - 1)


@dataclass(frozen=True)
class ZerosOnBothSides(Operator):
    """Widens the FFN with zeros everywhere."""

    contract = Contract(exactness="tolerance", alive_within=2)

    def step(self, shape: Shape) -> Step:
        right = WidenFFN(add=3).step(shape)
        zeroed = {
            name: dataclasses.replace(tensor_map, fill=Fill.zeros())
            for name, tensor_map in lengthened(shape, "ffn", {0: 23, 1: 23}, std=0.1).tensors.items()
        }
        return Step(right.config, type(right.params)(zeroed), right.layers)


@dataclass(frozen=True)
class ZeroGains(Operator):
    """Adds a layer that is silenced by its norms' gains; its writers keep their values."""

    contract = Contract(exactness="tolerance", alive_within=2)

    def step(self, shape: Shape) -> Step:
        right = AddLayers(add=1, where="append", preserve=False).step(shape)
        tensors = dict(right.params.tensors)
        for name in tensors:
            if name.startswith("model.layers.2.") and name.endswith("layernorm.weight"):
                tensors[name] = TensorMap(None, shape=(24,), sibling="model.layers.1.input_layernorm.weight")
        return Step(right.config, type(right.params)(tensors), right.layers)


def test_zeros_on_both_sides_are_exact_and_dead_forever() -> None:
    """Each side's gradient is multiplied by the other's zero."""
    model = tiny("llama", torch.float64)
    everything = new_entries(model, (ZerosOnBothSides(),))
    assert len(everything) == 2 * 3
    assert asleep_after(model, (ZerosOnBothSides(),), 10) == dict.fromkeys(everything, 1.0)


def test_zero_gains_are_exact_and_leave_the_feed_forward_dead() -> None:
    """A gated unit at zero input has no slope: nothing in that FFN, its norm's gain included, ever moves."""
    model = tiny("llama", torch.float64)
    asleep = asleep_after(model, (ZeroGains(),), 10)
    for name in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert asleep[f"model.layers.2.{name}.weight"] == 1.0
