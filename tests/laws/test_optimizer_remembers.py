"""Law 3: what the optimizer knew of the old entries it knows afterwards, and nothing leaves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth import AddLayers, Contract, Operator, WidenFFN, WidenHidden, grow, plan_growth
from cambia.growth.carry import OptimizerHolder
from cambia.growth.operators import Shape, Step
from cambia.models.architectures import layer_ids
from cambia.nn.param_map import AxisMap, ParamMap, TensorMap
from cambia.training.muon import Muon
from tests.conftest import tiny
from tests.laws.examples import (
    EVERY,
    EXACT,
    FAMILIES,
    everything,
    logits,
    loss_of,
    once,
    parameters,
    without_upcasts,
)

POWERS = {"exp_avg": -1, "momentum_buffer": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: AdamW(groups, lr=1e-2, foreach=False, fused=False),
    "adamw foreach": lambda groups: AdamW(groups, lr=1e-2, foreach=True),
    "adamw fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "adamw amsgrad": lambda groups: AdamW(groups, lr=1e-2, amsgrad=True),
    "adam": lambda groups: Adam(groups, lr=1e-2),
    "muon": lambda groups: Muon([{**groups[0], "orthogonal": True}, *groups[1:]], lr=1e-2),
    "sgd": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
    "sgd foreach": lambda groups: SGD(groups, lr=1e-2, momentum=0.9, foreach=True),
    "sgd without momentum": lambda groups: SGD(groups, lr=1e-2),
}
KEEPING = [operator for operator in EVERY if not operator.contract.rescales]
OPERATORS = (WidenFFN(add=3), AddLayers(add=1, where="interpose"))


def in_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Matrices, decayed, and vectors, not."""
    everything = list(model.parameters())
    return [
        {"params": [p for p in everything if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in everything if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(model: PreTrainedModel, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def remembered(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """A copy of the state of every parameter, by name."""
    return {
        name: {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for name, parameter in model.named_parameters()
    }


def positions(lineage: Any, old: Tensor) -> Tensor:
    """For each entry afterwards the flat position of the old one that it is, -1 where it is new."""
    numbered = torch.arange(old.numel(), dtype=torch.float64).view(old.shape)
    return lineage.carry(numbered, power=0, new=-1.0).long()


def check_everything_is_remembered(
    model: PreTrainedModel, optimizer: Optimizer, *operators: Operator
) -> None:
    """Grow and compare every entry of every state with what it was."""
    plan = plan_growth(model, *operators)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = remembered(model, optimizer)
    grow(model, *operators, optimizer=optimizer)
    after = remembered(model, optimizer)

    for name, parameter in model.named_parameters():
        lineage = plan.lineages[name]
        if not lineage.inherits:
            assert after[name] == {}, f"{name} is new and starts without a past"
            continue
        assert after[name].keys() == before[lineage.origin].keys()
        place = positions(lineage, old[lineage.origin])
        is_old = place >= 0
        assert torch.equal(parameter[is_old], old[lineage.origin].flatten()[place[is_old]])
        for key, value in before[lineage.origin].items():
            if key not in POWERS or value is None:
                assert after[name][key] == value
                continue
            assert torch.equal(after[name][key][is_old], value.flatten()[place[is_old]])
            new = after[name][key][~is_old]
            assert torch.equal(new, torch.full_like(new, value.mean().item() if POWERS[key] == -2 else 0.0))


def check_everybody_is_in_one_group(model: PreTrainedModel, optimizer: Optimizer) -> None:
    members = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in optimizer.state} <= set(members)


# Whether a copy's writers are silent is no matter to the optimizer: no copy has a past.
@pytest.mark.parametrize(("family", "operator"), parameters(once(KEEPING, "preserve")))
def test_moments_of_old_entries_are_bit_equal(family: str, operator: Operator) -> None:
    model = tiny(family, attention_bias=True, mlp_bias=True)
    optimizer = KINDS["adamw"](in_groups(model))
    train(model, optimizer)
    check_everything_is_remembered(model, optimizer, operator)
    check_everybody_is_in_one_group(model, optimizer)
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        (kind, family)
        for kind in KINDS
        for family in FAMILIES
        if kind == "adamw" or family in ("cambia", "gpt2")
    ],
)
def test_every_kind_of_optimizer_goes_on(kind: str, family: str) -> None:
    model = tiny(family, attention_bias=True, tie_word_embeddings=True)
    optimizer = KINDS[kind](in_groups(model))
    train(model, optimizer)
    for _ in range(2):
        check_everything_is_remembered(model, optimizer, *OPERATORS)
        check_everybody_is_in_one_group(model, optimizer)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        train(model, optimizer, 2)
        assert all(
            not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)
        )


def test_before_the_first_step_there_is_nothing_to_remember() -> None:
    model = tiny()
    optimizer = KINDS["adamw"](in_groups(model))
    grow(model, *OPERATORS, optimizer=optimizer)
    assert not optimizer.state
    check_everybody_is_in_one_group(model, optimizer)
    train(model, optimizer)


def test_a_step_count_goes_on() -> None:
    model = tiny()
    optimizer = KINDS["adamw"](in_groups(model))
    train(model, optimizer, 5)
    grow(model, *OPERATORS, optimizer=optimizer)
    steps = {name: state["step"].item() for name, state in remembered(model, optimizer).items() if state}
    born = layer_ids(model.config).index(2)
    assert set(steps.values()) == {5.0}
    assert not any(name.startswith(f"model.layers.{born}.") for name in steps)
    train(model, optimizer, 1)
    assert {state["step"].item() for state in optimizer.state.values()} == {6.0, 1.0}


@pytest.mark.parametrize("where", ["append", "interpose", "stack", "middle"])
def test_new_parameters_join_the_group_of_what_they_resemble(where: Any) -> None:
    model = tiny(num_hidden_layers=3)
    groups = [
        {"params": list(layer.parameters()), "lr": 0.1 * (i + 1)}
        for i, layer in enumerate(model.model.layers)
    ]
    inside = {id(p) for group in groups for p in group["params"]}
    groups.append({"params": [p for p in model.parameters() if id(p) not in inside], "lr": 1.0})
    optimizer = AdamW(groups)
    train(model, optimizer, 1)

    # Two growths in one event: the second names what it resembles as it was called in between.
    operators = (AddLayers(add=2, where="interpose"), AddLayers(add=4, where=where, initial="random"))
    plan = plan_growth(model, *operators)
    grow(model, *operators, optimizer=optimizer)
    check_everybody_is_in_one_group(model, optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for i, place in enumerate(plan.layers):
        found = {rates[id(p)] for p in model.model.layers[i].parameters()}
        assert len(found) == 1, "a layer trains at one rate"
        if place is not None:
            assert found == {0.1 * (place + 1)}


def test_a_learning_rate_scheduler_keeps_working() -> None:
    model = tiny()
    optimizer = KINDS["adamw"](in_groups(model))
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    for step in range(4):
        if step == 2:
            grow(model, *OPERATORS, optimizer=optimizer)
            assert len(optimizer.param_groups) == 2
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-2 / (step + 1))] * 2
        train(model, optimizer, 1)
        scheduler.step()


# ---- growth that multiplies ----------------------------------------------------------------------


@dataclass(frozen=True)
class Rescale(Operator):
    """Every FFN's input half four times as loud, its output a quarter: exact, bit by bit."""

    contract = Contract(exactness="tolerance", alive_within=1)

    def step(self, shape: Shape) -> Step:
        tensors = {}
        for name, size in shape.shapes.items():
            tensors[name] = TensorMap(name)
            for part, dim, factor in (("up_proj.weight", 0, 4.0), ("down_proj.weight", 1, 0.25)):
                if name.endswith(part):
                    index = torch.arange(size[dim])
                    scale = torch.full((size[dim],), factor, dtype=torch.float64)
                    tensors[name] = TensorMap(name, {dim: AxisMap(index, scale)})
        return Step(shape.with_sizes(), ParamMap(tensors), list(range(shape.num_layers)))


@pytest.mark.parametrize("kind", ["adamw", "adamw fused", "adamw amsgrad", "muon", "sgd"])
def test_moments_follow_a_multiplied_weight(kind: str) -> None:
    model = tiny()
    optimizer = KINDS[kind](in_groups(model))
    train(model, optimizer)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected_logits, before = logits(model), remembered(model, optimizer)
    grow(model, Rescale(), optimizer=optimizer)
    after = remembered(model, optimizer)
    assert torch.equal(logits(model), expected_logits)
    for name, parameter in model.named_parameters():
        factor = 4.0 if "up_proj" in name else 0.25 if "down_proj" in name else 1.0
        assert torch.equal(parameter, weights[name] * factor)
        for key, value in before[name].items():
            if key in POWERS:
                assert torch.equal(after[name][key], value * factor ** POWERS[key])


APPROXIMATE = {("gpt2", "WidenHidden"), ("qwen3", "WidenHeadDim")}
"""Where new entries are copies or means of old ones inside a norm, and take a share of its gradient."""


def expected_gradients() -> list[Any]:
    """Every family and exact operator; where moments are an approximation, the test has to fail."""
    reason = "moments are carried as an approximation: a norm's statistics weigh old entries less"
    fails = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
    cases = []
    for case in parameters(EXACT):
        family, operator = case.values
        is_clone = operator == WidenHidden(factor=2, initial="clone")
        is_approximate = is_clone or (family, type(operator).__name__) in APPROXIMATE
        cases.append(pytest.param(family, operator, id=case.id, marks=[fails] if is_approximate else []))
    return cases


@pytest.mark.parametrize(("family", "operator"), [*expected_gradients(), ("cambia", Rescale())])
def test_old_entries_get_the_gradient_that_their_moments_expect(family: str, operator: Operator) -> None:
    """Why moments are carried as they are: so does the gradient itself change (divided by c, or shared)."""
    model = tiny(family, torch.float64, attention_bias=True)
    plan = plan_growth(model, operator)
    with without_upcasts(model):
        loss_of(model).backward()
    shapes = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grow(model, operator)
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if plan.lineages[n].inherits}
    model.zero_grad()
    with without_upcasts(model):
        loss_of(model).backward()
    grown = dict(model.named_parameters())
    for name, expected in carried.items():
        old = ~plan.lineages[name].new_mask(shapes[plan.lineages[name].origin]).expand(expected.shape)
        torch.testing.assert_close(expected[old], grown[name].grad[old], rtol=1e-6, atol=1e-9)


# ---- new entries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mean", "zero"])
def test_new_second_moments_follow_the_policy(policy: Any) -> None:
    model = tiny()
    optimizer = KINDS["adamw"](in_groups(model))
    train(model, optimizer)
    old = remembered(model, optimizer)
    grow(model, WidenFFN(add=3), holders=[OptimizerHolder(optimizer, moments=policy)])
    for name, state in remembered(model, optimizer).items():
        if "gate_proj" in name:
            mean = old[name]["exp_avg_sq"].mean().item()
            assert mean > 0
            expected = torch.full((3, 24), mean if policy == "mean" else 0.0)
            assert torch.equal(state["exp_avg_sq"][20:], expected)
            assert torch.equal(state["exp_avg"][20:], torch.zeros(3, 24))


@pytest.mark.parametrize(("policy", "lowest", "highest"), [("zero", 5.0, 8.0), ("mean", 0.9, 1.1)])
def test_zero_second_moments_make_the_first_updates_large(policy: Any, lowest: float, highest: float) -> None:
    """A zero with a large step count has no bias correction left; the mean of old ones needs none."""
    model = tiny(num_hidden_layers=1)
    rate = 1e-4
    optimizer = AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(100_000.0),
            "exp_avg": torch.ones_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
    grow(model, WidenFFN(add=3), holders=[OptimizerHolder(optimizer, moments=policy)])
    weight = model.model.layers[0].mlp.gate_proj.weight
    peak = 0.0
    for _ in range(40):
        before = weight[20:].detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        peak = max(peak, ((before - weight[20:]).abs().max() / rate).item())
    assert lowest < peak < highest


# ---- what is refused -----------------------------------------------------------------------------


class Counting(SGD):
    """Keeps how often each entry moved, which nobody knows how to grow."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["moves"] = state.get("moves", torch.zeros_like(parameter)) + 1
        return super().step(closure)


class Factored(SGD):
    """Keeps a second moment per row, under the name of one per entry."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg_sq"] = parameter.grad.pow(2).mean(-1, keepdim=True)
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Counting(params, lr=0.1),
        lambda params: Factored(params, lr=0.1),
        lambda params: torch.optim.Rprop(params),
        lambda params: torch.optim.Adafactor(params),
    ],
    ids=["one's own", "per row", "Rprop", "Adafactor"],
)
def test_state_of_unknown_kind_is_refused_and_nothing_happened(make: Callable[[Any], Optimizer]) -> None:
    model = tiny()
    optimizer = make(model.parameters())
    train(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(GrowthError, match="how that grows is not known"):
        grow(model, *OPERATORS, optimizer=optimizer)
    assert everything(model, optimizer) == before
    train(model, optimizer, 1)


@pytest.mark.parametrize("operator", [WidenFFN(add=3), AddLayers(add=1)])
def test_an_optimizer_that_lacks_what_grows_is_refused(operator: Operator) -> None:
    model = tiny()
    optimizer = AdamW([p for name, p in model.named_parameters() if "down_proj" not in name])
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    with pytest.raises(GrowthError, match=r"does not train 'model\.layers\.\d\.mlp\.down_proj\.weight'"):
        grow(model, operator, optimizer=optimizer)
    assert everything(model, optimizer) == before


def test_a_frozen_parameter_need_not_be_in_the_optimizer() -> None:
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" not in name)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 1)
    grow(model, *OPERATORS, optimizer=optimizer)
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("down_proj" not in name)
        assert (id(parameter) in members) == parameter.requires_grad
