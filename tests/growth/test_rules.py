"""Rules and their manager: when this, then that, within limits, and the same after a restart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cambia.errors import CheckpointError, GrowthError
from cambia.growth import (
    AddLayers,
    GrowthEvent,
    GrowthManager,
    GrowthRule,
    Measured,
    PlateauTrigger,
    ScheduleTrigger,
    Signals,
    Trigger,
    WidenFFN,
)
from cambia.models.architectures import layer_ids
from cambia.training.checkpoint import load_model, load_state, save_checkpoint
from cambia.training.optim import AdamW, load_optimizer_state, optimizer_state
from tests.conftest import tiny
from tests.laws.examples import loss_of


@dataclass
class Always(Trigger):
    """Fires whenever it is asked."""

    asked: int = 0

    def update(self, signals: Signals) -> str | None:
        self.asked += 1
        return f"asked {self.asked} times"


def steps_of_events(manager: GrowthManager, steps: int) -> list[int]:
    return [event.step for step in range(1, steps + 1) for event in manager.step(Signals(step=step))]


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cooldown", "expected"), [(0, [1, 2, 3, 4, 5, 6, 7]), (2, [1, 4, 7]), (10, [1])])
def test_a_rule_rests_for_its_cooldown(cooldown: int, expected: list[int]) -> None:
    rule = GrowthRule(when=Always(), then=WidenFFN(add=1), cooldown_steps=cooldown)
    assert steps_of_events(GrowthManager([rule], model=tiny()), 7) == expected


def test_another_rules_growth_starts_the_cooldown_too() -> None:
    rules = [
        GrowthRule(when=ScheduleTrigger(at_steps=[3]), then=AddLayers(add=1)),
        GrowthRule(when=ScheduleTrigger(at_steps=[4]), then=WidenFFN(add=1), cooldown_steps=5),
    ]
    manager = GrowthManager(rules, model=tiny())
    assert steps_of_events(manager, 20) == [3, 9], "a mark that passes meanwhile is late, not lost"


def test_several_rules_may_act_at_one_step() -> None:
    model = tiny()
    rules = [
        GrowthRule(when=ScheduleTrigger(at_steps=[2]), then=AddLayers(add=1), cooldown_steps=10),
        GrowthRule(when=ScheduleTrigger(at_steps=[2]), then=WidenFFN(add=4), cooldown_steps=10),
    ]
    assert steps_of_events(GrowthManager(rules, model=model), 5) == [2, 2]
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (3, 24)


def test_a_rule_stops_after_its_last_event_and_is_not_asked_again() -> None:
    always = Always()
    manager = GrowthManager([GrowthRule(when=always, then=WidenFFN(add=1), max_events=2)], model=tiny())
    assert steps_of_events(manager, 6) == [1, 2]
    assert always.asked == 2
    none = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(add=1), max_events=0)], model=tiny())
    assert steps_of_events(none, 3) == []


def test_a_trigger_starts_afresh_after_its_growth() -> None:
    plateau = PlateauTrigger(patience=2)
    manager = GrowthManager([GrowthRule(when=plateau, then=WidenFFN(add=1))], model=tiny())
    events = []
    for step in range(1, 8):
        events += manager.step(Signals(step=step, values={"validation_loss": Measured(3.0, step)}))
    assert [event.step for event in events] == [3, 5, 7]
    assert events[0].reason == "plateau: validation_loss not below 3.0000 for 2 measurements"


def test_no_rules_is_no_growth() -> None:
    assert steps_of_events(GrowthManager(model=tiny()), 3) == []


# ---- what is recorded ----------------------------------------------------------------------------


def test_events_say_when_and_are_kept() -> None:
    model = tiny()
    manager = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(add=1), max_events=2)], model=model)
    (first,) = manager.step(Signals(step=7, tokens=70))
    (second,) = manager.step(Signals(step=8, tokens=80))
    assert [(e.step, e.tokens, e.reason) for e in manager.history] == [
        (7, 70, "asked 1 times"),
        (8, 80, "asked 2 times"),
    ]
    assert manager.history == [first, second]
    assert first.parameters_after == second.parameters_before


def test_each_growth_draws_other_weights() -> None:
    """Layers born at the same place one after the other must not be twins."""
    model = tiny()
    rule = GrowthRule(when=Always(), then=AddLayers(add=1, where="interpose", initial="random"), max_events=2)
    steps_of_events(GrowthManager([rule], model=model), 2)
    born = [model.model.layers[place] for place, i in enumerate(layer_ids(model.config)) if i >= 2]
    assert len(born) == 2
    assert not torch.equal(*(layer.self_attn.q_proj.weight for layer in born))


def test_an_illegal_growth_is_the_callers_to_see() -> None:
    model = tiny("llama")
    manager = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(layers=[0], add=1))], model=model)
    with pytest.raises(GrowthError, match="one FFN width for all layers"):
        manager.step(Signals(step=1))
    assert manager.history == []
    assert model.config.intermediate_size == 20


# ---- resuming ------------------------------------------------------------------------------------

STEPS = 12
LOSSES = [3.0, 2.5, 2.5, 2.5, 2.4, 2.4, 2.4, 2.4, 2.0, 2.0, 2.0, 2.0]


class Run:
    """A small training run with growth by schedule and by plateau, warm-ups and checkpoints."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.optimizer = AdamW(learning_rate=1e-2, kernel="loop").build(model)
        self.manager = GrowthManager(
            [
                GrowthRule(when=ScheduleTrigger(at_steps=[3, 9]), then=AddLayers(add=1), cooldown_steps=1),
                GrowthRule(
                    when=PlateauTrigger(patience=2), then=WidenFFN(add=3), cooldown_steps=1, max_events=1
                ),
            ],
            model=model,
            optimizer=self.optimizer,
            rewarm_steps=4,
        )

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            loss_of(self.model).backward()
            self.optimizer.step()
            values = {"validation_loss": Measured(LOSSES[step - 1], step)}
            self.manager.step(Signals(step=step, tokens=step * 39, values=values))

    def save(self, folder: Path) -> None:
        state = {
            "growth": self.manager.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model),
        }
        save_checkpoint(folder, model=self.model, state=state)
        lines = [json.dumps(event.as_dict()) for event in self.manager.history]
        (folder.parent / "growth.jsonl").write_text("\n".join(lines))

    @classmethod
    def resumed(cls, folder: Path) -> Run:
        run = cls(load_model(folder).train())
        state = load_state(folder)
        events = [
            GrowthEvent(**json.loads(line))
            for line in (folder.parent / "growth.jsonl").read_text().splitlines()
        ]
        load_optimizer_state(run.optimizer, run.model, state["optimizer"])
        run.manager.load_state_dict(state["growth"], events)
        return run


@pytest.fixture(scope="module")
def uninterrupted() -> Run:
    run = Run(tiny("cambia"))
    run.train(1, STEPS)
    assert [event.step for event in run.manager.history] == [3, 7, 9]
    return run


@pytest.mark.parametrize("killed_after", [2, 3, 6, 7, 8, 11])
def test_a_manager_goes_on_as_if_it_had_never_stopped(
    killed_after: int, uninterrupted: Run, tmp_path: Path
) -> None:
    first = Run(tiny("cambia"))
    first.train(1, killed_after)
    first.save(tmp_path / "latest")
    run = Run.resumed(tmp_path / "latest")
    run.train(killed_after + 1, STEPS)
    recorded = [[json.dumps(event.as_dict()) for event in r.manager.history] for r in (run, uninterrupted)]
    assert recorded[0] == recorded[1]
    shapes = [
        {**r.model.config.to_dict(), "_name_or_path": "", "architectures": []} for r in (run, uninterrupted)
    ]
    assert shapes[0] == shapes[1]
    expected = dict(uninterrupted.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    moments = optimizer_state(uninterrupted.optimizer, uninterrupted.model)
    for name, state in optimizer_state(run.optimizer, run.model).items():
        for key, value in state.items():
            assert torch.equal(value, moments[name][key]), (name, key)


def test_the_state_of_other_rules_is_refused() -> None:
    one = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(add=1))], model=tiny())
    two = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(add=1))] * 2, model=tiny())
    with pytest.raises(CheckpointError, match=r"holds 1 growth rules and 0 events, the run has 2 and 0"):
        two.load_state_dict(one.state_dict())
    steps_of_events(one, 1)
    with pytest.raises(CheckpointError, match=r"1 growth rules and 1 events, the run has 1 and 0"):
        one.load_state_dict(one.state_dict(), [])


def test_its_state_is_plain_values_where_nothing_warms_up() -> None:
    rules: list[Any] = [GrowthRule(when=PlateauTrigger(), then=WidenFFN(add=1))]
    manager = GrowthManager(rules, model=tiny())
    steps_of_events(manager, 3)
    assert json.loads(json.dumps(manager.state_dict())) == manager.state_dict()
