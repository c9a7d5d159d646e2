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
    AllOf,
    AnyOf,
    EfficiencyTrigger,
    GradientNormTrigger,
    GrowthRule,
    LossSpikeTrigger,
    Majority,
    Measured,
    NoveltyTrigger,
    PerplexityTrigger,
    PlateauTrigger,
    ScheduleTrigger,
    Signals,
    SliceSpikeTrigger,
    Trigger,
    WidenFFN,
)
from cambia.growth.triggers import Planned


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


def test_a_window_compares_means() -> None:
    noisy = [3.0, 3.2, 2.8, 3.1, 2.9, 3.0, 3.0, 3.1]
    assert fired(PlateauTrigger(patience=1, min_improvement=0.05, window=4), noisy) == [8]
    falling = [4.0, 4.2, 3.6, 3.8, 3.3, 3.5, 3.0, 3.2]
    assert fired(PlateauTrigger(patience=1, min_improvement=0.05, window=2), falling) == []
    whole = PlateauTrigger(patience=2, min_improvement=0.05, window=2)
    assert fired(whole, [3.0] * 10) == [5, 10], "after growth both windows fill again"
    with pytest.raises(ConfigError, match="window=0 must be at least 1"):
        PlateauTrigger(window=0)


# ---- perplexity ----------------------------------------------------------------------------------


def test_perplexity_must_fall_by_a_share_of_itself() -> None:
    trigger = PerplexityTrigger(min_improvement=0.1, patience=2)
    perplexities = [100.0, 89.0, 79.0, 75.0, 72.0, 70.0, 66.0]
    assert fired(trigger, [math.log(p) for p in perplexities]) == [5]
    assert trigger.best == pytest.approx(math.log(70.0)), "from 79 to 70 is a tenth again"
    whole = PerplexityTrigger(min_improvement=0.1, patience=1)
    assert "not 10 % below 100 for 1 measurements" in (
        whole.update(measured(1, math.log(100))) or whole.update(measured(2, math.log(95))) or ""
    )


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 3.0])
def test_a_share_of_perplexity_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match=r"min_improvement=.* is a share"):
        PerplexityTrigger(min_improvement=share)


# ---- gradient norm -------------------------------------------------------------------------------


def norms(trigger: Trigger, values: list[float]) -> list[int]:
    return [i for i, norm in enumerate(values, start=1) if trigger.update(at(i, grad_norm=norm))]


def test_a_gradient_norm_is_compared_with_the_first_window() -> None:
    def trigger() -> GradientNormTrigger:
        return GradientNormTrigger(below=0.5, above=2.0, window_steps=4, settle_steps=2)

    settling, steady = [50.0, 50.0], [1.0, 1.2, 0.8, 1.0]
    assert norms(trigger(), [*settling, *steady, 0.9, 1.1, 1.0, 1.0]) == []
    assert norms(trigger(), [*settling, *steady, 0.4, 0.4, 0.3, 0.4]) == [10]
    assert norms(trigger(), [*settling, *steady, 3.0, 3.0, 3.0, 3.0]) == [10]
    assert norms(trigger(), [*settling, *steady, 99.0, 1.0, 1.0, 1.0, 99.0]) == [], "bursts do not count"


def test_after_growth_it_settles_and_compares_anew() -> None:
    trigger = GradientNormTrigger(below=0.5, window_steps=2, settle_steps=1)
    assert norms(trigger, [9.0, 1.0, 1.0, 0.1, 0.1]) == [5]
    trigger.reset()
    assert norms(trigger, [9.0, 0.1, 0.1, 0.1, 0.1]) == []


def test_plain_norms_need_no_first_window() -> None:
    trigger = GradientNormTrigger(below=1e-3, window_steps=2, settle_steps=0, relative=False)
    assert norms(trigger, [1.0, 1e-4, 1e-4]) == [3]


def test_steps_without_a_norm_are_left_out() -> None:
    trigger = GradientNormTrigger(above=2.0, window_steps=2, settle_steps=0, relative=False)
    for step, norm in enumerate([3.0, None, math.nan, math.inf], start=1):
        assert trigger.update(at(step, grad_norm=norm)) is None
    assert trigger.update(at(5, grad_norm=3.0)) is not None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "below=, above= or both"),
        ({"below": 2.0, "above": 1.5, "relative": False}, "must be lower than above"),
        ({"below": 1.5}, "below= is less than 1"),
        ({"above": 0.5}, "above= more than 1"),
    ],
)
def test_gradient_norms_that_say_too_little_are_refused(settings: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        GradientNormTrigger(**settings)


# ---- spikes --------------------------------------------------------------------------------------


def losses(trigger: Trigger, values: list[float]) -> list[int]:
    return [i for i, loss in enumerate(values, start=1) if trigger.update(at(i, loss=loss))]


def test_a_loss_spike_is_a_shift_and_not_a_burst() -> None:
    def trigger() -> LossSpikeTrigger:
        return LossSpikeTrigger(ratio=1.2, window=6, patience=3)

    assert losses(trigger(), [2.0] * 12) == []
    assert losses(trigger(), [2.0] * 9 + [9.0] + [2.0] * 9) == []
    assert losses(trigger(), [2.0] * 9 + [3.0, 3.0]) == [11], "two of three are the median"
    assert losses(trigger(), [3.0 - 0.01 * i for i in range(40)]) == []


def test_a_loss_spike_watches_any_measurement() -> None:
    trigger = LossSpikeTrigger(window=2, patience=1, metric="validation_loss")
    said = [trigger.update(measured(i, value)) for i, value in enumerate([2.0, 2.0, 2.0, 4.0], start=1)]
    assert said == [
        None,
        None,
        None,
        "loss spike: median validation_loss of 1 is 4.0000, before it was 2.0000",
    ]


def slice_told(trigger: Trigger, losses: list[tuple[float, float]]) -> list[str | None]:
    said = []
    for step, (inside, rest) in enumerate(losses, start=1):
        values = {"slice_loss/long": Measured(inside, step), "rest_loss/long": Measured(rest, step)}
        said.append(trigger.update(Signals(step=step, values=values)))
    return said


def test_a_slice_is_compared_with_the_rest() -> None:
    trigger = SliceSpikeTrigger(slice="long", ratio=1.5, patience=3, relative=False)
    said = slice_told(trigger, [(2.0, 1.0), (1.4, 1.0), (1.4, 1.0), (2.0, 1.0), (4.2, 2.0)])
    assert said == [None] * 4 + ["slice spike: loss on long is 2.00 times that on the rest"]
    assert trigger.needs == {"slice_loss/long", "rest_loss/long"}


def test_a_slice_that_was_always_hard_is_no_spike() -> None:
    def trigger() -> Trigger:
        return SliceSpikeTrigger(slice="long", ratio=1.2, patience=2, window=3)

    assert slice_told(trigger(), [(4.0 - 0.1 * i, 2.0 - 0.05 * i) for i in range(20)]) == [None] * 20
    said = slice_told(trigger(), [(4.0, 2.0)] * 6 + [(5.0, 2.0)] * 2)
    assert said == [None] * 7 + [
        "slice spike: loss on long is 2.50 times that on the rest, before it was 2.00"
    ]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: LossSpikeTrigger(ratio=1.0), "ratio=1.0 must be above 1"),
        (lambda: LossSpikeTrigger(patience=0), "must be at least 1 value"),
        (lambda: SliceSpikeTrigger(slice="a", patience=0), "at least 1"),
        (lambda: SliceSpikeTrigger(slice="a", ratio=0.9), "ratio=0.9 must be above 1 where a slice"),
        (lambda: AnyOf([]), "AnyOf takes at least one trigger"),
    ],
)
def test_spikes_and_sets_that_make_no_sense_are_refused(make: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()


# ---- several together ----------------------------------------------------------------------------


def marks(*steps: int) -> ScheduleTrigger:
    return ScheduleTrigger(at_steps=list(steps))


@pytest.mark.parametrize(
    ("composite", "expected"),
    [
        (AnyOf([marks(3), marks(5)]), [3, 5]),
        (AllOf([marks(3), marks(5)]), [5]),
        (AllOf([marks(3), marks(5)], within_steps=1), []),
        (Majority([marks(3), marks(5), marks(9)]), [5]),
        (Majority([marks(3, 8), marks(5), marks(9)], within_steps=1), [9]),
        (Majority([marks(3), marks(5)]), [5]),
    ],
)
def test_enough_triggers_must_agree(composite: Trigger, expected: list[int]) -> None:
    found = [step for step in range(1, 12) if composite.update(at(step))]
    assert found == expected


def test_together_they_tell_all_reasons_and_start_afresh_together() -> None:
    plateau = PlateauTrigger(patience=1)
    both = AllOf([marks(2), plateau])
    said = [both.update(measured(step, 3.0)) for step in (1, 2)]
    assert said[1] is not None and said[1].startswith("2 asked: schedule: 2 steps reached; plateau:")
    plateau.waited = 7
    both.reset()
    assert plateau.waited == 0
    assert both.needs == {"validation_loss"}


# ---- every trigger -------------------------------------------------------------------------------


def weighed(trigger: EfficiencyTrigger) -> EfficiencyTrigger:
    trigger.plan(Planned(1e5, 8e5, 1e6, 6e6))
    return trigger


EVERY = {
    "schedule": lambda: ScheduleTrigger(at_steps=[4, 9]),
    "efficiency": lambda: weighed(EfficiencyTrigger(advantage=1e-9)),
    "plateau": lambda: PlateauTrigger(patience=2, min_improvement=0.3),
    "plateau window": lambda: PlateauTrigger(patience=1, window=2, min_improvement=0.3),
    "perplexity": lambda: PerplexityTrigger(patience=2, min_improvement=0.2),
    "gradient_norm": lambda: GradientNormTrigger(below=0.7, above=1.4, window_steps=3, settle_steps=1),
    "loss_spike": lambda: LossSpikeTrigger(ratio=1.1, window=3, patience=2),
    "slice_spike": lambda: SliceSpikeTrigger(slice="s", ratio=1.2, patience=1, window=2),
    "novelty": lambda: NoveltyTrigger(threshold=3.0),
    "any": lambda: AnyOf([LossSpikeTrigger(ratio=1.1, window=3, patience=2), marks(7)]),
    "all": lambda: AllOf([PlateauTrigger(patience=1), marks(3, 9)], within_steps=3),
    "majority": lambda: Majority([AnyOf([marks(5)]), PlateauTrigger(patience=1), marks(6)], within_steps=4),
}


def everything(step: int, value: float) -> Signals:
    names = (
        ("validation_loss", "slice_loss/s", "novelty")
        if step % 2
        else ("validation_loss", "slice_loss/s", "rest_loss/s")
    )
    values = {name: Measured(value + len(name) % 3, step) for name in names}
    return Signals(step=step, tokens=100 * step, loss=value, grad_norm=value, values=values)


def told(trigger: Trigger, signals: list[Signals]) -> list[str | None]:
    said = []
    for item in signals:
        said.append(trigger.update(item))
        if said[-1]:
            trigger.reset()
    return said


@pytest.mark.parametrize("name", EVERY)
@given(values=st.lists(st.floats(0.5, 5) | st.just(math.nan), max_size=25), cut=st.integers(0, 25))
def test_every_trigger_resumes_as_if_nothing_had_happened(name: str, values: list[float], cut: int) -> None:
    signals = [everything(step, value) for step, value in enumerate(values, start=1)]
    whole, first = EVERY[name](), EVERY[name]()
    expected = told(whole, signals)
    before = told(first, signals[:cut])
    assert expected == before + told(through_json(first, EVERY[name]()), signals[cut:])


@pytest.mark.parametrize("name", EVERY)
def test_every_trigger_acts_on_fresh_measurements_alone(name: str) -> None:
    """The same old values, step after step, change nothing and fire nothing but a schedule."""
    trigger = EVERY[name]()
    stale = {n: Measured(9.0, 1) for n in ("validation_loss", "slice_loss/s", "rest_loss/s", "novelty")}
    trigger.update(Signals(step=1, values=stale))
    state = trigger.state_dict()
    for step in (2, 3):
        assert trigger.update(Signals(step=step, values=stale)) is None or "majority" in name or "all" in name
    if not {"schedule", "any", "all", "majority"} & {name}:
        assert trigger.state_dict() == state


@pytest.mark.parametrize("name", EVERY)
def test_every_trigger_survives_its_configuration_and_has_a_name(name: str) -> None:
    before = GrowthRule(when=EVERY[name](), then=WidenFFN(factor=1.3))
    plain = dump(before)
    assert plain["when"]["type"] == name.split()[0]
    again = build(GrowthRule, json.loads(json.dumps(plain)))
    assert dump(again) == plain and type(again.when) is type(before.when)
    assert set(TRIGGERS) == {key.split()[0] for key in EVERY}


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
