"""Rules and their manager: when this, then that, within limits, and the same after a restart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cambia.errors import CheckpointError, ConfigError, GrowthError
from cambia.growth import (
    AddLayers,
    Budget,
    EfficiencyTrigger,
    GrowthEvent,
    GrowthManager,
    GrowthPlan,
    GrowthRule,
    Measured,
    PlateauTrigger,
    ScheduleTrigger,
    Signals,
    Trigger,
    WidenFFN,
    plan_growth,
)
from cambia.models.architectures import layer_ids
from cambia.models.saved import load_model
from cambia.training.checkpoint import load_state, save_checkpoint
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


@dataclass
class AtSteps(Trigger):
    """Fires at these steps, each time that it is asked."""

    steps: list[int]

    def update(self, signals: Signals) -> str | None:
        return "now" if signals.step in self.steps else None


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


def test_a_rule_that_is_switched_off_is_not_asked() -> None:
    always = Always()
    manager = GrowthManager([GrowthRule(when=always, then=WidenFFN(add=1), enabled=False)], model=tiny())
    assert steps_of_events(manager, 3) == []
    assert always.asked == 0


def test_a_rule_is_armed_again_once_its_trigger_was_silent() -> None:
    rule = GrowthRule(when=AtSteps([2, 3, 5, 6, 12, 13]), then=WidenFFN(add=1), rearm_steps=3)
    assert steps_of_events(GrowthManager([rule], model=tiny()), 20) == [2, 12]


# ---- budgets, approval, dry run -------------------------------------------------------------------


def test_a_growth_beyond_the_budget_is_recorded_once_and_left_undone() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = sum(p.numel() for p in before.values())
    rule = GrowthRule(when=Always(), then=WidenFFN(add=1))
    manager = GrowthManager([rule], model=model, budget=Budget(parameters=size + 200))
    events = [event for step in range(1, 6) for event in manager.step(Signals(step=step))]
    # 2 layers x 3 matrices x 24: one unit more is 144 parameters
    assert [event.done for event in events] == [True, False]
    assert f"not done: {size + 288:,} parameters, the budget is {size + 200:,}" in events[1].reason
    assert model.config.intermediate_size == 21
    assert manager.history == events


@pytest.mark.parametrize("limit", ["parameters", "flops_per_token", "memory_mib"])
def test_every_budget_limits_and_is_refused_when_exceeded_already(limit: str) -> None:
    model = tiny()
    plan = plan_growth(model, WidenFFN(add=8))
    sizes = {
        "parameters": (plan.parameters_before, plan.parameters_after),
        "flops_per_token": (plan.flops_per_token_before, plan.flops_per_token_after),
        "memory_mib": tuple(16 * n / 2**20 for n in (plan.parameters_before, plan.parameters_after)),
    }
    now, then = sizes[limit]
    rule = GrowthRule(when=Always(), then=WidenFFN(add=8))

    def first(budget: Budget) -> GrowthEvent:
        (event,) = GrowthManager([rule], model=tiny(), budget=budget).step(Signals(step=1))
        return event

    def at(value: float) -> Budget:
        return Budget(**{limit: type(now)(value)})

    assert first(at(then)).done
    assert not first(at((now + then) / 2)).done
    with pytest.raises(ConfigError, match="beyond the budget before it has grown"):
        GrowthManager([rule], model=model, budget=at(now * 0.9)).check()


def test_who_approves_sees_the_plan_and_the_reason() -> None:
    asked = []

    def approve(plan: GrowthPlan, reason: str) -> bool:
        asked.append((plan.parameters_after - plan.parameters_before, reason))
        return len(asked) > 1

    model = tiny()
    manager = GrowthManager([GrowthRule(when=Always(), then=WidenFFN(add=1))], model=model, approve=approve)
    (declined,), (done,) = (manager.step(Signals(step=step)) for step in (1, 2))
    assert (declined.done, declined.reason) == (False, "asked 1 times; not done: not approved")
    assert done.done and model.config.intermediate_size == 21
    assert asked == [(144, "asked 1 times"), (144, "asked 2 times")]


def test_a_dry_run_records_the_same_events_and_grows_nothing() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = GrowthRule(when=Always(), then=AddLayers(add=1), cooldown_steps=2, max_events=3)
    manager = GrowthManager([rule], model=model, dry_run=True)
    assert steps_of_events(manager, 20) == [1, 4, 7]
    assert all(not event.done and event.reason.endswith("not done: dry run") for event in manager.history)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- named values instead of signals --------------------------------------------------------------


def test_named_values_become_signals() -> None:
    seen: list[Signals] = []

    class Looking(Trigger):
        def update(self, signals: Signals) -> str | None:
            seen.append(signals)
            return None

    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    manager = GrowthManager(
        [GrowthRule(when=Looking(), then=WidenFFN(add=1))], model=model, optimizer=optimizer
    )
    manager.step(loss=2.0, grad_norm=0.5, validation_loss=None)
    manager.step(loss=1.5, tokens=64, validation_loss=1.75, mood=3.0)
    first, second = seen
    assert (first.step, first.loss, first.grad_norm, first.learning_rate) == (1, 2.0, 0.5, 0.25)
    assert first.values == {}
    assert (second.step, second.tokens, second.fresh("validation_loss")) == (2, 64, 1.75)
    assert second.values["mood"] == Measured(3.0, 2)
    manager.step(step=10, loss=1.0)
    assert seen[-1].step == 10
    with pytest.raises(ConfigError, match="signals or named values, not both: loss"):
        manager.step(Signals(step=4), loss=1.0)


def test_a_loop_of_ones_own_is_told_what_its_schedule_reads() -> None:
    schedules = {"progress": ScheduleTrigger(at_fractions=[0.5]), "tokens": ScheduleTrigger(at_tokens=[9])}
    for name, schedule in schedules.items():
        manager = GrowthManager([GrowthRule(when=schedule, then=WidenFFN(add=4))], model=tiny())
        with pytest.raises(ConfigError, match=rf"manager.step\({name}=...\)"):
            manager.step(loss=1.0)
        assert len(manager.step(**{name: 10})) == 1


def test_where_another_rule_has_done_it_there_is_nothing_to_weigh() -> None:
    rules = [
        GrowthRule(when=ScheduleTrigger(at_steps=[1]), then=AddLayers(to=4)),
        GrowthRule(when=EfficiencyTrigger(), then=AddLayers(to=4)),
    ]
    manager = GrowthManager(rules, model=tiny())
    assert [len(manager.step(loss=3.0, tokens=100 * n)) for n in range(1, 5)] == [1, 0, 0, 0]


def test_a_loop_of_ones_own_grows_by_named_values() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    rule = GrowthRule(when=PlateauTrigger(patience=2, metric="loss"), then=WidenFFN(add=1), max_events=1)
    manager = GrowthManager([rule], model=model, optimizer=optimizer)
    assert [len(manager.step(loss=3.0)) for _ in range(4)] == [0, 0, 1, 0]


# ---- refused before training ----------------------------------------------------------------------


def test_what_cannot_work_later_is_refused_at_once() -> None:
    def manager(*operators: Any, **settings: Any) -> GrowthManager:
        rules = [GrowthRule(when=PlateauTrigger(), then=operator) for operator in operators]
        return GrowthManager(rules, model=tiny("cambia"), **settings)

    for never in (WidenFFN(to=10), WidenFFN(add=1, layers=[7])):
        with pytest.raises(GrowthError):
            manager(never).step(Signals(step=1))
    manager(WidenFFN(add=1, layers=[2]), AddLayers(add=1)).check()
    with pytest.raises(GrowthError, match="trains no parameter of this model"):
        manager(WidenFFN(add=1), optimizer=torch.optim.SGD(tiny("cambia").parameters(), lr=0.1)).check()
    with pytest.raises(ConfigError, match=r"PlateauTrigger reads 'validation_loss', which nothing measures"):
        manager(WidenFFN(add=1)).check({"loss", "grad_norm"})
    manager(WidenFFN(add=1)).check({"loss", "validation_loss"})


# ---- what is recorded ----------------------------------------------------------------------------


def test_a_size_that_is_reached_is_reached_once() -> None:
    rule = GrowthRule(when=Always(), then=WidenFFN(to=25))
    manager = GrowthManager([rule], model=tiny())
    assert steps_of_events(manager, 4) == [1]
    with pytest.raises(ConfigError, match=r"max_events=2 contradicts to= of WidenFFN"):
        GrowthRule(when=Always(), then=WidenFFN(to=25), max_events=2)


def test_rules_may_be_written_in_any_order() -> None:
    """Legal as the model is, legal once another rule has acted, or refused before training."""
    late, soon = ScheduleTrigger(at_steps=[2]), ScheduleTrigger(at_steps=[1])
    rules = [GrowthRule(when=late, then=WidenFFN(to=40)), GrowthRule(when=soon, then=WidenFFN(to=25))]
    model = tiny()
    assert steps_of_events(GrowthManager(rules, model=model), 3) == [1, 2]
    assert model.config.intermediate_size == 40
    with pytest.raises(GrowthError, match=r"25"):
        GrowthManager([GrowthRule(when=soon, then=WidenFFN(to=25))], model=model).check()


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
