"""A comparison shown: tables in the terminal, a page with the curves.

>>> print_comparison(compare(runs), Console())
>>> write_comparison(compare(runs), Path("comparison.html"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cambia import files
from cambia.reporting import units
from cambia.reporting.comparison import WINDOW, Comparison, Reading
from cambia.reporting.continual import learned_and_kept
from cambia.reporting.drawing import to_svg
from cambia.reporting.figures import curves_figure
from cambia.reporting.markup import Html, document, note, section, tag
from cambia.reporting.markup import table as html_table
from cambia.reporting.terminal import print_table

_MARK = "*"
_UNDECAYED = "* read before the learning rate came down: not to be compared with figures without the mark"

Rows = list[list[str]]


def tables(comparison: Comparison) -> Iterator[tuple[str, list[str], Rows]]:
    """Title, head and rows of each table."""
    yield (
        "Validation bits per byte, lower is better",
        ["run", "size", "tokens", "operations", "at the end", "at equal tokens", "at equal FLOPs"],
        [
            [
                row.run.name,
                units.count(row.parameters),
                units.count(row.tokens),
                units.flops(row.flops),
                _bits(row.end),
                _bits(row.at_equal_tokens),
                _bits(row.at_equal_flops),
            ]
            for row in comparison.rows
        ],
    )
    if comparison.sizes:
        yield (
            "At equal parameters: bits per byte when a run left that size, and the tokens until then",
            ["run", *(units.count(size) for size in comparison.sizes)],
            [
                [row.run.name, *(_at_size(row.by_parameters.get(size)) for size in comparison.sizes)]
                for row in comparison.rows
            ],
        )
    yield from learned_and_kept([row.run for row in comparison.rows])
    events = [(row.run.name, event) for row in comparison.rows for event in row.stability]
    if events:
        yield (
            f"Around growth: {WINDOW} steps before and after",
            [
                "run",
                "step",
                "jump, same batch",
                "change of the training loss",
                "largest norm / median before",
            ],
            [
                [
                    name,
                    f"{event.step:,}",
                    "not measured" if event.jump is None else f"{event.jump:+.2g}",
                    f"{event.loss_change:+.3f}",
                    f"{event.norm_ratio:.2f}",
                ]
                for name, event in events
            ],
        )


def _bits(reading: Reading) -> str:
    if math.isnan(reading.bits_per_byte):
        return "not measured"
    return f"{reading.bits_per_byte:.4f}" + ("" if reading.decayed else _MARK)


def _at_size(found: tuple[Reading, int] | None) -> str:
    return "-" if found is None else f"{_bits(found[0])} ({units.count(found[1])})"


def _has_marks(comparison: Comparison) -> bool:
    return any(_MARK in cell for _, _, rows in tables(comparison) for row in rows for cell in row)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the tables."""
    for title, head, rows in tables(comparison):
        print_table(console, title, head, rows)
    if _has_marks(comparison):
        console.print(_UNDECAYED, style="dim")


def page(comparison: Comparison) -> str:
    """The whole page; it stands alone."""
    names = ", ".join(row.run.name for row in comparison.rows)
    drawn = Html(to_svg(curves_figure(comparison), "curves", "Validation loss over tokens and operations"))
    sections = [section("Validation loss", drawn)]
    for title, columns, rows in tables(comparison):
        sections.append(section(title, html_table(columns, rows, numbers=range(1, len(columns)))))
    equal = f"equal tokens: {comparison.tokens:,}; equal operations: {units.flops(comparison.flops)}"
    sections.append(note(equal, f". {_UNDECAYED}." if _has_marks(comparison) else "."))
    heading = tag("header", tag("div", tag("div", tag("h1", "Side by side"), note(names)), class_="title"))
    return document(names, heading, tag("main", *sections))


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page and return its path."""
    files.write_text(path, page(comparison))
    return path
