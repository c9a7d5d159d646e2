"""Sweeps side by side: the same metric at the same choices, and what differs where seeds are equal too.

>>> comparison = compare_sweeps([load_sweep("fixed"), load_sweep("growing")])
>>> comparison.paired[0].mean
-0.021
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cambia import files
from cambia.errors import ConfigError, RunError
from cambia.reporting import units
from cambia.reporting.comparison import load_for_comparison
from cambia.reporting.drawing import picture
from cambia.reporting.markup import document, note, tag
from cambia.reporting.sweeps.cells import (
    PairedRow,
    Row,
    grouped,
    key,
    label,
    left,
    paired_rows,
    values,
)
from cambia.reporting.sweeps.figures import forest_drawing
from cambia.reporting.sweeps.page import shown_section
from cambia.reporting.sweeps.sweep import MAIN_METRICS, SEED, Sweep
from cambia.reporting.sweeps.tables import (
    Shown,
    listed,
    name_of,
    paired_cells,
    paired_notes,
    summary,
    with_direction,
)
from cambia.reporting.terminal import print_shown
from cambia.sweepdir import is_sweep


@dataclass(frozen=True)
class SharedChoice:
    """A combination of the common axes, and what each sweep measured there."""

    choice: Mapping[str, Any]
    rows: tuple[Row, ...]
    """One per sweep."""


@dataclass(frozen=True, eq=False)
class SweepComparison:
    """Several sweeps where they chose alike."""

    sweeps: tuple[Sweep, ...]
    labels: tuple[str, ...]
    """Their names; their folders where names are equal."""
    metric: str
    axes: tuple[str, ...]
    """That all sweeps have, without the seed."""
    shared: tuple[SharedChoice, ...]
    """Choices that all sweeps made."""
    not_shared: tuple[int, ...]
    """Per sweep: choices on the common axes that some other sweep did not make."""
    averaged: tuple[tuple[str, ...], ...]
    """Per sweep: axes with several values that not all sweeps have; they are averaged over."""
    paired_over: tuple[str, ...]
    """Axes, the seed among them, that the two of a pair agree on."""
    paired: tuple[PairedRow, ...]
    """Each sweep but the first, less the first."""


def are_sweeps(names: Sequence[str]) -> bool:
    """Whether all names are sweeps'.

    Raises:
        ConfigError: some are and some are not.
        RunError: one of them is neither a sweep nor a run.
    """
    sweeps = [name for name in names if is_sweep(name)]
    others = [name for name in names if not is_sweep(name)]
    if sweeps and others:
        load_for_comparison(others[0])
        raise ConfigError(
            f"{sweeps[0]!r} is a sweep and {others[0]!r} is a run: compare sweeps with sweeps, or runs with "
            f"runs (a cell is a run: {sweeps[0]}/CELL)"
        )
    return bool(sweeps)


def compare_sweeps(sweeps: Sequence[Sweep], metric: str | None = None) -> SweepComparison:
    """Read sweeps side by side.

    Args:
        metric: one that all have; by default bits per byte on test or validation text, else the first.

    Raises:
        ConfigError: a sweep does not have that metric.
        RunError: fewer than two, or one of them has no results, or they share no metric or no choice.
    """
    if len(sweeps) < 2:
        raise RunError("a comparison needs at least two sweeps: cambia compare SWEEP SWEEP")
    metric = _common_metric(sweeps, metric)
    common = [axis for axis in sweeps[0].axes if all(axis in sweep.axes for sweep in sweeps)]
    axes = tuple(axis for axis in common if axis != SEED)
    groups = [grouped(sweep.cells, axes) for sweep in sweeps]
    shared = [place for place in groups[0] if all(place in group for group in groups)]
    if not shared:
        raise RunError(
            f"the sweeps share no choice on their common axes ({', '.join(axes)}), so nothing compares"
        )
    labels = _labels(sweeps)
    others = [
        (name, sweep.cells, sweeps[0].cells) for name, sweep in zip(labels[1:], sweeps[1:], strict=True)
    ]
    return SweepComparison(
        sweeps=tuple(sweeps),
        labels=labels,
        metric=metric,
        axes=axes,
        shared=tuple(_shared(place, groups, axes, metric) for place in shared),
        not_shared=tuple(len(group) - len(shared) for group in groups),
        averaged=tuple(tuple(axis for axis in sweep.varied if axis not in axes) for sweep in sweeps),
        paired_over=tuple(common),
        paired=paired_rows(others, metric, common),
    )


def _shared(
    place: Any, groups: Sequence[Mapping[Any, Any]], axes: Sequence[str], metric: str
) -> SharedChoice:
    choice = {axis: groups[0][place][0].choice.get(axis) for axis in axes}
    rows = [Row(choice, values(group[place], metric), left(group[place], metric)) for group in groups]
    return SharedChoice(choice, tuple(rows))


def _common_metric(sweeps: Sequence[Sweep], metric: str | None) -> str:
    known = [sweep.metrics for sweep in sweeps if sweep.metric(metric)]
    common = [name for name in known[0] if all(name in names for names in known)]
    if metric is None and not common:
        told = "; ".join(f"{sweep.name} has {', '.join(sweep.metrics)}" for sweep in sweeps)
        raise RunError(f"the sweeps share no metric: {told}")
    return metric or next(name for name in (*MAIN_METRICS, *common) if name in common)


def _labels(sweeps: Sequence[Sweep]) -> tuple[str, ...]:
    names = [sweep.name for sweep in sweeps]
    return tuple(sweep.name if names.count(sweep.name) == 1 else str(sweep.folder) for sweep in sweeps)


# ---- shown ---------------------------------------------------------------------------------------


def comparison_tables(comparison: SweepComparison) -> tuple[Shown, Shown]:
    """Each sweep at each shared choice; paired differences from the first."""
    metric, shared = comparison.metric, comparison.shared
    axes = [axis for axis in comparison.axes if len({key(place.choice[axis]) for place in shared}) > 1]
    rows = [
        [
            *(label(place.choice[axis]) for axis in axes),
            name,
            *summary(metric, row),
            row.left_out.words or "-",
        ]
        for place in shared
        for name, row in zip(comparison.labels, place.rows, strict=True)
    ]
    head = [*axes, "sweep", "mean", "spread", "n", "left out"]
    means = Shown(with_direction(metric), head, rows, len(axes) + 1, tuple(_notes(comparison)))
    has_pairs = any(row.n for row in comparison.paired)
    differences = Shown(
        f"{name_of(metric)}: difference from {comparison.labels[0]}",
        ["sweep", "difference", "95 % interval", "pairs", "p", "Holm", "unpaired"],
        [[*paired_cells(metric, row), str(row.unpaired)] for row in comparison.paired if has_pairs],
        1,
        paired_notes(
            metric,
            comparison.paired,
            pair="the only cells of their sweeps",
            over=comparison.paired_over,
            baseline=comparison.labels[0],
        ),
    )
    return means, differences


def _notes(comparison: SweepComparison) -> list[str]:
    notes = ["Mean and sample standard deviation over the n cells with equal choices; no spread where n = 1."]
    for name, axes, alone in zip(comparison.labels, comparison.averaged, comparison.not_shared, strict=True):
        if axes:
            notes.append(f"{name} is averaged over {listed(axes)} as well, which not all sweeps have.")
        if alone:
            notes.append(f"{name} made {units.plural(alone, 'more choice')} that not all sweeps made.")
    return notes


def print_sweep_comparison(comparison: SweepComparison, console: Console) -> None:
    """Print the tables."""
    for shown in comparison_tables(comparison):
        print_shown(console, shown)


def write_sweep_comparison(comparison: SweepComparison, path: Path) -> Path:
    """Write the page, with the differences as a picture, and return its path."""
    means, differences = comparison_tables(comparison)
    drawing = forest_drawing(comparison.metric, comparison.paired, comparison.labels[0])
    drawn = [] if drawing is None else [picture(drawing, "forest", differences.title)]
    sections = [shown_section(means), shown_section(differences, *drawn)]
    names = ", ".join(comparison.labels)
    heading = tag("header", tag("div", tag("div", tag("h1", "Side by side"), note(names)), class_="title"))
    files.write_text(path, document(names, heading, tag("main", *sections)))
    return path
