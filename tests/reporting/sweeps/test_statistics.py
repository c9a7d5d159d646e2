from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.reporting.sweeps.statistics import bootstrap_interval, holm, mean, paired_t, spread, t_tail

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=25)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


# ---- the t distribution --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [  # two-sided critical values, as every table has them
        (12.7062, 1, 0.05),
        (63.6567, 1, 0.01),
        (4.30265, 2, 0.05),
        (9.92484, 2, 0.01),
        (3.18245, 3, 0.05),
        (2.77645, 4, 0.05),
        (8.61030, 4, 0.001),
        (2.57058, 5, 0.05),
        (2.22814, 10, 0.05),
        (3.16927, 10, 0.01),
        (2.04227, 30, 0.05),
        (1.98397, 100, 0.05),
    ],
)
def test_the_tail_is_that_of_the_tables(t: float, degrees: int, p: float) -> None:
    assert t_tail(t, degrees) == pytest.approx(p, rel=1e-5)
    assert t_tail(-t, degrees) == t_tail(t, degrees)


@given(st.floats(0, 60), st.integers(1, 60))
def test_the_tail_is_the_integral_of_the_density(t: float, degrees: int) -> None:
    # With t = sqrt(degrees) tan(angle) the density is the cosine to the power of degrees - 1.
    nodes, weights = np.polynomial.legendre.leggauss(80)

    def area(low: float, high: float) -> float:
        at = (high - low) / 2 * nodes + (high + low) / 2
        return float((high - low) / 2 * (weights * np.cos(at) ** (degrees - 1)).sum())

    angle = math.atan(t / math.sqrt(degrees))
    expected = area(angle, math.pi / 2) / area(0, math.pi / 2)
    assert t_tail(t, degrees) == pytest.approx(expected, abs=1e-12)


@given(st.floats(0, 50))
def test_closed_forms_of_one_and_two_degrees(t: float) -> None:
    assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    assert t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)


def test_many_degrees_are_nearly_normal() -> None:
    assert t_tail(1.96, 100_000) == pytest.approx(math.erfc(1.96 / math.sqrt(2)), rel=1e-4)


def test_ends_of_the_distribution() -> None:
    assert t_tail(0.0, 4) == 1.0
    assert t_tail(math.inf, 4) == 0.0
    assert math.isnan(t_tail(math.nan, 4))
    with pytest.raises(ValueError, match="at least 1"):
        t_tail(1.0, 0)


# ---- the paired test -----------------------------------------------------------------------------


def test_a_test_by_hand() -> None:
    # Student's own sleep data (1908), the second drug less the first: t = 4.0621, p = 0.0028 with 9 degrees.
    test = paired_t([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (test.t, test.degrees, test.p) == (
        pytest.approx(4.0621, abs=1e-4),
        9,
        pytest.approx(0.002833, abs=1e-6),
    )


def test_too_few_or_equal_differences() -> None:
    assert math.isnan(paired_t([]).p) and paired_t([]).degrees == 0
    assert math.isnan(paired_t([0.3]).p)
    assert (paired_t([0.0, 0.0, 0.0]).t, paired_t([0.0, 0.0, 0.0]).p) == (0.0, 1.0)
    assert (paired_t([-0.5, -0.5]).t, paired_t([-0.5, -0.5]).p) == (-math.inf, 0.0)


@given(NUMBERS)
def test_sign_and_unit_do_not_matter(values: list[float]) -> None:
    test, mirrored = paired_t(values), paired_t([-value for value in values])
    assert 0 <= test.p <= 1
    assert mirrored.p == test.p and mirrored.t == -test.t
    assert paired_t([value * 1024 for value in values]).p == pytest.approx(test.p, abs=1e-9)


def test_mean_and_spread() -> None:
    assert (mean([1.0, 2.0, 6.0]), spread([1.0, 2.0, 6.0])) == (3.0, pytest.approx(math.sqrt(7)))
    assert math.isnan(mean([])) and math.isnan(spread([1.0]))


# ---- the bootstrap -------------------------------------------------------------------------------


@given(NUMBERS)
def test_an_interval_lies_within_the_values_around_their_mean(values: list[float]) -> None:
    interval = bootstrap_interval(values, resamples=2000)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) <= interval.low <= mean(values) + slack
    assert mean(values) - slack <= interval.high <= max(values)
    assert interval == bootstrap_interval(values, resamples=2000)


@given(NUMBERS, st.floats(-50, 50))
def test_an_interval_moves_with_the_values(values: list[float], by: float) -> None:
    here, there = (bootstrap_interval(v, resamples=500) for v in (values, [value + by for value in values]))
    assert there.low == pytest.approx(here.low + by, abs=1e-9)
    assert there.high == pytest.approx(here.high + by, abs=1e-9)


def test_an_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(1).standard_normal(2000)  # so many that resampling goes by blocks
    interval, error = bootstrap_interval(values), spread(values) / math.sqrt(2000)
    assert interval.low == pytest.approx(mean(values) - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean(values) + 1.96 * error, abs=0.1 * error)


def test_no_interval_with_fewer_than_two_values() -> None:
    assert math.isnan(bootstrap_interval([]).low) and math.isnan(bootstrap_interval([1.0]).high)


# ---- Holm ----------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm([0.01, math.nan, 0.03])
    assert with_gap[[0, 2]].tolist() == pytest.approx([0.02, 0.03]) and math.isnan(with_gap[1])
    assert holm([]).tolist() == []


@given(P_VALUES)
def test_holm_is_between_nothing_and_bonferroni(p_values: list[float]) -> None:
    given_, adjusted = np.array(p_values), holm(p_values)
    assert (adjusted >= given_).all()
    assert (adjusted <= np.minimum(1.0, given_ * len(given_)) + 1e-15).all()
    order = np.argsort(given_, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


@given(P_VALUES.flatmap(lambda p: st.tuples(st.just(p), st.permutations(range(len(p))))))
def test_holm_does_not_depend_on_the_order(drawn: tuple[list[float], list[int]]) -> None:
    p_values, order = drawn
    assert holm(np.array(p_values)[order]).tolist() == pytest.approx(holm(p_values)[order].tolist())


@given(st.floats(0, 1))
def test_one_test_needs_no_correction(p: float) -> None:
    assert holm([p]).tolist() == [p]
