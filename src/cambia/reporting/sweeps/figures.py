"""The pictures of a sweep: a metric along each axis, paired differences as a forest plot.

Axes of numbers are drawn to scale, from left to right; axes of anything else as rows, where long names have
room. A value far off (a run that diverged) is drawn at the edge instead of pressing all others flat.

    drawing = axis_drawing(sweep, "test_bits_per_byte", "rate")
    svg = to_svg(drawing.figure, "axis-rate", "test bits per byte over rate")
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from cambia.reporting.curves import Window, window_of
from cambia.reporting.drawing import (
    COLORS,
    LETTER_SIZE,
    LETTERS,
    LINE_COLORS,
    Drawing,
    dress,
    mark_style,
    new_figure,
)
from cambia.reporting.sweeps.cells import Cell, PairedRow, grouped, key, label, left
from cambia.reporting.sweeps.sweep import SEED, Sweep
from cambia.reporting.sweeps.tables import (
    listed,
    name_of,
    number,
    probability,
    shortened,
    signed,
    with_direction,
)
from cambia.reporting.task_figures import MethodPoint, stability_plasticity

MOST_ROWS = 60
"""A picture with more rows than that is not drawn."""
_MOST_LINES = len(LINE_COLORS) * 2
_MOST_TICKS = 12
_FEWEST_POINTS, _MOST_POINTS = 3, 20  # with names beside them
_NAME = 34  # letters in a line of a name


@dataclass(frozen=True)
class _Series:
    """The cells of one line: what they are called, where they stand, what they measured."""

    name: str
    at: np.ndarray
    """(n,) places on the axis, one per cell."""
    found: np.ndarray
    """(n,) of the metric, finite."""
    compares: bool
    """Whether its places met the same values of all other axes, so that their means compare."""

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Places, and the mean at each."""
        places = np.unique(self.at)
        return places, np.array([self.found[self.at == place].mean() for place in places])


# ---- a metric along an axis ----------------------------------------------------------------------


def axis_drawing(sweep: Sweep, metric: str, axis: str) -> Drawing | None:
    """A metric over the values of an axis, a line for each value of another; None without a value to draw.

    Dots are cells, larger marks their means. The other axis is the first that varies and has few enough
    values to tell lines apart; the remaining ones are averaged over.
    """
    places = sweep.axes[axis]
    is_rows = axis == SEED or not is_numeric(places)
    if is_rows and len(places) > MOST_ROWS:
        return None
    split = split_axis(sweep, axis)
    series = _series(sweep, metric, axis, split, is_rows=is_rows)
    if not series:
        return None
    every = np.concatenate([line.found for line in series])
    window = window_of(every)
    draw = _draw_rows if is_rows else _draw_lines
    figure = draw(sweep, metric, axis, series, window)
    if split is not None:
        _legend(figure, sweep.short(split), series)
    return Drawing(figure, _caption(sweep, metric, axis, split, series, window))


def split_axis(sweep: Sweep, axis: str) -> str | None:
    """The axis whose values become lines of their own."""
    for name in sweep.varied:
        count = len(sweep.axes[name])
        # In a random search hardly two cells share a line.
        is_crossed = 2 * len(grouped(sweep.cells, (axis, name))) > count * len(sweep.axes[axis])
        if name != axis and count <= _MOST_LINES and is_crossed:
            return name
    return None


def is_numeric(known: Iterable[Any]) -> bool:
    """Whether an axis can be drawn to scale."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)


def is_logarithmic(known: Sequence[float]) -> bool:
    """Whether values span at least a decade and stand more evenly by their ratios than by differences."""
    ordered = np.unique(np.asarray(known, dtype=np.float64))
    if len(ordered) < 2 or ordered[0] <= 0 or ordered[-1] < 10 * ordered[0]:
        return False
    gaps, ratios = np.diff(ordered), np.diff(np.log(ordered))
    return bool(ratios.max() / ratios.min() <= gaps.max() / gaps.min())


def _series(sweep: Sweep, metric: str, axis: str, split: str | None, *, is_rows: bool) -> list[_Series]:
    rows = {key(value): row for row, value in enumerate(sweep.axes[axis])} if is_rows else None
    rest = [name for name in sweep.varied if name not in (axis, split)]
    found = []
    for cells in grouped(sweep.cells, [split] if split else []).values():
        measured = [(cell, value) for cell in cells if (value := cell.value(metric)) is not None]
        met = [set(grouped(group, rest)) for group in grouped(cells, [axis]).values()]
        if measured:
            found.append(
                _Series(
                    name=label(cells[0].choice.get(split)) if split else "",
                    at=np.array([_place(cell, axis, rows) for cell, _ in measured], dtype=np.float64),
                    found=np.array([value for _, value in measured]),
                    compares=all(others == met[0] for others in met),
                )
            )
    return found


def _place(cell: Cell, axis: str, rows: dict[Any, int] | None) -> float:
    return float(cell.choice[axis]) if rows is None else rows[key(cell.choice.get(axis))]


def _draw_lines(sweep: Sweep, metric: str, axis: str, series: list[_Series], window: Window) -> Figure:
    figure = new_figure(3.1)
    axes = figure.subplots()
    dress(axes)
    for i, one in enumerate(series):
        style = mark_style(i)
        _draw_cells(axes, one.at, one.found, window, style=style, is_flat=False)
        if one.compares:
            axes.plot(*one.means, linewidth=1.5, markersize=5, zorder=3, **style)
    known = np.unique(np.asarray(sweep.axes[axis], dtype=np.float64))
    if is_logarithmic(sweep.axes[axis]):
        axes.set_xscale("log")
    _ticks_at(axes, known)
    axes.set_ylim(window.low, window.high)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(metric, value)))
    axes.set_xlabel(axis, parse_math=False)
    axes.set_ylabel(textwrap.fill(with_direction(metric), 40), parse_math=False)
    return figure


def _ticks_at(axes: Axes, known: np.ndarray) -> None:
    """Ticks at the values that occur, or round ones where those are many; no labels that would overlap."""
    is_log = axes.get_xscale() == "log"
    place = np.log(known) if is_log else known
    share = (place - place[0]) / ((place[-1] - place[0]) or 1.0)
    free, labels = -1.0, []
    for value, at in zip(known.tolist(), share.tolist(), strict=True):
        name = label(value)
        half = (len(name) + 1.5) / LETTERS / 2
        labels.append(name if at - half >= free else "")
        free = at + half if labels[-1] else free
    if len(known) <= _MOST_TICKS or all(labels):
        axes.set_xticks(known, labels)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_rows(sweep: Sweep, metric: str, axis: str, series: list[_Series], window: Window) -> Figure:
    known = sweep.axes[axis]
    names = [wrapped(label(value)) for value in known]
    figure, axes = _rows_figure(names, thickness=max(1.0, 0.45 * len(series)))
    for i, one in enumerate(series):
        style: dict[str, Any] = {**mark_style(i), "linestyle": "none"}
        # Lines of other values stand side by side within a row.
        aside = 0.7 * ((i + 0.5) / len(series) - 0.5)
        _draw_cells(axes, one.at + aside, one.found, window, style=style, is_flat=True)
        at, means = one.means
        keep = ~window.beyond(means) & one.compares
        axes.plot(means[keep], at[keep] + aside, markersize=6.5, zorder=3, **style)
    axes.set_xlim(window.low, window.high)
    _metric_axis(axes, metric)
    axes.set_xlabel(with_direction(metric), parse_math=False)
    return figure


def _draw_cells(
    axes: Axes, at: np.ndarray, found: np.ndarray, window: Window, *, style: dict[str, Any], is_flat: bool
) -> None:
    """A pale dot per cell; what lies beyond the window is an arrow head at its edge."""
    low, high = ("<", ">") if is_flat else ("v", "^")
    for keep, marker in (
        (~window.beyond(found), style["marker"]),
        (found < window.low, low),
        (found > window.high, high),
    ):
        if keep.any():
            x, y = at[keep], window.clipped(found[keep])
            look: dict[str, Any] = {**style, "linestyle": "none", "marker": marker}
            size = 3.2 if marker == style["marker"] else 5
            axes.plot(
                *((y, x) if is_flat else (x, y)), markersize=size, alpha=0.55, clip_on=False, zorder=4, **look
            )


def _caption(
    sweep: Sweep, metric: str, axis: str, split: str | None, series: list[_Series], window: Window
) -> str:
    over = [name for name in (*sweep.varied, SEED) if name not in (axis, split)]
    over = [name for name in over if len(sweep.axes.get(name, ())) > 1]
    sentences = []
    if over and all(one.compares for one in series):
        sentences.append(f"Small dots are cells, large marks their means over {listed(over)}.")
    elif over:
        sentences.append(
            f"Dots are cells. Where no mean is drawn, they differ in {listed(over)} too, and not alike at "
            f"every value of {axis}, so that means would not compare."
        )
    beyond = [value for one in series for value in one.found[window.beyond(one.found)].tolist()]
    if beyond:
        furthest = number(metric, max(beyond, key=abs))
        sentences.append(f"Arrow heads at the edge: {len(beyond)} beyond it, as far as {furthest}.")
    if words := left(sweep.cells, metric).words:
        sentences.append(f"Not drawn: {words}.")
    return " ".join(sentences)


# ---- what is learned against what is forgotten ---------------------------------------------------


def tradeoff_drawing(sweep: Sweep) -> Drawing | None:
    """Learning loss and forgetting of every choice; None unless at least three have both.

    Where there are too many choices for a name beside each, the last axes are averaged over.
    """
    axes = sweep.varied
    while axes and len(grouped(sweep.cells, axes)) > _MOST_POINTS:
        axes = axes[:-1]
    points = []
    for cells in grouped(sweep.cells, axes).values():
        pairs = [(cell.value("learning_loss"), cell.value("forgetting")) for cell in cells]
        both = [(learned, lost) for learned, lost in pairs if learned is not None and lost is not None]
        if both:
            learned, lost = zip(*both, strict=True)
            points.append(MethodPoint(_point_name(sweep, axes, cells[0]), learned, lost))
    if len(points) < _FEWEST_POINTS:
        return None
    others = [name for name in (*sweep.varied, SEED) if name not in axes]
    over = listed([name for name in others if len(sweep.axes.get(name, ())) > 1])
    told = f", the mean over {over}; its cross is one sample standard deviation each way" if over else ""
    words = left(sweep.cells, "forgetting").words
    caption = f"Each mark is a choice of {listed(axes)}{told}.{f' Not drawn: {words}.' if words else ''}"
    return Drawing(stability_plasticity(points), caption)


def _point_name(sweep: Sweep, axes: Sequence[str], cell: Cell) -> str:
    """The values that a choice is made of; a word speaks for itself, a number needs its axis."""
    values = [(axis, cell.choice.get(axis)) for axis in axes]
    return ", ".join(v if isinstance(v, str) else f"{sweep.short(axis)} {label(v)}" for axis, v in values)


# ---- paired differences --------------------------------------------------------------------------


def forest_drawing(metric: str, rows: Sequence[PairedRow], baseline: str) -> Drawing | None:
    """Mean difference and interval of each row, with its pairs; None without a pair or with too many rows.

    Args:
        baseline: what the zero line is, in words.
    """
    if not any(row.n for row in rows) or len(rows) > MOST_ROWS:
        return None
    figure, axes = _rows_figure([wrapped(label(row.value)) for row in rows], thickness=1.4)
    every = np.concatenate([row.differences for row in rows])
    window = window_of(np.append(every, 0.0))
    window = Window(min(window.low, 0.0), max(window.high, 0.0))
    axes.axvline(0, color=COLORS["muted"], linewidth=1.1, zorder=1.5)
    pairs: dict[str, Any] = {"color": COLORS["sky"], "marker": "o"}
    for at, row in enumerate(rows):
        found = np.array(row.differences)
        _draw_cells(axes, np.full(len(found), float(at)), found, window, style=pairs, is_flat=True)
        if not math.isnan(row.interval.low):
            ends = window.clipped(np.array([row.interval.low, row.interval.high]))
            axes.plot(ends, [at, at], color=COLORS["leaf"], linewidth=1.8, zorder=3)
        if row.n and not window.beyond(np.array(row.mean)):
            axes.plot([row.mean], [at], marker="D", markersize=6, color=COLORS["leaf"], zorder=5)
        axes.annotate(
            f"{signed(metric, row.mean)}  n={row.n}  {_p(row.p_holm)}" if row.n else "no pair",
            (1, at),
            xycoords=axes.get_yaxis_transform(),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            size=LETTER_SIZE,
            color=COLORS["ink"],
            parse_math=False,
        )
    axes.set_xlim(window.low, window.high)
    _metric_axis(axes, metric, is_difference=True)
    axes.set_xlabel(f"{name_of(metric)}: difference from {baseline}", parse_math=False)
    off = int(window.beyond(every).sum())
    told = f" Arrow heads at the edge: {off} pairs beyond it." if off else ""
    return Drawing(
        figure,
        "Diamonds are means, lines their 95 % bootstrap intervals, dots pairs; p is corrected after Holm."
        + told,
    )


def _p(value: float) -> str:
    text = probability(value)
    if math.isnan(value):
        return "no test"
    return f"p{text}" if text.startswith("<") else f"p={text}"


# ---- their parts ---------------------------------------------------------------------------------


def wrapped(text: str) -> str:
    """A name in at most three lines."""
    return "\n".join(textwrap.wrap(shortened(text, 3 * _NAME - 4), _NAME)) or " "


def _rows_figure(names: Sequence[str], *, thickness: float) -> tuple[Figure, Axes]:
    """A figure with a named row for each; the first stands on top."""
    lines = [1 + name.count("\n") for name in names]
    figure = new_figure(0.75 + 0.2 * sum(max(count * 0.75, thickness) for count in lines))
    axes = figure.subplots()
    dress(axes)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _metric_axis(axes: Axes, metric: str, *, is_difference: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    written = signed if is_difference else _tick
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _rounded(written(metric, value))))


def _tick(metric: str, value: float) -> str:
    return _rounded(number(metric, value))


def _rounded(text: str) -> str:
    """Without the zeros that a tick does not need."""
    return (
        text.rstrip("0").rstrip(".") if text.replace(".", "").lstrip("+-").isdigit() and "." in text else text
    )


def _legend(figure: Figure, split: str, series: Sequence[_Series]) -> None:
    """What the lines are, below the picture, which becomes higher by as much."""
    names = [f"{shortened(split, 40)} = {shortened(one.name, 40)}" for one in series]
    abreast = max(1, min(len(names), LETTERS // (max(map(len, names)) + 8)))
    drawn = figure.legend(
        [Line2D([], [], markersize=5, **mark_style(i)) for i in range(len(series))],
        names,
        loc="outside lower center",
        ncols=abreast,
        frameon=False,
        fontsize=LETTER_SIZE,
        labelcolor=COLORS["ink"],
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * math.ceil(len(names) / abreast))
