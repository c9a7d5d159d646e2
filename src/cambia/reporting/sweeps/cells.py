"""Cells of a sweep, and the arithmetic on them: groups of equal choices, means, pairs.

A cell that failed, is missing or has no finite value is left out of every number, and counted beside it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cambia.reporting.sweeps.statistics import (
    Interval,
    TTest,
    bootstrap_interval,
    holm,
    mean,
    paired_t,
    spread,
)
from cambia.sweepdir import Result

_LOWER = (
    "bits_per_byte",
    "nll",
    "nats",
    "loss",
    "perplexity",
    "forgotten",
    "forgetting",
    "incremental_mean",
    "regret",
)
_HIGHER = ("transfer", "learned", "accuracy", "pass_at", "codebleu", "reward", "coverage")

Status = Literal["finished", "failed", "missing"]


# ---- values --------------------------------------------------------------------------------------


def label(value: Any) -> str:
    """A value of an axis as people write it: ``0.0003``, ``true``, ``none``, ``widen_ffn``."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def key(value: Any) -> Hashable:
    """What makes two values of an axis the same: 1 and 1.0 are, 1 and true are not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("number", value) if is_number else (type(value).__name__, str(value))


def direction(metric: str) -> Literal["lower", "higher"] | None:
    """Which is better, by the metric's name; None for what is neither, such as costs and sizes."""
    if any(word in metric for word in _LOWER):
        return "lower"
    return "higher" if any(word in metric for word in _HIGHER) else None


# ---- what tables hold ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Cells that a number does not include, and why."""

    failed: int = 0
    missing: int = 0
    """Without a result so far."""
    unmeasured: int = 0
    """Finished without this metric, or with one that is not finite."""

    @property
    def words(self) -> str:
        """``"2 failed, 1 missing, 1 without value"``; empty where nothing was left out."""
        counts = (
            (self.failed, "failed"),
            (self.missing, "missing"),
            (self.unmeasured, "without value"),
        )
        return ", ".join(f"{count} {word}" for count, word in counts if count)


@dataclass(frozen=True)
class Cell:
    """A cell of the grid and what became of it."""

    name: str
    hash: str
    choice: Mapping[str, Any]
    """Axis -> value."""
    result: Result | None
    """None while there is none."""

    @property
    def status(self) -> Status:
        """Missing means that there is no result so far: not begun, or being worked on."""
        return "missing" if self.result is None else self.result.status

    def value(self, metric: str) -> float | None:
        """The metric where the cell finished and the number is finite, else None."""
        found = self.result.results.get(metric) if self.result and self.status == "finished" else None
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


@dataclass(frozen=True)
class Row:
    """Cells that agree on all axes of a table."""

    choice: Mapping[str, Any]
    """Axis -> value."""
    values: tuple[float, ...]
    """One per cell that has a value: over seeds, and over the axes that are averaged over."""
    left_out: LeftOut

    @property
    def n(self) -> int:
        """How many values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """nan where there is no value."""
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation, nan where there are fewer than two values."""
        return spread(self.values)


@dataclass(frozen=True)
class Table:
    """A metric for each combination of axes, in the order of the grid."""

    metric: str
    axes: tuple[str, ...]
    over: tuple[str, ...]
    """Axes whose values were taken together."""
    rows: tuple[Row, ...]
    left_out: LeftOut
    """Of all rows."""


@dataclass(frozen=True)
class PairedRow:
    """A value of an axis against the baseline, or a sweep against another."""

    value: Any
    differences: tuple[float, ...]
    """Its metric less the baseline's, one per pair."""
    unpaired: int
    """Its cells that are in no pair: they, or their partner, failed, are missing or have no finite value."""
    interval: Interval
    """Of the mean: bootstrap, 95 %."""
    test: TTest
    p_holm: float
    """Corrected for all the tests of the table."""

    @property
    def n(self) -> int:
        """How many pairs."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """The mean difference, nan without a pair."""
        return mean(self.differences)


@dataclass(frozen=True)
class Paired:
    """Paired differences against a baseline; all its tests are one family for Holm's correction."""

    metric: str
    axis: str
    baseline: Any
    over: tuple[str, ...]
    """Axes that the two of a pair agree on."""
    rows: tuple[PairedRow, ...]


# ---- arithmetic ----------------------------------------------------------------------------------


def grouped(cells: Iterable[Cell], axes: Sequence[str]) -> dict[Hashable, list[Cell]]:
    """Cells by the keys of what they chose on some axes, in the order of the grid."""
    groups: dict[Hashable, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[tuple(key(cell.choice.get(axis)) for axis in axes)].append(cell)
    return dict(groups)


def values(cells: Iterable[Cell], metric: str) -> tuple[float, ...]:
    """The metric of the cells that have it."""
    found = (cell.value(metric) for cell in cells)
    return tuple(value for value in found if value is not None)


def left(cells: Iterable[Cell], metric: str) -> LeftOut:
    """Why the others have none."""
    why = Counter(cell.status for cell in cells if cell.value(metric) is None)
    return LeftOut(failed=why["failed"], missing=why["missing"], unmeasured=why["finished"])


def paired_rows(
    comparisons: Iterable[tuple[Any, Sequence[Cell], Sequence[Cell]]], metric: str, axes: Sequence[str]
) -> tuple[PairedRow, ...]:
    """A row per comparison, corrected as one family.

    A pair is two cells, one of each side, that agree on `axes` and are the only ones there.

    Args:
        comparisons: (what it is called, cells, cells of the baseline).
    """
    found = []
    for name, cells, reference in comparisons:
        partners = grouped(reference, axes)
        pairs = [(group, partners.get(place, [])) for place, group in grouped(cells, axes).items()]
        both = [
            (values(here, metric), values(there, metric))
            for here, there in pairs
            if len(here) == len(there) == 1
        ]
        differences = [here[0] - there[0] for here, there in both if here and there]
        found.append((name, tuple(differences), len(cells) - len(differences)))
    tests = [paired_t(differences) for _, differences, _ in found]
    adjusted = holm([test.p for test in tests])
    return tuple(
        PairedRow(name, differences, unpaired, bootstrap_interval(differences), test, float(p_holm))
        for (name, differences, unpaired), test, p_holm in zip(found, tests, adjusted, strict=True)
    )
