"""report.html of a sweep: its tables and pictures on one page that stands alone, as a run's does.

>>> write_sweep_report(load_sweep("learning_rates"))
PosixPath('runs/learning_rates/report.html')
"""

from __future__ import annotations

from pathlib import Path

from cambia import files
from cambia.reporting import units
from cambia.reporting.drawing import picture
from cambia.reporting.markup import RINGS, Html, document, note, section, table, tag, tiles
from cambia.reporting.sweeps.cells import Paired
from cambia.reporting.sweeps.figures import MOST_ROWS, axis_drawing, forest_drawing, tradeoff_drawing
from cambia.reporting.sweeps.sweep import SEED, Sweep
from cambia.reporting.sweeps.tables import (
    Shown,
    against,
    asides,
    choice_of,
    counts,
    ends_of,
    ends_table,
    every_metric_table,
    failures_table,
    main_table,
    name_of,
    number,
    paired_table,
    shortened,
)
from cambia.sweepdir import GRID

_LONG = 40  # rows beyond which a table is folded away
_MOST_NAMES = 100


def write_sweep_report(sweep: Sweep, *, metric: str | None = None, baseline: str | None = None) -> Path:
    """Write the sweep's report.html and return its path.

    Args:
        metric: what tables and pictures show; the main one by default.
        baseline: ``"AXIS=VALUE"`` for the paired differences; by default the first value of the first axis
            that varies.

    Raises:
        ConfigError, RunError: there is no such metric, axis or value.
    """
    files.write_text(sweep.report, sweep_page(sweep, metric=metric, baseline=baseline))
    return sweep.report


def sweep_page(sweep: Sweep, *, metric: str | None = None, baseline: str | None = None) -> str:
    """The whole page."""
    parts: list[Html] = []
    reference = sweep.baseline(baseline)
    if metric is None and sweep.main_metric is None:
        parts.append(section("Results", note("No cell has a result with a number yet.")))
    else:
        metric = sweep.metric(metric)
        parts += [_tiles(sweep, metric), shown_section(main_table(sweep, metric)), *_pictures(sweep, metric)]
        if reference is not None:
            parts.append(_paired(sweep.paired(metric, *reference)))
        parts += [
            shown_section(ends_table(sweep, metric)),
            shown_section(every_metric_table(sweep), is_folded=True),
        ]
    if sweep.having("failed"):
        parts.append(shown_section(failures_table(sweep)))
    parts += [_missing(sweep), _grid(sweep)]
    footer = tag("footer", tag("p", f"Written by Cambia from {sweep.folder}."))
    return document(sweep.name, _header(sweep), tag("main", *parts), footer)


# ---- the top -------------------------------------------------------------------------------------


def _header(sweep: Sweep) -> Html:
    if sweep.having("failed"):
        color, word = "red", f"{len(sweep.having('failed'))} failed"
    elif sweep.having("missing") or not sweep.cells:
        color, word = "amber", "incomplete"
    else:
        color, word = "green", "finished"
    axes = [f"{axis} ({len(values)})" for axis, values in sweep.axes.items() if len(values) > 1]
    along = f" Axes with several values: {', '.join(axes)}." if axes else ""
    told = f"{counts(sweep)}.{along} {' '.join(asides(sweep))}"
    name = tag("div", tag("h1", sweep.name), note(told))
    return tag("header", tag("div", RINGS, name, tag("span", word, class_=f"badge {color}"), class_="title"))


def _tiles(sweep: Sweep, metric: str) -> Html:
    first, last = ends_of(metric)
    shown = []
    for which, cell in ((first, sweep.best(metric)), (last, sweep.worst(metric))):
        choice = choice_of(sweep, cell)
        told = f"{name_of(metric)}, {which}{': ' if choice else ''}{shortened(choice, 90)}"
        shown.append((number(metric, cell.value(metric)), told))
    shown.append((f"{len(sweep.having('finished'))} of {len(sweep.cells)}", "cells finished"))
    if seeds := len(sweep.axes.get(SEED, ())):
        shown.append((str(seeds), "seed" if seeds == 1 else "seeds"))
    shown.append((units.duration(sum(result.seconds for result in sweep.results)), "time, all runs together"))
    return tiles(shown)


# ---- tables and pictures -------------------------------------------------------------------------


def shown_section(shown: Shown, *above: object, is_folded: bool = False) -> Html:
    """A card with a table and the sentences beneath it; a long table is folded away."""
    drawn = Html("")
    if shown.rows:
        drawn = table(shown.head, shown.rows, numbers=range(shown.words, len(shown.head)))
    if is_folded or len(shown.rows) > _LONG:
        drawn = tag("details", tag("summary", f"Table of {units.plural(len(shown.rows), 'row')}"), drawn)
    beneath = [note(" ".join(shown.notes))] if shown.notes else []
    return section(shown.title[:1].upper() + shown.title[1:], *above, drawn, *beneath)


def _pictures(sweep: Sweep, metric: str) -> list[Html]:
    """One for each axis that varies, the seed's only where nothing else does; and what all of them trade."""
    seeds = [SEED] if len(sweep.axes.get(SEED, ())) > 1 else []
    found = []
    for i, axis in enumerate(sweep.varied or seeds):
        drawing = axis_drawing(sweep, metric, axis)
        many = f"{axis} has more than {MOST_ROWS} values, too many for a picture."
        found.append(
            section(f"By {axis}", note(many) if drawing is None else picture(drawing, f"axis{i}", axis))
        )
    tradeoff = tradeoff_drawing(sweep)
    if tradeoff is not None:
        title = "What is learned against what is forgotten"
        found.append(section(title, picture(tradeoff, "tradeoff", title)))
    return found


def _paired(paired: Paired) -> Html:
    shown = paired_table(paired)
    drawing = forest_drawing(paired.metric, paired.rows, against(paired))
    return shown_section(shown, *([picture(drawing, "forest", shown.title)] if drawing else []))


# ---- the rest ------------------------------------------------------------------------------------


def _missing(sweep: Sweep) -> Html:
    names = [cell.name for cell in sweep.having("missing")]
    if not names:
        return Html("")
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    again = [
        tag("p", "Run what is missing:"),
        tag("pre", sweep.command),
    ]
    return section(
        "Missing",
        tag(
            "details",
            tag("summary", units.plural(len(names), "cell")),
            tag("p", ", ".join(names[:_MOST_NAMES]) + more),
        ),
        *(again if sweep.grid else []),
    )


def _grid(sweep: Sweep) -> Html:
    text = sweep.grid or f"{GRID} is missing."
    return section("Grid", tag("details", tag("summary", f"{GRID}, as it was asked for"), tag("pre", text)))
