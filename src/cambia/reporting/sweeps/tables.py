"""The tables of a sweep in words and figures, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cambia.reporting import units
from cambia.reporting.sweeps.cells import Cell, Paired, PairedRow, Row, direction, label
from cambia.reporting.sweeps.sweep import SEED, Sweep
from cambia.sweepdir import ERRORS

FEW_PAIRS = 10
"""With fewer pairs a bootstrap interval is too short."""
_ENDS = 3


@dataclass(frozen=True)
class Shown:
    """A table as it is shown."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int
    """Columns from the left that hold words; the others hold numbers."""
    notes: tuple[str, ...] = ()
    """Sentences beneath."""


# ---- words and numbers ---------------------------------------------------------------------------


def name_of(metric: str) -> str:
    """``"test bits per byte"``."""
    return metric.replace("_", " ")


def with_direction(metric: str) -> str:
    """``"test bits per byte, lower is better"``."""
    better = direction(metric)
    return f"{name_of(metric)}, {better} is better" if better else name_of(metric)


def ends_of(metric: str) -> tuple[str, str]:
    """What the first and the last of `Sweep.ranked` are called."""
    return ("best", "worst") if direction(metric) else ("lowest", "highest")


def number(metric: str, value: float | None) -> str:
    """A value of a metric with its unit, a dash for None and nan."""
    words = metric.split("_")
    if value is None or math.isnan(value):
        return "-"
    if "flops" in words:
        return units.flops(value)
    if "seconds" in words:
        return units.duration(value)
    if {"tokens", "parameters", "steps", "bytes"} & set(words):
        return units.count(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.4g}"


def signed(metric: str, value: float) -> str:
    """The same for a difference."""
    return ("+" if value > 0 else "") + number(metric, value)


def probability(p: float) -> str:
    """A p-value in two digits, a dash for nan."""
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def chosen(choice: Mapping[str, Any]) -> str:
    """``"rate=0.001 seed=0"``."""
    return " ".join(f"{axis}={label(value)}" for axis, value in choice.items())


def shortened(text: str, letters: int) -> str:
    """Beginning and end of a text that is too long: names often differ in their end alone."""
    if len(text) <= letters:
        return text
    tail = letters // 2 - 1
    return f"{text[: letters - tail - 1]}…{text[-tail:]}"


def choice_of(sweep: Sweep, cell: Cell) -> str:
    """What a cell chose where cells differ: ``"rate=0.001 seed=0"``."""
    differing = {axis: cell.choice.get(axis) for axis, values in sweep.axes.items() if len(values) > 1}
    return chosen({sweep.short(axis): value for axis, value in differing.items()})


def listed(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def counts(sweep: Sweep) -> str:
    """``"36 cells: 34 finished, 1 failed, 1 missing"``."""
    told = [f"{len(sweep.having('finished'))} finished"]
    told += [f"{len(found)} {status}" for status in ("failed", "missing") if (found := sweep.having(status))]
    return f"{units.plural(len(sweep.cells), 'cell')}: {', '.join(told)}"


def asides(sweep: Sweep) -> list[str]:
    """What else is worth a sentence: earlier grids, what is being worked on."""
    found = []
    if sweep.earlier:
        found.append(f"{units.plural(sweep.earlier, 'result')} of earlier grids not shown.")
    if sweep.progress is None:
        found.append("No progress file: the sweep has not begun, or its folder was copied without it.")
    elif sweep.having("missing") and (current := sweep.progress.get("current")):
        names = current if isinstance(current, list) else [current]
        found.append(f"When progress was last written: working on {listed([str(name) for name in names])}.")
    return found


# ---- tables --------------------------------------------------------------------------------------


def shown_axes(sweep: Sweep, axes: Sequence[str]) -> list[str]:
    """Those with more than one value, or all where none has."""
    return [axis for axis in axes if axis in sweep.varied] or list(axes)


def main_table(sweep: Sweep, metric: str) -> Shown:
    """Mean, spread and number of values of a metric for each combination of axes."""
    table = sweep.table(metric)
    axes = shown_axes(sweep, table.axes)
    head = [*(map(sweep.short, axes) if axes else ["cells"]), "mean", "spread", "n"]
    rows = [
        [*([label(row.choice[axis]) for axis in axes] or ["all"]), *summary(metric, row)]
        for row in table.rows
    ]
    if table.left_out.words:
        head.append("left out")
        for shown, row in zip(rows, table.rows, strict=True):
            shown.append(row.left_out.words or "-")
    return Shown(
        with_direction(metric), head, rows, len(axes) or 1, tuple(_table_notes(sweep, table.rows, axes))
    )


def summary(metric: str, row: Row) -> list[str]:
    """Mean, spread, n."""
    return [number(metric, row.mean), number(metric, row.spread), str(row.n)]


def _table_notes(sweep: Sweep, rows: Sequence[Row], axes: Sequence[str]) -> list[str]:
    seeds = sweep.axes.get(SEED, ())
    constant = [axis for axis in sweep.axes if axis != SEED and axis not in axes]
    notes = []
    if all(row.n < 2 for row in rows):
        notes.append("n = 1: one value each, so nothing is known of the spread between seeds.")
    else:
        over = f" over the seeds {', '.join(map(label, seeds))}" if 1 < len(seeds) <= 12 else ""
        notes.append(f"Mean and sample standard deviation{over}; no spread where n = 1.")
    if constant:
        same = chosen({axis: sweep.axes[axis][0] for axis in constant})
        notes.append(f"The same in all cells: {same}.")
    return notes


def paired_table(paired: Paired) -> Shown:
    """The differences from a baseline, with what may be concluded from them."""
    head = [
        "value",
        "difference",
        "95 % interval",
        "pairs",
        "p",
        "Holm",
        "unpaired",
    ]
    rows = [[*paired_cells(paired.metric, row), str(row.unpaired)] for row in paired.rows]
    if not any(row.unpaired for row in paired.rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    title = f"{name_of(paired.metric)}: difference from {against(paired)}"
    has_pairs = any(row.n for row in paired.rows)
    notes = paired_notes(
        paired.metric, paired.rows, pair="cells", over=paired.over, baseline=label(paired.baseline)
    )
    return Shown(title, head, rows if has_pairs else [], 1, notes)


def against(paired: Paired) -> str:
    """What others are compared with, ``"rate = 0.001"``, cut in its middle where it is long."""
    return shortened(f"{paired.axis} = {label(paired.baseline)}", 72)


def paired_cells(metric: str, row: PairedRow) -> list[str]:
    """What it is called, mean difference, interval, pairs, p, corrected p."""
    interval = f"{signed(metric, row.interval.low)} to {signed(metric, row.interval.high)}"
    return [
        label(row.value),
        signed(metric, row.mean),
        "-" if math.isnan(row.interval.low) else interval,
        str(row.n),
        probability(row.test.p),
        probability(row.p_holm),
    ]


def paired_notes(
    metric: str, rows: Sequence[PairedRow], *, pair: str, over: Sequence[str], baseline: str
) -> tuple[str, ...]:
    """What is paired, which side is better, and how far to trust it.

    Args:
        pair: what the two of a pair are, in words.
        over: axes that they agree on.
        baseline: what zero stands for, in words.
    """
    agree = f" with equal {listed(over)}" if over else ""
    notes = [f"The two of a pair are {pair}{agree}."]
    better = {"lower": "Below", "higher": "Above"}.get(direction(metric) or "")
    if better:
        notes.append(f"{better} zero is better than {baseline}.")
    return (*notes, *_trust_notes(rows))


def _trust_notes(rows: Sequence[PairedRow]) -> list[str]:
    """What was tested and corrected, and how far to trust it."""
    if not any(row.n for row in rows):
        return ["There are no pairs: no cell and its only partner both have a value."]
    notes, family = [], sum(not math.isnan(row.test.p) for row in rows)
    if family:
        made = "the 1 test" if family == 1 else f"all {family} tests"
        notes.append(
            "p: paired t test, two-sided, which takes the pairs as independent. Holm: the same corrected for "
            f"the family of {made} in this table."
        )
    if any(row.n == 1 for row in rows):
        notes.append("One pair allows neither an interval nor a test.")
    if any(1 < row.n < FEW_PAIRS for row in rows):
        notes.append(f"The interval is a bootstrap, and too short with fewer than {FEW_PAIRS} pairs.")
    if any(row.unpaired for row in rows):
        notes.append("Unpaired: cells that, or whose partner, failed, are missing or have no value.")
    return notes


def ends_table(sweep: Sweep, metric: str) -> Shown:
    """The best and the worst cells."""
    ranked = sweep.ranked(metric)
    first, last = ends_of(metric)
    if len(ranked) > 2 * _ENDS:
        top, bottom = ranked[:_ENDS], ranked[-_ENDS:]
    else:
        top, bottom = ranked[:1], ranked[1:][-1:]

    def row(name: str, cell: Cell) -> list[str]:
        return [name, cell.name, choice_of(sweep, cell), number(metric, cell.value(metric))]

    rows = [row(first, cell) for cell in top] + [row(last, cell) for cell in bottom]
    title = f"{first.capitalize()} and {last} cells by {name_of(metric)}"
    return Shown(title, ["", "cell", "choice", name_of(metric)], rows, 3)


def failures_table(sweep: Sweep) -> Shown:
    """Cells that failed, each with its error in one line."""
    rows = [
        [cell.name, str(cell.result.attempts), " ".join((cell.result.error or "no error was kept").split())]
        for cell in sweep.having("failed")
        if cell.result is not None
    ]
    whole = f"What each printed in full stands in {sweep.folder / ERRORS}."
    return Shown("Failures", ["cell", "attempts", "error"], rows, 3, (whole,))


def every_metric_table(sweep: Sweep) -> Shown:
    """The mean of every metric for each combination of axes."""
    metrics = sweep.metrics
    tables = [sweep.table(metric) for metric in metrics]
    axes = shown_axes(sweep, tables[0].axes)
    rows = []
    for i, first in enumerate(tables[0].rows):
        means = [number(table.metric, table.rows[i].mean) for table in tables]
        rows.append([*([label(first.choice[axis]) for axis in axes] or ["all"]), *means])
    return Shown("Every metric, means", [*(axes or ["cells"]), *map(name_of, metrics)], rows, len(axes) or 1)
