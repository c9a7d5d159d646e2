"""Growth happens as a whole or not at all: it is broken at every stage, and nothing is left of it.

Every function that the barrier calls on its way is made to raise: before its first call, in the middle of its
calls, and after its last. How often it is called is counted on a twin, so that no stage is left out. After
each failure everything is compared by identity and by bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cambia.growth import (
    AddLayers,
    Operator,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    barrier,
    carry,
    grow,
    plan,
    plan_growth,
)
from cambia.growth.carry import Commit, Undo
from cambia.models.architectures import ARCHITECTURES
from cambia.nn.param_map import Lineage
from tests.conftest import tiny
from tests.laws.examples import EVERY, everything, final_norm, logits, loss_of, once, possible

HERE = ("cambia", "qwen3", "gpt2")
"""A family of each kind: uneven layers, normalised queries, a LayerNorm with learned positions."""


class Averages:
    """A holder that stands before the optimizer: it has prepared already when that fails."""

    def __init__(self) -> None:
        self.is_committed = False

    def prepare(self, changes: Any) -> Commit:
        self.prepared = [c.lineage.carry(c.old.detach(), power=1) for c in changes if c.old is not None]
        return self.commit

    def commit(self, undo: Undo) -> None:
        undo.callback(setattr, self, "is_committed", self.is_committed)
        self.is_committed = True


class Broken(BaseException):
    """What nobody catches by accident."""


@dataclass
class Stage:
    """One of the things that the barrier does."""

    owner: Any
    name: str
    replans: bool = False
    """Whether it is part of planning; for the others the plan is made once."""
    calls: int = 0
    """How often it is called in one growth."""

    def places(self) -> list[tuple[int, bool]]:
        """Where to break: which call, and whether it has done its work by then."""
        if self.calls < 2:
            return [(1, True)] * self.calls
        return sorted({(1, False), (self.calls // 2 + 1, True), (self.calls, True)})


def stages(model: PreTrainedModel) -> list[Stage]:
    """What the barrier does, in its order."""
    return [
        Stage(plan, "_checked", replans=True),
        Stage(plan, "_weakest", replans=True),
        Stage(barrier, "plan_growth"),
        Stage(barrier, "logits_of"),  # before the swap and after it
        Stage(type(final_norm(model)), "forward"),  # in the middle of either
        Stage(Lineage, "values"),  # a tensor
        Stage(barrier, "_changes"),
        Stage(Averages, "prepare"),
        Stage(carry.OptimizerHolder, "_check"),
        Stage(carry.OptimizerHolder, "prepare"),
        Stage(barrier, "_settings_by_module"),
        Stage(barrier, "_empty_copy"),  # a new layer
        Stage(barrier, "resize_layers"),
        Stage(barrier, "_replace_dict"),  # the config
        Stage(barrier, "_fill"),
        Stage(barrier, "let_go"),  # an old tensor
        Stage(type(model), "tie_weights"),
        Stage(barrier, "_tables_anew"),
        Stage(barrier, "_set_submodule"),  # a table
        Stage(barrier, "swap"),
        Stage(barrier, "relative_error"),
        Stage(Averages, "commit"),
        Stage(carry.OptimizerHolder, "_exchange"),  # a parameter's moments
        Stage(carry, "let_go"),  # an old moment
        Stage(carry.OptimizerHolder, "_commit"),
        Stage(barrier, "in_model_order"),
    ]


@contextlib.contextmanager
def watched(
    patch: pytest.MonkeyPatch, stage: Stage, live: PreTrainedModel, place: tuple[int, bool] | None = None
) -> Iterator[list[int]]:
    """Count the calls of a stage, and break one of them. Calls on models other than `live` do not count."""
    original, calls = getattr(stage.owner, stage.name), [0]
    mine = {id(module) for module in live.modules()}

    def counting(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module) and id(args[0]) not in mine:
            return original(*args, **kwargs)
        calls[0] += 1
        if place == (calls[0], False):
            raise Broken
        result = original(*args, **kwargs)
        if place == (calls[0], True):
            raise Broken
        return result

    with patch.context() as patched:
        patched.setattr(stage.owner, stage.name, counting)
        yield calls


def trained(model: PreTrainedModel) -> tuple[PreTrainedModel, Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    train(model, optimizer)
    return model, optimizer


def train(model: PreTrainedModel, optimizer: Optimizer) -> Tensor:
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return logits(model)


def attempt(model: PreTrainedModel, optimizer: Optimizer, operators: tuple[Operator, ...]) -> None:
    holder = Averages()
    try:
        grow(model, *operators, optimizer=optimizer, holders=[holder])
    except Broken:
        assert not holder.is_committed
        raise


def cases(family: str) -> list[tuple[int, tuple[Operator, ...]]]:
    """Every operator in one form on one layer, and an event of several on two."""
    kinds = once(possible(family, EVERY))
    wide = WidenHeadDim() if ARCHITECTURES[family].head_dim_apart else WidenHidden(factor=2)
    several = (wide, AddLayers(add=2), WidenFFN(add=3))
    return [(1, (operator,)) for operator in kinds] + [(2, several)]


CASES = [  # operators one by one are slow where another family has them, and so is more than one in gpt2
    pytest.param(
        family,
        depth,
        operators,
        id=f"{family}-{' '.join(type(o).__name__ for o in operators)}",
        marks=[pytest.mark.slow] if family == "gpt2" else [],
    )
    for family in HERE
    for depth, operators in cases(family)
]


@pytest.mark.parametrize(("family", "depth", "operators"), CASES)
def test_a_growth_that_breaks_anywhere_leaves_no_trace(
    family: str, depth: int, operators: tuple[Operator, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(tiny(family, num_hidden_layers=depth))
    twin, others = trained(tiny(family, num_hidden_layers=depth))
    counted, counteds = trained(tiny(family, num_hidden_layers=depth))
    everywhere = stages(counted)
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(watched(monkeypatch, stage, counted)) for stage in everywhere]
        attempt(counted, counteds, operators)
    for stage, (calls,) in zip(everywhere, watches, strict=True):
        stage.calls = calls
    missed = {stage.name for stage in everywhere if not stage.calls}
    inside = {"_check", "_exchange", "let_go"}  # where nothing old grows
    assert missed <= {*inside, "_empty_copy", "resize_layers", "_set_submodule"}
    assert not missed or family != "qwen3" or depth == 1, "the event of several takes every way"

    before = everything(model, optimizer)
    made = plan_growth(model, *operators)
    for stage in everywhere:
        for place in stage.places():
            with monkeypatch.context() as patched, pytest.raises(Broken):
                if not stage.replans:
                    patched.setattr(barrier, "plan_growth", lambda *_, **__: made)
                with watched(monkeypatch, stage, model, place):
                    attempt(model, optimizer, operators)
                    raise AssertionError(f"{stage.name}, {place} of {stage.calls}, was not reached")
            assert everything(model, optimizer) == before, (stage.name, place)
    # Training goes on as if nothing had been, and so does growing.
    assert torch.equal(train(model, optimizer), train(twin, others))
    attempt(model, optimizer, operators)
    attempt(twin, others, operators)
    assert torch.equal(train(model, optimizer), train(twin, others))


@pytest.mark.parametrize("place", [(1, False), (2, True)])
def test_a_growth_that_cannot_be_recorded_leaves_no_trace(
    place: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses for the record take memory too."""
    model, optimizer = trained(tiny())
    before = everything(model, optimizer)
    with watched(monkeypatch, Stage(barrier, "check_loss"), model, place), pytest.raises(Broken):
        grow(model, AddLayers(add=1), WidenFFN(add=3), optimizer=optimizer)
    assert everything(model, optimizer) == before
