"""What a handful of numbers allows one to say: intervals, paired tests, corrections for many tests.

Pure functions on numpy arrays. A sweep has three to thirty seeds, so everything here says how little a
few numbers prove: it gives nan where there is no answer, and the t distribution is exact.

    >>> differences = np.array([-0.031, -0.012, -0.024, -0.019])
    >>> paired_t(differences).p
    0.0127
    >>> bootstrap_interval(differences)
    Interval(low=-0.028, high=-0.015)

Sources: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife" (percentile interval); Student 1908,
"The Probable Error of a Mean" (t test), with the distribution as in Abramowitz & Stegun 1964, *Handbook of
Mathematical Functions*, 26.7.3 and 26.7.4; Holm 1979, "A Simple Sequentially Rejective Multiple Test
Procedure".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_AT_ONCE = 1_000_000  # resampled values in memory


@dataclass(frozen=True)
class Interval:
    """From where to where, in the unit of the values; both nan where there is none."""

    low: float
    high: float


@dataclass(frozen=True)
class TTest:
    """A two-sided t test of a mean against zero."""

    t: float
    """Mean over its standard error; infinite where values other than zero do not vary."""
    degrees: int
    """Of freedom: the number of values less one."""
    p: float
    """How often a |t| this large comes about where the true mean is zero; nan with fewer than two values."""


def mean(values: ArrayLike) -> float:
    """Arithmetic mean, nan without values."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if len(array) else math.nan


def spread(values: ArrayLike) -> float:
    """Sample standard deviation (with n - 1), nan with fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.std(array, ddof=1)) if len(array) > 1 else math.nan


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979).

    Few values are rarely far apart by chance, so with fewer than about ten this interval is too short: it
    then holds the true mean less often than `level` says.

    Args:
        values: (n,), finite.
        level: the share of the resampled means inside.
        resamples: how often n values are drawn with replacement.
        seed: of the generator: equal values give equal intervals.

    Returns:
        Both ends nan with fewer than two values.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(math.nan, math.nan)
    random = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(array))
    means = np.concatenate(
        [
            array[random.integers(len(array), size=(min(rows, resamples - done), len(array)))].mean(axis=1)
            for done in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # A mean of equal values may differ from them in its last bit.
    return Interval(*(float(np.clip(end, array.min(), array.max())) for end in (low, high)))


def paired_t(differences: ArrayLike) -> TTest:
    """Student's t test of whether paired differences have mean zero, two-sided.

    It takes the differences as independent and as roughly normal.

    Args:
        differences: (n,), one per pair, finite.
    """
    array = np.asarray(differences, dtype=np.float64)
    count = len(array)
    if count < 2:
        return TTest(math.nan, max(0, count - 1), math.nan)
    middle, error = mean(array), spread(array) / math.sqrt(count)
    if error > 0:
        t = middle / error
    else:
        t = math.copysign(math.inf, middle) if middle else 0.0
    return TTest(t, count - 1, t_tail(t, count - 1))


def t_tail(t: float, degrees: int) -> float:
    """The probability that |T| is at least |t|, for Student's T with whole degrees of freedom.

    The finite sums of Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even), with an absolute error of about
    1e-15; a smaller probability is given as 0.

    Raises:
        ValueError: degrees below 1.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom; expected at least 1")
    if math.isnan(t):
        return math.nan
    angle = math.atan2(abs(t), math.sqrt(degrees))
    squared = math.cos(angle) ** 2
    # The terms are c^0, 1/2 c^2, 1*3/(2*4) c^4, ... (even), and c, 2/3 c^3, 2*4/(3*5) c^5, ... (odd).
    term, total = 1.0 if degrees % 2 == 0 else math.cos(angle), 0.0
    for k in range(degrees % 2, degrees - 1, 2):
        total += term
        term *= squared * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    if degrees % 2:
        inside = 2 / math.pi * (angle + inside)
    return min(1.0, max(0.0, 1.0 - inside))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjusted p-values of a family of tests (Holm 1979): reject where they are below the level.

    The chance of even one false rejection in the family stays below the level, however the tests depend on
    one another.

    Args:
        p_values: (m,); nan stands for a test that could not be made, and does not count.

    Returns:
        (m,), never below the given ones and never above 1; nan where nan was given.
    """
    given = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(given.shape, math.nan)
    made = np.flatnonzero(~np.isnan(given))
    order = made[np.argsort(given[made], kind="stable")]
    stepped = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted
