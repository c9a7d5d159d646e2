"""Learning-rate schedules: a factor at each place of a stretch."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import Member, build
from cambia.errors import ConfigError
from cambia.training.schedules import SCHEDULES, WSD, Constant, Cosine, Schedule

SHARES = st.floats(0, 1)


def curve(schedule: Schedule, length: int) -> list[float]:
    return [schedule.factor(step, length) for step in range(length)]


def schedules() -> st.SearchStrategy[Schedule]:
    wsd = st.builds(WSD, warmup_fraction=SHARES, decay_fraction=SHARES, final=SHARES)
    cosine = st.builds(Cosine, warmup_fraction=SHARES, final=SHARES)
    return wsd | cosine | st.builds(Constant, warmup_fraction=SHARES)


@given(schedule=schedules(), length=st.integers(1, 200))
def test_a_factor_is_a_share_and_rises_before_it_falls(schedule: Schedule, length: int) -> None:
    factors = curve(schedule, length)
    assert all(0 <= factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert all(a <= b for a, b in itertools.pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[top:]))


@given(schedule=schedules(), length=st.integers(1, 200), more=st.integers(0, 300))
def test_beyond_its_end_it_stays_there(schedule: Schedule, length: int, more: int) -> None:
    assert 0 <= schedule.factor(length + more, length) == schedule.factor(length, length) <= 1


@given(schedule=schedules(), length=st.integers(1, 200))
def test_no_step_is_wasted_at_a_rate_of_zero(schedule: Schedule, length: int) -> None:
    """It would learn nothing; a schedule that ends at zero gets there after its last step."""
    assert all(factor > 0 for factor in curve(schedule, length))


def test_a_wsd_schedule_by_hand() -> None:
    factors = curve(WSD(warmup_fraction=0.2, decay_fraction=0.3, final=0.1), 10)
    assert factors[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert factors[2:7] == [1.0] * 5
    assert factors[7:] == [pytest.approx(0.1 + 0.9 * (1 - (k / 4) ** 0.5)) for k in (1, 2, 3)]


@given(length=st.integers(1, 99), more=st.integers(0, 9))
def test_without_a_decay_the_rate_stays(length: int, more: int) -> None:
    assert WSD(warmup_fraction=0, decay_fraction=0).factor(length + more, length) == 1


def test_a_cosine_by_hand() -> None:
    factors = curve(Cosine(warmup_fraction=0.0, final=0.2), 4)
    assert factors == [
        pytest.approx(value) for value in (1.0, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5)
    ]


def test_a_constant_rate_only_warms_up() -> None:
    assert curve(Constant(warmup_fraction=0.5), 4) == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]


@given(decay=st.floats(0.05, 0.5), length=st.integers(40, 400))
def test_the_decay_takes_its_share_of_the_whole_stretch(decay: float, length: int) -> None:
    factors = curve(WSD(warmup_fraction=0.1, decay_fraction=decay), length)
    assert abs(sum(factor < 1 for factor in factors[length // 5 :]) - decay * length) <= 1


def test_warm_up_and_decay_may_fill_the_stretch() -> None:
    factors = curve(WSD(warmup_fraction=0.5, decay_fraction=0.5), 8)
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)
    assert max(factors) < 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_configured_by_its_name(name: str) -> None:
    assert isinstance(Member(SCHEDULES, "schedule").parse({"type": name, "warmup_fraction": 0.5}), Schedule)


@pytest.mark.parametrize("settings", [{"warmup_fraction": 1.5}, {"decay_fraction": -0.1}, {"over": "epoch"}])
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build(WSD, settings)


def test_the_annotation_is_what_the_config_reads() -> None:
    assert Annotated[Schedule, Member(SCHEDULES, "schedule")].__metadata__[0].dump(WSD()) == {
        "type": "wsd",
        "warmup_fraction": 0.05,
        "over": None,
        "decay_fraction": 0.2,
        "final": 0.0,
    }
