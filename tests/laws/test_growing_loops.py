"""Laws 1, 3, 5 over every trigger, every kind of rule and every optimizer, in a loop that grows.

A small model trains and grows. Every event is exact, the optimizer and the averaged weights own what the
model has, and a loop that is stopped at any step (in a window, a cooldown, a warm-up) and taken up from
what it saved ends with the same bits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from cambia.growth import (
    AddLayers,
    AllOf,
    AnyOf,
    EfficiencyTrigger,
    GradientNormTrigger,
    GrowthManager,
    GrowthRule,
    LossSpikeTrigger,
    Majority,
    NoveltyTrigger,
    Operator,
    PerplexityTrigger,
    PlateauTrigger,
    ScheduleTrigger,
    SliceSpikeTrigger,
    Trigger,
    WidenFFN,
)
from cambia.growth.triggers import TRIGGERS
from cambia.records import GrowthEvent
from cambia.training.averaging import WeightAverage
from cambia.training.muon import Muon
from cambia.training.optim import load_optimizer_state, optimizer_state
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, TOLERANCE, logits, loss_of, possible, relative_error, tokens

STEPS = 18

# Each fires in the middle of the loop on what the loop below measures.
EVERY_TRIGGER: dict[str, Callable[[], Trigger]] = {
    "schedule": lambda: ScheduleTrigger(at_steps=[5, 6, 15]),
    "efficiency": lambda: EfficiencyTrigger(advantage=1e-9),
    "plateau": lambda: PlateauTrigger(patience=2, min_improvement=9.0),
    "perplexity": lambda: PerplexityTrigger(patience=2, min_improvement=0.99),
    "gradient_norm": lambda: GradientNormTrigger(below=0.9999, above=1.0001, window_steps=3, settle_steps=2),
    "loss_spike": lambda: LossSpikeTrigger(metric="weather", window=4, patience=2, ratio=1.2),
    "slice_spike": lambda: SliceSpikeTrigger(slice="s", patience=2, window=2, ratio=1.2),
    "novelty": lambda: NoveltyTrigger(metric="validation_loss", threshold=0.01),
    "any": lambda: AnyOf([ScheduleTrigger(at_steps=[14]), PlateauTrigger(patience=3, min_improvement=9.0)]),
    "all": lambda: AllOf(
        [ScheduleTrigger(at_steps=[7, 14]), PlateauTrigger(patience=2, min_improvement=9.0)]
    ),
    "majority": lambda: Majority(
        [
            ScheduleTrigger(at_steps=[7, 13]),
            PlateauTrigger(patience=2, min_improvement=9.0),
            LossSpikeTrigger(metric="weather", window=99),
        ]
    ),
}
EVERY_RULE: dict[str, Callable[[], list[tuple[Operator, dict[str, Any]]]]] = {
    "factor, cooldown": lambda: [(WidenFFN(factor=1.4), {"cooldown_steps": 4})],
    "add, at most two": lambda: [(WidenFFN(add=3, layers="top", count=1), {"max_events": 2})],
    "to, re-armed": lambda: [(WidenFFN(to=25, initial="split"), {"rearm_steps": 3, "max_events": 1})],
    "layers": lambda: [(AddLayers(add=1), {"cooldown_steps": 5})],
    "layers that fade in, one while another does": lambda: [
        (AddLayers(add=1, fade_in=0.7), {"cooldown_steps": 2})
    ],
    "by gradient, and layers": lambda: [
        (WidenFFN(add=2, layers="gradient", count=1), {"cooldown_steps": 2}),
        (AddLayers(add=1, where="top", initial="random"), {"max_events": 1, "cooldown_steps": 2}),
    ],
}
EVERY_OPTIMIZER: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: AdamW(groups, lr=1e-2, foreach=False, fused=False),
    "adamw foreach": lambda groups: AdamW(groups, lr=1e-2, foreach=True),
    "adamw fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "sgd": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
    "muon": lambda groups: Muon([{**groups[0], "orthogonal": True}, *groups[1:]], lr=1e-2),
}


class Loop:
    """Somebody's training loop."""

    def __init__(self, model: PreTrainedModel, trigger: str, rule: str, optimizer: str):
        self.kinds = (trigger, rule, optimizer)
        self.model = model
        everything = list(model.parameters())
        self.optimizer = EVERY_OPTIMIZER[optimizer](
            [
                {"params": [p for p in everything if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in everything if p.dim() < 2], "weight_decay": 0.0},
            ]
        )
        self.average = WeightAverage(model, decay=0.8)
        self.manager = GrowthManager(
            [
                GrowthRule(when=EVERY_TRIGGER[trigger](), then=operator, **limits)
                for operator, limits in EVERY_RULE[rule]()
            ],
            model=model,
            optimizer=self.optimizer,
            holders=[self.average],
            rewarm_steps=4,
            newborn_rate=1.5,
            check_batch=tokens(model),
        )

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            loss = loss_of(self.model, tokens(self.model, seed=step))
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()
            self.optimizer.step()
            self.average.update()
            measured = {"weather": 1.0 + (step % 9 > 4)}
            if step % 2 == 0:
                measured |= {"validation_loss": 3.0, "slice_loss/s": 2.0 - (step < 6), "rest_loss/s": 1.0}
            told = loss.item() + 20 / step  # of random tokens nothing is learned, and this falls
            self.manager.step(loss=told, grad_norm=norm, tokens=48 * step, **measured)

    def taken_up(self) -> Loop:
        """Another loop that goes on from what this one would save."""
        state = copy.deepcopy(
            (
                optimizer_state(self.optimizer, self.model),
                self.average.state_dict(),
                self.manager.state_dict(),
                [json.dumps(event.as_dict()) for event in self.manager.history],
            )
        )
        other = Loop(copy.deepcopy(self.model), *self.kinds)
        load_optimizer_state(other.optimizer, other.model, state[0])
        other.average.load_state_dict(state[1])
        other.manager.load_state_dict(
            state[2], [GrowthEvent.from_dict(json.loads(line)) for line in state[3]]
        )
        return other


def test_no_trigger_is_left_out() -> None:
    assert EVERY_TRIGGER.keys() == TRIGGERS.keys()


CASES = [  # every trigger, rule and optimizer; every trigger with every optimizer is slow
    pytest.param(
        trigger,
        list(EVERY_RULE)[(i + j) % len(EVERY_RULE)],
        optimizer,
        marks=[pytest.mark.slow] if (i + i // len(EVERY_OPTIMIZER) - j) % len(EVERY_OPTIMIZER) else [],
    )
    for i, trigger in enumerate(EVERY_TRIGGER)
    for j, optimizer in enumerate(EVERY_OPTIMIZER)
]


@pytest.mark.parametrize(("trigger", "rule", "optimizer"), CASES)
def test_a_growing_loop_is_exact_and_can_be_taken_up_anywhere(
    trigger: str, rule: str, optimizer: str
) -> None:
    whole = Loop(tiny("cambia"), trigger, rule, optimizer)
    stopped = [Loop(tiny("cambia"), trigger, rule, optimizer)]
    whole.train(1, STEPS)
    events = whole.manager.history
    assert events and all(event.done for event in events)
    assert all(event.logit_error <= TOLERANCE[torch.float32] for event in events)
    owned = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in whole.model.parameters()}

    # Stopped right after the first growth (in its cooldown and warm-up), and halfway to it (in a window).
    born = events[0].step
    for step in sorted({max(1, born // 2), born, born + 1, born + 3}):
        stopped[-1].train(stopped[-1].manager._steps + 1, step)
        stopped.append(stopped[-1].taken_up())
    resumed = stopped[-1]
    resumed.train(resumed.manager._steps + 1, STEPS)
    assert [(e.step, e.reason) for e in resumed.manager.history] == [(e.step, e.reason) for e in events]
    expected = dict(whole.model.named_parameters())
    averages = whole.average.state_dict()
    assert resumed.average.state_dict().keys() == averages.keys() == expected.keys()
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert torch.equal(resumed.average.state_dict()[name], averages[name]), name


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_averaged_model_grows_as_exactly_as_the_model(family: str, rule: str) -> None:
    model = tiny(family)
    average = WeightAverage(model, decay=0.5)
    optimizer = SGD(model.parameters(), lr=0.5)
    loss_of(model).backward()
    optimizer.step()
    average.update()
    operators = possible(family, [operator for operator, _ in EVERY_RULE[rule]()])
    for operator in operators:
        manager = GrowthManager(
            [GrowthRule(when=ScheduleTrigger(at_steps=[1]), then=operator)],
            model=model,
            optimizer=optimizer,
            holders=[average],
        )
        trained = logits(model)
        with average.applied():
            before = logits(model)
        assert relative_error(before, trained) > 1e-3, "the average must differ from what it follows"
        manager.step()
        with average.applied():
            assert relative_error(logits(model), before) <= TOLERANCE[torch.float32]
        assert relative_error(logits(model), trained) <= TOLERANCE[torch.float32]
    assert all(math.isfinite(value.sum().item()) for value in average.state_dict().values())
