"""What all pictures share: colors, letters, lines, and how they become a part of a page.

Figures are made through matplotlib's object API and rendered with its SVG backend; nothing global is
touched. Each color below is replaced by a CSS variable of the same name, so that one picture serves the
light page and the dark one, and text stays text, in the page's own font.

    svg = to_svg(loss_figure(run), "loss", "Training and validation loss over tokens")
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from cambia.reporting import svg
from cambia.reporting.markup import Html, tag

COLORS = {
    "ink": "#22302a",
    "muted": "#6a766f",
    "rule": "#d9ddd4",
    "band": "#eef1ea",
    "leaf": "#2f7d5b",
    "pale-leaf": "#a9cdbb",
    "sky": "#2b62a8",
    "bark": "#b0591b",
}
"""Colors by the name of the CSS variable that replaces them; the values are those of the light page."""

LETTER_SIZE = 8.0  # of letters, in points
_WIDTH = 7.2  # inches; an SVG point is 1/72 inch, and the page stretches the picture to its column
LETTERS = 95  # that stand side by side over the whole width
LINE_COLORS = ("leaf", "sky", "bark", "muted")
LINE_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = ("o", "s", "D", "^")


@dataclass(frozen=True)
class Drawing:
    """A picture and what to say beneath it."""

    figure: Figure
    caption: str


def new_figure(height: float) -> Figure:
    """A figure of the page's width, in inches high, without a background."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def lay_out(figure: Figure) -> None:
    """Work out where everything in a figure stands, so that its parts can be measured."""
    with _any_letters():
        figure.draw_without_rendering()


@contextmanager
def _any_letters() -> Generator[None]:
    """matplotlib's own font only measures the text: the browser has the letters that it lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def one_axes(height: float) -> tuple[Figure, Axes]:
    """The same with axes in it."""
    figure = new_figure(height)
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["muted"])
    axes.tick_params(colors=COLORS["muted"], labelcolor=COLORS["ink"], labelsize=LETTER_SIZE, length=3)
    axes.grid(color=COLORS["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLORS["ink"], size=LETTER_SIZE)


def line(
    axes: Axes, x: np.ndarray, y: np.ndarray, *, color: str, width: float, label: str | None = None
) -> Line2D:
    """A line in one of `COLORS`, width in points."""
    # A line through one point cannot be seen; a dot can.
    marker = "o" if len(x) == 1 else None
    (line,) = axes.plot(x, y, color=COLORS[color], linewidth=width, marker=marker, markersize=4, label=label)
    return line


def dots(
    axes: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    color: str,
    size: float,
    hollow: bool = False,
    label: str | None = None,
) -> None:
    """Dots in one of `COLORS`, size in points."""
    axes.plot(
        x,
        y,
        linestyle="none",
        marker="o",
        markersize=size,
        markerfacecolor="none" if hollow else COLORS[color],
        markeredgecolor=COLORS[color],
        markeredgewidth=1.4 if hollow else 0,
        label=label,
        zorder=4,
    )


def mark_style(i: int) -> dict[str, Any]:
    """Color, dashes and marker of a line; from the fifth on, marks are hollow."""
    place, turn = i % len(LINE_COLORS), i // len(LINE_COLORS)
    color = COLORS[LINE_COLORS[place]]
    return {
        "color": color,
        "linestyle": LINE_DASHES[turn % len(LINE_DASHES)],
        "marker": _MARKERS[place],
        "markerfacecolor": "none" if turn else color,
        "markeredgewidth": 1.0 if turn else 0.0,
    }


def legend(figure: Figure, axes: Axes) -> None:
    """What the lines are, below the picture."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "growth")  # lines of the curve first
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
        fontsize=LETTER_SIZE,
        labelcolor=COLORS["ink"],
    )


def legend_beside(axes: Axes, *, without: str | None = None) -> None:
    """What the marks are, at the right of the axes.

    Args:
        without: a label that is left out.
    """
    handles, labels = axes.get_legend_handles_labels()
    keep = [i for i, label in enumerate(labels) if label != without]
    axes.legend(
        [handles[i] for i in keep],
        [labels[i] for i in keep],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=LETTER_SIZE,
        labelcolor=COLORS["ink"],
    )


def to_svg(figure: Figure, name: str, title: str) -> str:
    """An <svg> element to put into a page.

    Args:
        name: prefix of its ids, unique within the page.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    # Text as text, in the page's font; ids that depend on the content alone.
    with matplotlib.rc_context(), _any_letters():
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name})
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return svg.embedded(buffer.getvalue(), name, title=title, variables=COLORS)


def picture(drawing: Drawing, name: str, title: str) -> Html:
    """A drawing with its caption, to put into a page; `name` is unique within it."""
    drawn = Html(to_svg(drawing.figure, name, title))
    return tag("figure", tag("div", drawn, class_="wide"), tag("figcaption", drawing.caption))
