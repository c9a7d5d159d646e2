"""Triggers: when, and only then."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import build, dump
from cambia.errors import ConfigError
from cambia.growth import (
    TRIGGERS,
    GrowthRule,
    Measured,
    PlateauTrigger,
    ScheduleTrigger,
    Signals,
    Trigger,
    WidenFFN,
)


def at(step: int, **known: Any) -> Signals:
    return Signals(step=step, **known)


def measured(
    step: int, loss: float, *, taken_at: int | None = None, name: str = "validation_loss"
) -> Signals:
    return Signals(step=step, values={name: Measured(loss, step if taken_at is None else taken_at)})


def through_json(trigger: Trigger, fresh: Trigger) -> Trigger:
    fresh.load_state_dict(json.loads(json.dumps(trigger.state_dict(), allow_nan=False)))
    return fresh


# ---- schedule ------------------------------------------------------------------------------------


def test_a_schedule_fires_once_at_each_mark() -> None:
    trigger = ScheduleTrigger(at_steps=[3, 5])
    reasons = [trigger.update(at(step)) for step in range(1, 8)]
    assert reasons == [None, None, "schedule: 3 steps reached", None, "schedule: 5 steps reached", None, None]


@pytest.mark.parametrize(
    ("settings", "signals", "told"),
    [
        ({"at_steps": [2]}, at(2), "2 steps"),
        ({"at_tokens": [100]}, at(1, tokens=130), "100 tokens"),
        ({"at_fractions": [0.5]}, at(1, progress=0.5), "0.5 of the run"),
    ],
)
def test_marks_may_be_steps_tokens_or_shares(settings: Any, signals: Signals, told: str) -> None:
    trigger = ScheduleTrigger(**settings)
    assert trigger.update(at(1, tokens=99, progress=0.49)) is None
    assert told in (trigger.update(signals) or "")
    assert trigger.update(signals) is None


@pytest.mark.parametrize("marks", [[10, 20, 30], [30, 10, 20]])
def test_marks_that_pass_together_fire_once(marks: list[int]) -> None:
    """A large batch passes two marks of tokens: the model grows once, not twice at one step."""
    trigger = ScheduleTrigger(at_tokens=marks)
    assert trigger.update(at(1, tokens=25)) == "schedule: 20 tokens reached"
    assert trigger.update(at(2, tokens=29)) is None
    assert trigger.update(at(3, tokens=30)) == "schedule: 30 tokens reached"


@given(
    marks=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    cut=st.integers(0, 20),
)
def test_a_schedule_resumes_as_if_nothing_had_happened(marks: list[int], steps: list[int], cut: int) -> None:
    trigger, again = ScheduleTrigger(at_tokens=marks), ScheduleTrigger(at_tokens=marks)
    tokens, fired = 0, 0
    for i, more in enumerate(steps):
        if i == cut:
            again = through_json(again, ScheduleTrigger(at_tokens=marks))
        tokens += more
        reason = trigger.update(at(i, tokens=tokens))
        assert again.update(at(i, tokens=tokens)) == reason
        behind = sum(mark <= tokens for mark in marks)
        assert (reason is not None) == (behind > fired)
        fired = behind


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "exactly one of at_steps, at_tokens and at_fractions"),
        ({"at_steps": []}, "exactly one"),
        ({"at_steps": [1], "at_tokens": [1]}, "exactly one"),
        ({"at_fractions": [0.5, 1.5]}, "must lie between 0 and 1"),
        ({"at_fractions": [0.0]}, "must lie between 0 and 1"),
    ],
)
def test_schedules_that_say_too_much_or_too_little_are_refused(settings: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ScheduleTrigger(**settings)


# ---- plateau -------------------------------------------------------------------------------------


def fired(trigger: Trigger, losses: list[float]) -> list[int]:
    """Measurements, counted from 1, at which it fires and is then reset."""
    found = []
    for i, loss in enumerate(losses, start=1):
        if trigger.update(measured(i, loss)):
            found.append(i)
            trigger.reset()
    return found


def test_a_plateau_is_patience_measurements_without_improvement() -> None:
    trigger = PlateauTrigger(patience=3, min_improvement=0.1)
    assert fired(trigger, [5.0, 4.0, 3.95, 3.95, 3.95, 3.95, 3.95, 3.95, 3.8, 3.75, 3.75, 3.75]) == [5, 8, 12]


def test_falling_losses_are_no_plateau() -> None:
    assert fired(PlateauTrigger(patience=1, min_improvement=0.1), [5.0, 4.9, 4.8, 4.7]) == []
    assert fired(PlateauTrigger(patience=1, min_improvement=0.1), [5.0, 4.95]) == [2]
    slow = [5.0 - 0.04 * i for i in range(10)]
    assert fired(PlateauTrigger(patience=3, min_improvement=0.1), slow) == [], "small steps add up"


def test_after_growth_the_old_best_must_be_beaten() -> None:
    trigger = PlateauTrigger(patience=2, min_improvement=0.0)
    assert fired(trigger, [3.0, 3.5, 3.5]) == [3]
    assert trigger.best == 3.0
    assert fired(trigger, [3.4, 3.3]) == [2]


def test_only_fresh_measurements_count() -> None:
    trigger = PlateauTrigger(patience=2)
    assert trigger.update(measured(10, 3.0)) is None
    for step in range(11, 20):
        assert trigger.update(measured(step, 3.0, taken_at=10)) is None
        assert trigger.update(at(step, loss=3.0)) is None
    assert trigger.waited == 0
    assert trigger.update(measured(20, 3.0)) is None
    assert trigger.update(measured(30, 3.0)) == "plateau: validation_loss not below 3.0000 for 2 measurements"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_ignored(value: float) -> None:
    trigger = PlateauTrigger(patience=2)
    for step, loss in enumerate([value, 3.0, value, 3.0, value], start=1):
        assert trigger.update(measured(step, loss)) is None
    assert (trigger.best, trigger.waited) == (3.0, 1)
    assert trigger.update(measured(6, 3.0))


def test_any_measurement_can_be_watched() -> None:
    trigger = PlateauTrigger(patience=1, metric="slice_loss/python")
    assert trigger.update(measured(1, 1.0)) is None
    assert trigger.update(measured(1, 1.0, name="slice_loss/python")) is None
    assert "slice_loss/python" in (trigger.update(measured(2, 1.0, name="slice_loss/python")) or "")


@given(losses=st.lists(st.floats(0, 10) | st.just(math.nan), max_size=30), cut=st.integers(0, 30))
def test_a_plateau_resumes_as_if_nothing_had_happened(losses: list[float], cut: int) -> None:
    def make() -> PlateauTrigger:
        return PlateauTrigger(patience=2, min_improvement=0.5)

    whole, first = make(), make()
    expected = fired(whole, losses)
    before = fired(first, losses[:cut])
    after = fired(through_json(first, make()), losses[cut:])
    assert expected == before + [cut + i for i in after]


def test_patience_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="patience=0 must be at least 1 measurement"):
        PlateauTrigger(patience=0)
    with pytest.raises(ConfigError, match=r"when\.patience"):
        build(
            GrowthRule, {"when": {"type": "plateau", "patience": 0}, "then": {"type": "widen_ffn", "add": 1}}
        )


# ---- one's own, and configuration ----------------------------------------------------------------


OWN_TRIGGER = """
from cambia.growth import Trigger

class Bored(Trigger):
    def update(self, signals):
        return "bored" if signals.step % 10 == 0 else None
"""
OWN_TRIGGER_WITH_FIELDS = """
from dataclasses import dataclass, field
from cambia.growth import Trigger

@dataclass
class Every(Trigger):
    steps: int = 10
    count: int = field(default=0, init=False)

    def update(self, signals):
        self.count += signals.step % self.steps == 0
        return f"the {self.count}th time" if signals.step % self.steps == 0 else None
"""


def rule(when: Any) -> GrowthRule:
    return build(GrowthRule, {"when": when, "then": {"type": "widen_ffn", "add": 1}})


def test_a_trigger_of_ones_own_is_named_by_its_module(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "my_triggers.py").write_text(OWN_TRIGGER)
    monkeypatch.syspath_prepend(tmp_path)
    built = rule("my_triggers:Bored")
    assert [built.when.update(at(step)) for step in (9, 10)] == [None, "bored"]
    assert built.when.state_dict() == {}
    assert dump(built)["when"] == {"type": "my_triggers:Bored"}
    assert build(GrowthRule, dump(built)).when.update(at(20)) == "bored"


def test_its_fields_are_its_settings_and_its_state(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "my_counting_triggers.py").write_text(OWN_TRIGGER_WITH_FIELDS)
    monkeypatch.syspath_prepend(tmp_path)
    built = rule({"type": "my_counting_triggers:Every", "steps": 5})
    assert [built.when.update(at(step)) for step in (4, 5)] == [None, "the 1th time"]
    assert dump(built)["when"] == {"type": "my_counting_triggers:Every", "steps": 5}
    again = through_json(built.when, rule({"type": "my_counting_triggers:Every", "steps": 5}).when)
    assert again.update(at(10)) == "the 2th time"
    with pytest.raises(ConfigError, match=r"when\.step.*did you mean 'steps'"):
        rule({"type": "my_counting_triggers:Every", "step": 5})


@pytest.mark.parametrize(
    "trigger",
    [ScheduleTrigger(at_fractions=[0.2, 0.5]), ScheduleTrigger(at_steps=[3]), PlateauTrigger(patience=7)],
)
def test_a_rule_survives_its_own_configuration(trigger: Trigger) -> None:
    before = GrowthRule(when=trigger, then=WidenFFN(factor=1.3), cooldown_steps=50, max_events=2)
    assert build(GrowthRule, json.loads(json.dumps(dump(before)))) == before


@pytest.mark.parametrize(
    ("old", "ours"),
    [("window_steps", "patience"), ("eps", "min_improvement"), ("threshold", "min_improvement")],
)
def test_old_spellings_are_refused_with_ours_named(old: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"{old}.* is called '{ours}' here"):
        rule({"type": "plateau", old: 1})


def test_an_unknown_trigger_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"when\.type: 'platteau' is no trigger; did you mean 'plateau'"):
        rule({"type": "platteau"})
    with pytest.raises(ConfigError, match=f"picks the trigger: {', '.join(TRIGGERS)}"):
        rule({"patience": 3})
