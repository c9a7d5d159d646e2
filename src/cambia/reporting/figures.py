"""The pictures of a run's report, and the curves of runs side by side.

svg = to_svg(loss_figure(run), "loss", "Training and validation loss over tokens")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from cambia.records import GrowthEvent
from cambia.reporting import units
from cambia.reporting.comparison import Comparison
from cambia.reporting.curves import corners, smoothed, thinned
from cambia.reporting.drawing import (
    COLORS,
    LETTER_SIZE,
    LETTERS,
    LINE_COLORS,
    LINE_DASHES,
    dots,
    dress,
    legend,
    line,
    new_figure,
    one_axes,
)
from cambia.reporting.run import Run

_MOST_DOTS = 90


# ---- the pictures --------------------------------------------------------------------------------


def loss_figure(run: Run) -> Figure | None:
    """Training and validation loss over tokens, None where no loss is logged."""
    tokens, loss = run.metrics["tokens"], run.metrics["loss"]
    if not np.isfinite(loss).any():
        return None
    figure, axes = one_axes(3.3)
    mark_stretches(axes, run, labels=True)
    raw, smooth = [], []
    for stretch in run.stretches():
        keep = np.isfinite(loss[stretch.rows])
        x, y = tokens[stretch.rows][keep], loss[stretch.rows][keep]
        raw += [line(axes, *thinned(x, y), color="pale-leaf", width=0.6)]
        smooth += [line(axes, *thinned(x, smoothed(y)), color="leaf", width=1.7)]
    validation = _draw_validation(axes, run)
    # A single exploded step must not press everything else flat: the smoothed line sets the scale.
    finite = loss[np.isfinite(loss)]
    high = max(float(np.max(line.get_ydata(), initial=-np.inf)) for line in smooth)
    _limits(axes, float(finite.min()), float(np.max(validation, initial=high)))
    above = int((finite > axes.get_ylim()[1]).sum())
    raw[0].set_label(f"each logged step ({above:,} above the axis)" if above else "each logged step")
    smooth[0].set_label("smoothed")
    axes.set_ylabel("loss (nats per token)")
    tokens_axis(axes)
    legend(figure, axes)
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
            line(axes, *thinned(x, y), color="sky", width=1.1, label=label)
        else:
            dots(axes, x, y, color="sky", size=3.2, label=label)
        label = None
    return loss[keep]


def size_figure(run: Run) -> Figure | None:
    """Parameters, and floating-point operations so far, over tokens."""
    tokens = run.metrics["tokens"]
    if not len(tokens):
        return None
    figure = new_figure(3.7)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes in (upper, lower):
        dress(axes)
        mark_stretches(axes, run, labels=axes is upper, numbers=axes is lower)
    x = np.append(0, tokens)
    start = run.parameters_start if run.parameters_start is not None else run.metrics["parameters"][0]
    # A row holds what the model is after its step: the step line stands at the old size until then.
    _steps(upper, *corners(x, np.append(start, run.metrics["parameters"])))
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
    line(lower, *thinned(x, np.append(0.0, run.metrics["flops"])), color="leaf", width=1.7, label="spent")
    lower.set_ylabel("operations (FLOP)")
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.flops(value) if value else "0"))
    lower.set_ylim(bottom=0)
    tokens_axis(lower)
    legend(figure, lower)
    return figure


def rate_figure(run: Run) -> Figure | None:
    """Learning rate and gradient norm over tokens."""
    tokens, rate = run.metrics["tokens"], run.metrics["learning_rate"]
    if not np.isfinite(rate).any():
        return None
    norm = run.metrics["grad_norm"]
    has_norm = bool((np.isfinite(norm) & (norm > 0)).any())
    figure = new_figure(3.7 if has_norm else 2.2)
    panels = np.atleast_1d(figure.subplots(2 if has_norm else 1, 1, sharex=True))
    for axes in panels:
        dress(axes)
        mark_stretches(axes, run, labels=axes is panels[0], numbers=axes is panels[-1])
    keep = np.isfinite(rate)
    line(panels[0], *thinned(tokens[keep], rate[keep]), color="leaf", width=1.7)
    panels[0].set_ylabel("learning rate")
    panels[0].set_ylim(0, (float(np.nanmax(rate)) or 1.0) * 1.15)
    if has_norm:
        for stretch in run.stretches():
            keep = np.isfinite(norm[stretch.rows]) & (norm[stretch.rows] > 0)
            x, y = tokens[stretch.rows][keep], norm[stretch.rows][keep]
            line(panels[1], *thinned(x, y), color="pale-leaf", width=0.6)
            line(panels[1], *thinned(x, smoothed(y)), color="leaf", width=1.7)
        panels[1].set_ylabel("gradient norm\n(before clipping)")
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_minor_locator(NullLocator())
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tokens_axis(panels[-1])
    return figure


def jump_figure(run: Run) -> Figure | None:
    """Loss on the check batch right before and after each growth, with the jump; None without growth."""
    names, pairs = [], []
    for number, event in enumerate(run.growth, 1):
        if event.loss_before is not None and event.loss_after is not None:
            names.append(_event_name(number, event))
            pairs.append((event.loss_before, event.loss_after))
    if not pairs:
        return None
    figure, axes = one_axes(0.85 + 0.42 * len(pairs))
    for row, (before, after) in enumerate(pairs):
        axes.plot([before, after], [row, row], color=COLORS["bark"], linewidth=1.5, zorder=2)
        axes.annotate(
            f"jump {units.jump(before, after)}",
            (1, row),
            xycoords=axes.get_yaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            size=LETTER_SIZE,
            color=COLORS["ink"],
        )
    rows = range(len(pairs))
    dots(axes, [before for before, _ in pairs], rows, color="sky", size=9, hollow=True, label="before")
    dots(axes, [after for _, after in pairs], rows, color="bark", size=4.5, label="after")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    # Never so close that a rounding error looks like a jump.
    low, high = min(map(min, pairs)), max(map(max, pairs))
    middle, reach = (low + high) / 2, max((high - low) / 2, 0.05)
    axes.set_xlim(middle - 1.25 * reach, middle + 1.25 * reach)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("loss on the check batch (nats per token)")
    legend(figure, axes)
    return figure


def _event_name(number: int, event: GrowthEvent) -> str:
    name = units.operators(event.operators)
    return f"{number}  {name if len(name) <= 30 else name[:29] + '…'}"


def curves_figure(comparison: Comparison) -> Figure:
    """Validation loss of every run over tokens and over operations, with growth marked."""
    figure = new_figure(3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("tokens", "flops"), strict=True):
        dress(axes)
        for i, row in enumerate(comparison.rows):
            metrics = row.run.metrics
            known = np.isfinite(metrics["validation_bits_per_byte"])
            x, y = thinned(metrics[column][known].astype(float), metrics["validation_bits_per_byte"][known])
            style = LINE_DASHES[i // len(LINE_COLORS) % len(LINE_DASHES)]
            color = COLORS[LINE_COLORS[i % len(LINE_COLORS)]]
            axes.plot(x, y, color=color, linestyle=style, linewidth=1.6, label=row.run.name)
            for event in row.run.growth:
                place = int(np.searchsorted(metrics["step"], event.step))
                at = float(metrics[column][min(place, len(metrics[column]) - 1)])
                height = float(np.interp(at, x, y))
                axes.plot([at], [height], marker="D", color=color, markersize=4.5, linestyle="none")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    # The first tenth of a run falls so steeply that what the runs differ in would be a line.
    late = [y[x >= 0.1 * x[-1]] for x, y in _measured(comparison)]
    lowest, highest = min(map(np.min, late)), max(map(np.max, late))
    panels[0].set_ylim(lowest - 0.05 * (highest - lowest), highest)
    panels[0].set_ylabel("validation (bits per byte)")
    panels[0].set_xlabel("training tokens (diamonds: growth)")
    panels[1].set_xlabel("operations (FLOP)")
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8
    )
    return figure


def _measured(comparison: Comparison) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each run the tokens and the bits per byte of its measurements."""
    found = []
    for row in comparison.rows:
        bits = row.run.metrics["validation_bits_per_byte"]
        known = np.isfinite(bits)
        found.append((row.run.metrics["tokens"][known].astype(float), bits[known]))
    return found


# ---- their parts ---------------------------------------------------------------------------------


def task_labels(run: Run) -> list[str]:
    """What stands above each task's stretch: their names, or their numbers where a name does not fit."""
    stretches = run.stretches()
    total = max(1, stretches[-1].last_token) if stretches else 1
    room = [int(LETTERS * (s.last_token - s.first_token) / total) for s in stretches]
    if all(len(s.task) <= letters for s, letters in zip(stretches, room, strict=True)):
        return [s.task for s in stretches]
    numbers = [str(number) for number in range(1, len(stretches) + 1)]
    return [number if len(number) <= letters else "" for number, letters in zip(numbers, room, strict=True)]


def mark_stretches(axes: Axes, run: Run, *, labels: bool, numbers: bool = True) -> None:
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
                size=LETTER_SIZE,
                color=COLORS["ink"],
                parse_math=False,
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
        text = f"{group[0] + 1}" if len(group) == 1 else f"{group[0] + 1}-{group[-1] + 1}"
        axes.annotate(
            text,
            (events[group[-1]].tokens, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2.5, 2.5),
            textcoords="offset points",
            color=COLORS["bark"],
            size=LETTER_SIZE,
            fontweight="bold",
        )


def _steps(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    axes.plot(x, y, color=COLORS["leaf"], linewidth=1.7, drawstyle="steps-post")


def _limits(axes: Axes, low: float, high: float) -> None:
    height = (high - low) or max(1.0, abs(high))
    axes.set_ylim(low - 0.12 * height, high + 0.06 * height)


def tokens_axis(axes: Axes) -> None:
    """Training tokens, across."""
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.count(value)))


FIGURES: dict[str, Callable[[Run], Figure | None]] = {
    "loss": loss_figure,
    "size": size_figure,
    "rate": rate_figure,
    "jump": jump_figure,
}
"""Every picture by its name in the page."""
