"""The efficiency rule: a curve fitted to the run's own losses, and when a larger model is worth its price."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cambia.errors import ConfigError
from cambia.growth import (
    AddLayers,
    AnyOf,
    EfficiencyTrigger,
    LossCurve,
    ScheduleTrigger,
    Signals,
    plan_growth,
)
from cambia.growth.triggers import Planned

PLANNED = Planned(100_000, 800_000, 1.0e6, 6.0e6)
GROWN = Planned(800_000, 1_600_000, 6.0e6, 1.2e7)
"""The next growth, after that one."""


def signals(step: int, loss: float, rate: float = 1e-3) -> Signals:
    return Signals(step=step, tokens=step * 2048, progress=step / 5000, loss=loss, learning_rate=rate)


def ran(
    trigger: EfficiencyTrigger | AnyOf, curve: LossCurve, *, noise: float, steps: int = 5000
) -> int | None:
    """The step at which it fires on a run that follows a curve."""
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        rate = min(1.0, step / 50) * 1e-3
        loss = curve.floor + curve.learnable(step * 2048) + noise * float(generator.normal())
        if trigger.update(signals(step, loss, rate)):
            return step
    return None


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_a_loss_that_does_not_fall_grows_nothing_before_the_latest(noise):
    trigger = EfficiencyTrigger(latest=1.0)
    trigger.plan(PLANNED)
    assert ran(trigger, LossCurve(5.0, 0.0, 0.5), noise=noise) is None


@pytest.mark.parametrize(
    "settings", [{"advantage": float("nan")}, {"advantage": 0}, {"latest": 0}, {"latest": 1.5}]
)
def test_settings_out_of_range_are_refused_in_python_too(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EfficiencyTrigger(**settings)


@given(
    floor=st.floats(0.0, 3.0),
    scale=st.floats(5.0, 500.0),
    exponent=st.floats(0.1, 0.9),
    longer=st.integers(8, 40),
)
def test_a_curve_is_found_again(floor, scale, exponent, longer):
    tokens = 1e5 * 1.2 ** np.arange(longer)
    losses = floor + scale * tokens**-exponent
    assume(losses.std() > 2e-3 * losses.mean())  # what hardly falls is no curve
    found = LossCurve.of(tokens, losses, np.ones(longer))
    ahead = tokens[-1] * 1.5  # an exponent between two of the list, and half as much again
    expected = floor + scale * ahead**-exponent
    learned = scale * (tokens[0] ** -exponent - tokens[-1] ** -exponent)
    assert found.floor + found.learnable(ahead) == pytest.approx(expected, abs=1e-6 + 0.02 * learned)


def test_curves_that_cannot_be_fitted_say_why():
    with pytest.raises(ConfigError, match="3 points is too short"):
        LossCurve.of([1e5, 2e5, 3e5], [3.0, 2.5, 2.4], [1, 1, 1])
    with pytest.raises(ConfigError, match="does not fall"):
        LossCurve.of(1e5 * np.arange(1, 12), np.linspace(2, 3, 11), np.ones(11))


def test_growth_is_due_where_both_learn_as_much_per_operation():
    curve = LossCurve(1.0, 60.0, 0.3)
    tokens = np.geomspace(1e5, 1e9, 400)
    advantages = np.array([curve.advantage(n, PLANNED) for n in tokens])
    assert (np.diff(advantages) > 0).all()  # it only becomes more worth while
    n = tokens[np.searchsorted(advantages, 1.0)]
    gain = curve.gain(PLANNED.parameters_before, PLANNED.parameters_after)
    assert 0 < gain < curve.learnable(20 * PLANNED.parameters_before)

    def slope(tokens_of_it: float, cost: float) -> float:
        ahead = curve.learnable(tokens_of_it) - curve.learnable(tokens_of_it * 1.0001)
        return ahead / (0.0001 * tokens_of_it * cost)

    # The large model's curve lies lower by the gain: with the small one's loss it is that much younger.
    as_large = (curve.scale / (curve.learnable(n) + gain)) ** (1 / curve.exponent)
    assert slope(as_large, 6.0e6) == pytest.approx(slope(n, 1.0e6), rel=0.03)
    dearer = Planned(100_000, 800_000, 1.0e6, 9.0e6)
    assert curve.advantage(n, dearer) < 1.0  # a dearer growth has to wait


def test_it_fires_once_the_curve_says_so_and_not_on_noise():
    curve = LossCurve(1.0, 60.0, 0.3)
    due = next(s for s in range(1, 5000) if curve.advantage(s * 2048, PLANNED) >= 1)
    for noise, away in ((0.0, 1.35), (0.05, 2.0)):
        trigger = EfficiencyTrigger()
        assert trigger.needs_plan
        trigger.plan(PLANNED)
        step = ran(trigger, curve, noise=noise)
        assert step is not None and due / away <= step <= due * away * 1.2
    rising = EfficiencyTrigger()
    rising.plan(PLANNED)
    assert ran(rising, LossCurve(3.0, -60.0, 0.3), noise=0.02, steps=1500) is None


def test_only_losses_at_the_full_rate_count():
    trigger = EfficiencyTrigger()
    for step in range(1, 400):
        trigger.update(signals(step, 3.0, rate=step * 1e-6))
    assert len(trigger.points) == 1  # what was before the rate rose is forgotten
    for step in range(400, 500):
        trigger.update(signals(step, 3.0, rate=1e-4))
    assert trigger.points[0][2] <= 1


def test_its_state_is_plain_and_goes_on_as_if_nothing_had_been():
    curve, plain, other = LossCurve(1.0, 60.0, 0.3), EfficiencyTrigger(), EfficiencyTrigger()
    plain.plan(PLANNED)
    for step in range(1, 300):
        plain.update(signals(step, curve.learnable(step * 2048)))
    other.load_state_dict(json.loads(json.dumps(plain.state_dict())))
    for step in range(300, 900):
        now = signals(step, curve.learnable(step * 2048))
        assert plain.update(now) == other.update(now)
    plain.plan(GROWN)
    assert plain.needs_plan and not plain.points


def test_inside_others_it_is_told_what_the_growth_would_cost():
    both = AnyOf([EfficiencyTrigger(), ScheduleTrigger(at_steps=[10**9])])
    assert both.needs_plan
    both.plan(PLANNED)
    assert ran(both, LossCurve(1.0, 60.0, 0.3), noise=0.0) is not None


def test_a_run_that_knows_its_length_grows_before_it_is_too_late():
    flat = LossCurve(1.0, 60.0, 0.05)  # far from what a larger model would be worth
    for latest, expected in ((0.7, 3500), (0.25, 1250), (1.0, None)):
        trigger = EfficiencyTrigger(latest=latest)
        trigger.plan(PLANNED)
        assert ran(trigger, flat, noise=0.0) == expected
    trigger = EfficiencyTrigger()
    trigger.plan(PLANNED)
    assert ran(trigger, flat, noise=0.0) == 3500
    trigger.reset()
    trigger.plan(GROWN)
    late = [trigger.update(signals(step, 3.0)) for step in range(3501, 5001)]
    assert not any(late), "it has grown by then, and does not grow at each step that follows"


def test_it_is_not_too_late_where_the_rate_has_begun_to_fall():
    trigger = EfficiencyTrigger()
    trigger.plan(PLANNED)
    flat = LossCurve(1.0, 60.0, 0.05)
    for step in range(1, 3501):
        rate = 1.0 if step < 3490 else 0.9
        reason = trigger.update(signals(step, flat.learnable(step * 2048), rate=rate))
        assert (reason is not None) == (step == 3500)
    trigger.reset()
    assert not any(trigger.update(signals(step, 3.0, rate=0.8)) for step in range(3501, 5000))


def test_a_growth_that_is_not_done_changes_nothing_and_is_asked_for_seldom():
    curve, trigger = LossCurve(1.0, 60.0, 0.3), EfficiencyTrigger()
    trigger.plan(PLANNED)
    asked = []
    for step in range(1, 4000):
        if trigger.update(signals(step, curve.learnable(step * 2048))):
            asked.append(step)
            trigger.reset()
        trigger.plan(PLANNED)
    assert trigger.younger == 0 and 2 <= len(asked) < 40
    assert all(later >= 1.1 * earlier for earlier, later in pairwise(asked))


def test_a_growth_by_another_rule_makes_the_model_younger_too():
    curve, trigger = LossCurve(1.0, 60.0, 0.3), EfficiencyTrigger(advantage=1e9)
    trigger.plan(PLANNED)
    for step in range(1, 2000):
        trigger.update(signals(step, curve.learnable(step * 2048)))
    age = trigger.age
    trigger.plan(GROWN)
    assert not trigger.points and trigger.costs == asdict(GROWN)
    assert trigger.younger == pytest.approx(age - curve.as_grown(age, PLANNED), rel=0.1)


def test_a_second_growth_is_decided_by_the_curve_of_the_first():
    """It is due where it would be due for a model of that size, but for the tokens by which it is younger."""
    curve, trigger = LossCurve(1.0, 60.0, 0.3), EfficiencyTrigger()
    first, second = Planned(100_000, 200_000, 1.0e6, 1.6e6), Planned(200_000, 400_000, 1.6e6, 3.0e6)
    trigger.plan(first)
    step = ran(trigger, curve, noise=0.0)
    assert step is not None
    trigger.reset()
    trigger.plan(second)
    age = curve.as_grown(step * 2048, first)
    assert 0 < age < step * 2048
    while curve.advantage(age, second) < 1:
        age += 2048
        step += 1
    asked = (
        n for n in range(step - 300, 20_000) if trigger.update(Signals(step=n, tokens=n * 2048, loss=3.0))
    )
    assert next(asked) == pytest.approx(step, rel=0.05)


def test_embeddings_are_no_part_of_what_is_weighed(tiny):
    """A larger vocabulary does not make growth in depth worth less or more."""
    small, large = (plan_growth(tiny("llama", vocab_size=size), AddLayers(factor=2.0)) for size in (64, 640))
    assert small.parameters_before < large.parameters_before
    sizes = [(each.planned.parameters_before, each.planned.parameters_after) for each in (small, large)]
    assert sizes[0] == sizes[1]
    assert sizes[0][1] == 2 * sizes[0][0], "all layers are alike here"
