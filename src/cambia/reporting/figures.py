"""The pictures of a report, as SVG that stands inside the page and takes its colors from it.

Figures are made through matplotlib's object API and rendered with its SVG backend; nothing global is
touched. Each color below is replaced by a CSS variable of the same name, so that one picture serves the
light page and the dark one, and text stays text, in the page's own font.

    svg = to_svg(loss_figure(run), "loss", "Training and validation loss over tokens")
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cambia.records import GrowthEvent
from cambia.reporting import units
from cambia.reporting.run import Run

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

_SIZE = 8.0  # of letters, in points
_WIDTH = 7.2  # inches; an SVG point is 1/72 inch, and the page stretches the picture to its column
_MOST_POINTS = 1500
_MOST_DOTS = 90
_LETTERS = 95  # that stand side by side over the whole width


# ---- the pictures --------------------------------------------------------------------------------


def loss_figure(run: Run) -> Figure | None:
    """Training and validation loss over tokens, None where no loss is logged."""
    tokens, loss = run.metrics["tokens"], run.metrics["loss"]
    if not np.isfinite(loss).any():
        return None
    figure, axes = _figure(3.3)
    _marks(axes, run, labels=True)
    smoothed = []
    for number, stretch in enumerate(run.stretches()):
        keep = np.isfinite(loss[stretch.rows])
        x, y = tokens[stretch.rows][keep], loss[stretch.rows][keep]
        raw, smooth = ("each logged step", "smoothed") if number == 0 else (None, None)
        smoothed.append(_smooth(y))
        _line(axes, *_thinned(x, y), color="pale-leaf", width=0.6, label=raw)
        _line(axes, *_thinned(x, smoothed[-1]), color="leaf", width=1.7, label=smooth)
    validation = _draw_validation(axes, run)
    # A single exploded step must not press everything else flat: the smoothed line sets the scale.
    shown = np.concatenate([*smoothed, validation])
    _limits(axes, float(np.nanmin(np.append(shown, loss[np.isfinite(loss)]))), float(shown.max()))
    axes.set_ylabel("loss (nats per token)")
    _tokens_axis(axes)
    _legend(figure, axes)
    return figure


def _draw_validation(axes: Axes, run: Run) -> np.ndarray:
    """Validation points; as a line where there are too many to tell apart. Returns their losses."""
    tokens, loss = run.metrics["tokens"], run.metrics["validation_loss"]
    keep = np.isfinite(loss)
    crowded = keep.sum() > _MOST_DOTS
    label = "validation, task in training"
    for stretch in run.stretches():
        here = keep[stretch.rows]
        x, y = tokens[stretch.rows][here], loss[stretch.rows][here]
        if not len(x):
            continue
        if crowded:
            _line(axes, *_thinned(x, y), color="sky", width=1.1, label=label)
        else:
            dots = {"linestyle": "none", "marker": "o", "markersize": 3.2, "markeredgewidth": 0}
            axes.plot(x, y, markerfacecolor=COLORS["sky"], label=label, zorder=4, **dots)
        label = None
    return loss[keep]


def size_figure(run: Run) -> Figure | None:
    """Parameters, and floating-point operations so far, over tokens."""
    tokens = run.metrics["tokens"]
    if not len(tokens):
        return None
    figure = _new_figure(3.7)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes in (upper, lower):
        _dress(axes)
        _marks(axes, run, labels=axes is upper, numbers=axes is lower)
    x = np.append(0, tokens)
    start = run.parameters_start if run.parameters_start is not None else run.metrics["parameters"][0]
    # A row holds what the model is after its step: the step line stands at the old size until then.
    _steps(upper, *_corners(x, np.append(start, run.metrics["parameters"])))
    upper.set_ylabel("parameters")
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))
    upper.set_ylim(0, float(np.nanmax(run.metrics["parameters"])) * 1.15)
    if run.growth:
        whole = run.growth[-1].flops_per_token_after
        lower.plot(
            [0, tokens[-1]],
            [0, whole * tokens[-1]],
            color=COLORS["muted"],
            linewidth=1,
            linestyle=(0, (4, 3)),
            label="had it had its last size from the start",
        )
    _line(lower, *_thinned(x, np.append(0.0, run.metrics["flops"])), color="leaf", width=1.7, label="spent")
    lower.set_ylabel("operations (FLOP)")
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.flops(value) if value else "0"))
    lower.set_ylim(bottom=0)
    _tokens_axis(lower)
    _legend(figure, lower)
    return figure


def rate_figure(run: Run) -> Figure | None:
    """Learning rate and gradient norm over tokens."""
    tokens, rate = run.metrics["tokens"], run.metrics["learning_rate"]
    if not np.isfinite(rate).any():
        return None
    norm = run.metrics["grad_norm"]
    has_norm = bool((np.isfinite(norm) & (norm > 0)).any())
    figure = _new_figure(3.7 if has_norm else 2.2)
    panels = np.atleast_1d(figure.subplots(2 if has_norm else 1, 1, sharex=True))
    for axes in panels:
        _dress(axes)
        _marks(axes, run, labels=axes is panels[0], numbers=axes is panels[-1])
    keep = np.isfinite(rate)
    _line(panels[0], *_thinned(tokens[keep], rate[keep]), color="leaf", width=1.7)
    panels[0].set_ylabel("learning rate")
    panels[0].set_ylim(0, (float(np.nanmax(rate)) or 1.0) * 1.15)
    if has_norm:
        for stretch in run.stretches():
            keep = np.isfinite(norm[stretch.rows]) & (norm[stretch.rows] > 0)
            x, y = tokens[stretch.rows][keep], norm[stretch.rows][keep]
            _line(panels[1], *_thinned(x, y), color="pale-leaf", width=0.6)
            _line(panels[1], *_thinned(x, _smooth(y)), color="leaf", width=1.7)
        panels[1].set_ylabel("gradient norm\n(before clipping)")
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_minor_locator(NullLocator())
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _tokens_axis(panels[-1])
    return figure


def jump_figure(run: Run) -> Figure | None:
    """Loss on the check batch right before and after each growth, with the jump; None without growth."""
    events = [(i, e) for i, e in enumerate(run.growth, 1) if None not in (e.loss_before, e.loss_after)]
    if not events:
        return None
    figure, axes = _figure(0.85 + 0.42 * len(events))
    for row, (_, event) in enumerate(events):
        pair = [event.loss_before, event.loss_after]
        axes.plot(pair, [row, row], color=COLORS["bark"], linewidth=1.5, zorder=2)
        ring = {"linestyle": "none", "marker": "o", "zorder": 3}
        first = row == 0
        axes.plot(
            pair[:1],
            [row],
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=COLORS["sky"],
            markeredgewidth=1.4,
            label="before" if first else None,
            **ring,
        )
        axes.plot(
            pair[1:],
            [row],
            markersize=4.5,
            markerfacecolor=COLORS["bark"],
            markeredgewidth=0,
            label="after" if first else None,
            **ring,
        )
        axes.text(
            1.02,
            row,
            f"jump {units.jump(event.loss_before, event.loss_after)}",
            transform=axes.get_yaxis_transform(),
            va="center",
            size=_SIZE,
            color=COLORS["ink"],
        )
    axes.set_yticks(range(len(events)), [_event_name(i, event) for i, event in events])
    axes.set_ylim(len(events) - 0.4, -0.6)
    losses = [loss for _, event in events for loss in (event.loss_before, event.loss_after)]
    # Never so close that a rounding error looks like a jump.
    middle, reach = (min(losses) + max(losses)) / 2, max((max(losses) - min(losses)) / 2, 0.05)
    axes.set_xlim(middle - 1.25 * reach, middle + 1.25 * reach)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("loss on the check batch (nats per token)")
    _legend(figure, axes)
    return figure


def _event_name(number: int, event: GrowthEvent) -> str:
    name = units.operators(event.operators)
    return f"{number}  {name if len(name) <= 30 else name[:29] + '…'}"


# ---- their parts ---------------------------------------------------------------------------------


def _new_figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = _new_figure(height)
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["muted"])
    axes.tick_params(colors=COLORS["muted"], labelcolor=COLORS["ink"], labelsize=_SIZE, length=3)
    axes.grid(color=COLORS["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLORS["ink"], size=_SIZE)


def task_labels(run: Run) -> list[str]:
    """What stands above each task's stretch: their names, or their numbers where a name does not fit."""
    stretches = run.stretches()
    total = max(1, stretches[-1].last_token) if stretches else 1
    room = [int(_LETTERS * (s.last_token - s.first_token) / total) for s in stretches]
    if all(len(s.task) <= letters for s, letters in zip(stretches, room, strict=True)):
        return [s.task for s in stretches]
    numbers = [str(number) for number in range(1, len(stretches) + 1)]
    return [number if len(number) <= letters else "" for number, letters in zip(numbers, room, strict=True)]


def _marks(axes: Axes, run: Run, *, labels: bool, numbers: bool = True) -> None:
    """Every second task shaded, their names above, a vertical line at each growth."""
    stretches = run.stretches()
    total = max(1, stretches[-1].last_token)
    for number, (stretch, label) in enumerate(zip(stretches, task_labels(run), strict=True)):
        if number % 2 == 1:
            axes.axvspan(stretch.first_token, stretch.last_token, color=COLORS["band"], linewidth=0, zorder=0)
        if labels and label:
            axes.annotate(
                label,
                ((stretch.first_token + stretch.last_token) / 2, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                size=_SIZE,
                color=COLORS["ink"],
            )
    for number, event in enumerate(run.growth):
        axes.axvline(
            event.tokens,
            color=COLORS["bark"],
            linewidth=1.1,
            linestyle=(0, (5, 2)),
            zorder=1.5,
            label="growth" if number == 0 else None,
        )
    if numbers:
        _number_growths(axes, run.growth, total)
    axes.set_xlim(0, total * 1.01)


def _number_growths(axes: Axes, events: Sequence[GrowthEvent], total: float) -> None:
    """The events' numbers at the foot of their lines; events that stand too close share one label."""
    groups: list[list[int]] = []
    for index, event in enumerate(events):
        if groups and event.tokens - events[groups[-1][-1]].tokens < 0.05 * total:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        text = f"{group[0] + 1}" if len(group) == 1 else f"{group[0] + 1}–{group[-1] + 1}"
        axes.annotate(
            text,
            (events[group[-1]].tokens, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2.5, 2.5),
            textcoords="offset points",
            color=COLORS["bark"],
            size=_SIZE,
            fontweight="bold",
        )


def _line(
    axes: Axes, x: np.ndarray, y: np.ndarray, *, color: str, width: float, label: str | None = None
) -> None:
    # A line through one point cannot be seen; a dot can.
    marker = "o" if len(x) == 1 else None
    axes.plot(x, y, color=COLORS[color], linewidth=width, marker=marker, markersize=4, label=label)


def _steps(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    axes.plot(x, y, color=COLORS["leaf"], linewidth=1.7, drawstyle="steps-post")


def _corners(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only the points of a step line where it changes, and its ends."""
    keep = np.append(True, y[1:] != y[:-1])
    keep[-1] = True
    return x[keep], y[keep]


def _limits(axes: Axes, low: float, high: float) -> None:
    height = (high - low) or max(1.0, abs(high))
    axes.set_ylim(low - 0.12 * height, high + 0.06 * height)


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "growth")  # lines of the curve first
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
        fontsize=_SIZE,
        labelcolor=COLORS["ink"],
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """A straight line fitted around each value, over about a twentieth of all, and read off at the value.

    Unlike a trailing average it is not late where the loss falls steeply, nor ragged at the ends.
    """
    size = len(values)
    place = np.arange(size)
    radius = max(2, size // 40)
    low, high = np.maximum(0, place - radius), np.minimum(size, place + radius + 1)

    def mean(of: np.ndarray) -> np.ndarray:
        sums = np.append(0.0, np.cumsum(of))
        return (sums[high] - sums[low]) / (high - low)

    x = place - size / 2
    spread = mean(x * x) - mean(x) ** 2
    shared = mean(x * values) - mean(x) * mean(values)
    slope = np.divide(shared, spread, out=np.zeros(size), where=spread > 0)
    return mean(values) + slope * (x - mean(x))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS`: of each bucket its lowest and its highest, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    buckets = np.array_split(np.arange(len(x)), _MOST_POINTS // 2)
    keep = np.unique([pick for b in buckets for pick in (b[np.argmin(y[b])], b[np.argmax(y[b])])])
    return x[keep], y[keep]


# ---- rendering -----------------------------------------------------------------------------------


def to_svg(figure: Figure, name: str, title: str) -> str:
    """An <svg> element to put into a page.

    Args:
        name: prefix of its ids, unique within the page.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    # Text as text, in the page's font; ids that depend on the content alone.
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(_embedded(buffer.getvalue(), name, title))


def _embedded(svg: str, name: str, title: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    box = re.search(r'viewBox="[^"]+"', body)
    assert box is not None
    inside = body[body.index(">", body.index("<svg")) + 1 :]
    return f'<svg {box.group()} role="img" aria-label="{html.escape(title)}">{inside.strip()}'


def _themed(svg: str) -> str:
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


FIGURES: dict[str, Callable[[Run], Figure | None]] = {
    "loss": loss_figure,
    "size": size_figure,
    "rate": rate_figure,
    "jump": jump_figure,
}
"""Every picture by its name in the page."""
