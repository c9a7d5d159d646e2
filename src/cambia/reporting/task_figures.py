"""The pictures of several tasks: what became of each, and how methods weigh new ones against old.

drawing = forgetting_drawing(run.task_matrix())
figure = stability_plasticity([MethodPoint("replay", learning_loss=(2.01, 2.03), forgetting=(0.08, 0.1))])
"""

# J tasks, S stages

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, SymmetricalLogLocator

from cambia.evaluation import TaskMatrix
from cambia.reporting.curves import Window, apart, window_of
from cambia.reporting.drawing import (
    COLORS,
    LETTER_SIZE,
    LETTERS,
    LINE_COLORS,
    LINE_DASHES,
    Drawing,
    lay_out,
    mark_style,
    one_axes,
)
from cambia.reporting.labels import free_label, place_labels
from cambia.reporting.run import stage_names
from cambia.reporting.sweeps.statistics import mean, spread
from cambia.reporting.sweeps.tables import shortened

_LONGEST = 24  # letters of a name beside its line
_ASIDE = 18  # points between the end of a line and its name
_LINE_HEIGHT = 1.25 * LETTER_SIZE  # points
_MARGIN = 8  # letters left of the axes
_NARROWEST = 0.03  # bits per byte beside a picture's values: rounding shall not look like a difference


# ---- forgetting curves ---------------------------------------------------------------------------


def forgetting_drawing(matrix: TaskMatrix, *, measure: str = "bits per byte") -> Drawing | None:
    """Each task's score over the stages, from its first training on; None where nothing came after one.

    A dot is a stage that trained the task, and its name stands where its line ends.

    Args:
        measure: what the matrix holds, in words.
    """
    stages = len(matrix.trained)
    visits = {
        j: [i for i, stage in enumerate(matrix.trained, 1) if j in stage] for j in range(len(matrix.tasks))
    }
    visits = {j: found for j, found in visits.items() if found}
    if all(found[0] == stages for found in visits.values()):
        return None
    figure, axes = one_axes(max(3.3, 0.9 + _LINE_HEIGHT / 72 * len(visits)))
    names = []
    for number, (j, found) in enumerate(visits.items()):
        x = np.arange(found[0], stages + 1)
        y = np.array([matrix.rows[i][j] for i in x])
        color = COLORS[LINE_COLORS[number % len(LINE_COLORS)]]
        dashes = LINE_DASHES[number // len(LINE_COLORS) % len(LINE_DASHES)]
        axes.plot(x, y, color=color, linestyle=dashes, linewidth=1.5)
        here = [matrix.rows[i][j] for i in found]
        axes.plot(found, here, color=color, linestyle="none", marker="o", markersize=5, clip_on=False)
        names.append(_end_label(axes, matrix.tasks[j], (stages, y[-1]), color))
    axes.set_xlim(0.7, stages + 0.05)
    axes.set_ylabel(measure)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    told = _stage_ticks(axes, stage_names(matrix), widest=max(len(name.get_text()) for name in names))
    _keep_apart(figure, axes, names)
    return Drawing(
        figure, f"Dots are stages that trained the task; what follows a dot is what became of it. {told}"
    )


def _end_label(axes: Axes, name: str, place: tuple[float, float], color: str) -> Annotation:
    return axes.annotate(
        shortened(name, _LONGEST),
        place,
        xytext=(_ASIDE, 0),
        textcoords="offset points",
        va="center",
        size=LETTER_SIZE,
        color=color,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.6,
            "relpos": (0, 0.5),  # from where the letters begin
            "shrinkA": 1,
            "shrinkB": 2,
        },
        annotation_clip=False,
        parse_math=False,
    )


def _stage_ticks(axes: Axes, names: Sequence[str], *, widest: int) -> str:
    """A tick for each stage: its name, or its number where names do not fit; then they are returned in words.

    Args:
        widest: letters that stand right of the axes.
    """
    room = (LETTERS - _MARGIN - widest) / max(1, len(names))
    fits = max(map(len, names)) + 2 <= room
    numbers = [str(number) for number in range(1, len(names) + 1)]
    axes.set_xticks(range(1, len(names) + 1), names if fits else numbers, parse_math=False)
    axes.set_xlabel("after the stage that trained" if fits else "after stage")
    listed = ", ".join(f"{number}: {name}" for number, name in zip(numbers, names, strict=True))
    return "" if fits else f"Stages: {listed}."


def _keep_apart(figure: Figure, axes: Axes, labels: Sequence[Annotation]) -> None:
    """Move labels at the ends of lines up and down until each has a line of its own."""
    lay_out(figure)  # only then is it known where the axes are
    points = 72 / figure.dpi
    places = [points * axes.transData.transform(label.xy)[1] for label in labels]
    for label, place, moved in zip(labels, places, apart(places, _LINE_HEIGHT), strict=True):
        label.set_position((_ASIDE, float(moved) - place))


# ---- stability against plasticity ----------------------------------------------------------------


@dataclass(frozen=True)
class MethodPoint:
    """What a method came to, a value per run (seed, order)."""

    name: str
    learning_loss: Sequence[float]
    """Each task right after its own training, mean over tasks."""
    forgetting: Sequence[float]
    """In the same unit and the same order of runs."""


def stability_plasticity(points: Sequence[MethodPoint], *, unit: str = "bits per byte") -> Figure:
    """Methods by what they learn (across) and what they forget (up): good is below and left.

    A mark is the mean over a method's runs, its cross one sample standard deviation each way. Where some
    forget almost nothing and others a lot, all but the lowest part of the upward axis is logarithmic. A
    learning loss far beyond the others' is an arrow head at the edge, its value beside the name.

    Raises:
        ValueError: there is no method, or one has no run, or not two numbers for each.
    """
    if not points or any(not len(p.learning_loss) == len(p.forgetting) > 0 for p in points):
        raise ValueError("expected at least one method, each with as many learning losses as forgettings")
    figure, axes = one_axes(4.2)
    learned, forgot = (_Summary.of([getattr(p, name) for p in points]) for name in _BOTH)
    window = _across(axes, learned)
    scale = _up(axes, forgot)
    taken: list[Artist] = [_good_corner(axes)]
    labels = []
    for i, point in enumerate(points):
        name = shortened(point.name, _LONGEST)
        style: dict[str, Any] = {**mark_style(i), "linestyle": "none"}
        x, y = float(window.clipped(learned.means[i])), float(forgot.means[i])
        if window.beyond(learned.means[i]):
            style["marker"] = ">" if learned.means[i] > x else "<"
            name = f"{name} ({learned.means[i]:.2f})"
        else:
            thin: dict[str, Any] = {"color": style["color"], "linewidth": 1.0, "alpha": 0.6, "zorder": 3}
            taken += axes.plot(window.clipped(learned.reach(i)), [y, y], **thin)
            taken += axes.plot([x, x], forgot.reach(i), **thin)
        axes.plot([x], [y], markersize=6.5, zorder=4, clip_on=False, **style)
        labels.append(free_label(axes, name, (x, y), style["color"]))
    axes.set_xlabel(f"learning loss ({unit}): left learns more")
    axes.set_ylabel(f"forgetting ({unit}{scale}): below forgets less")
    place_labels(figure, axes, labels, taken=taken)
    return figure


_BOTH = ("learning_loss", "forgetting")


@dataclass(frozen=True)
class _Summary:
    """One number of every method, (n,): its means and spreads; the spread of a single run is 0."""

    means: np.ndarray
    spreads: np.ndarray

    @classmethod
    def of(cls, every: Sequence[Sequence[float]]) -> _Summary:
        return cls(np.array([mean(v) for v in every]), np.nan_to_num([spread(v) for v in every]))

    def reach(self, i: int) -> np.ndarray:
        """Both ends of a method's cross."""
        return self.means[i] + self.spreads[i] * np.array([-1.0, 1.0])

    def ends(self, chosen: np.ndarray) -> tuple[float, float]:
        """Both ends of all that is drawn of some methods."""
        low, high = (self.means - self.spreads)[chosen].min(), (self.means + self.spreads)[chosen].max()
        return float(low), float(high)


def _across(axes: Axes, learned: _Summary) -> Window:
    """The axis of learning losses."""
    inside = ~window_of(learned.means).beyond(learned.means)
    low, high = learned.ends(inside)
    margin = max(0.12 * (high - low), _NARROWEST)
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    return Window(low - margin, high + margin)


def _up(axes: Axes, forgot: _Summary) -> str:
    """The axis of forgetting; what to say of its scale.

    It is logarithmic, but for its lowest part, where a third of the methods would else be one with zero.
    """
    low, high = forgot.ends(np.full(len(forgot.means), True))
    most, scale = float(forgot.means.max()), ""
    if most > 0 and len(forgot.means) > 3 and np.quantile(forgot.means, 1 / 3) < 0.05 * most:
        linear = 10.0 ** math.floor(math.log10(most / 10))
        axes.set_yscale("symlog", linthresh=linear, subs=(2, 5))
        axes.set_ylim(min(low, 0.0) - 0.5 * linear, 1.5 * high)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        scale = f", logarithmic from {linear:g}"
    else:
        margin = max(0.12 * (high - low), _NARROWEST)
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    if axes.get_ylim()[0] < 0:
        axes.axhline(0, color=COLORS["muted"], linewidth=0.8, zorder=1)
    return scale


def _good_corner(axes: Axes) -> Text:
    """A pale quarter where methods would be at their best."""
    corner = Ellipse((0, 0), 0.36, 0.5, transform=axes.transAxes, color=COLORS["band"], zorder=0)
    axes.add_patch(corner)
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom", "size": LETTER_SIZE}
    return axes.text(0.012, 0.02, "↙ better", color=COLORS["muted"], **place)
