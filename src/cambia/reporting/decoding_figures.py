"""The pictures of a run whose decoding learns: loss, reward, and how far decoding has moved."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from cambia.decoding.parameters import SHORT
from cambia.reporting.curves import smoothed, thinned
from cambia.reporting.drawing import LINE_COLORS, Drawing, dress, legend_beside, line, new_figure
from cambia.reporting.run import Run

_NO_PART = ("best", "divergence", "entropy")
"""What is measured beside the parts of a reward."""


def decoding_drawing(run: Run) -> Drawing | None:
    """Loss, reward and parameter drift over the steps of a run; None where decoding does not learn."""
    if not run.decoding:
        return None
    losses = np.isfinite(run.metrics["loss"])
    figure = new_figure(5.4 if losses.any() else 3.8)
    panels = list(figure.subplots(3 if losses.any() else 2, 1, sharex=True))
    for axes in panels:
        dress(axes)
    if losses.any():
        _loss(panels.pop(0), run.metrics["step"][losses], run.metrics["loss"][losses])
    _reward(panels[0], run)
    _drift(panels[1], run)
    panels[1].set_xlabel("steps")
    return Drawing(
        figure,
        "What decoding learns for, with its parts, measured on what each of its steps has written (of a "
        "search: the mean over its candidates). Below: how far each part has moved from where it began; "
        "of weights, the one that moved furthest. The loss stands above where weights learn too. To find it: "
        "tokens that were written for that, in the table.",
    )


def _loss(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    line(axes, *thinned(steps, losses), color="pale-leaf", width=0.8)
    line(axes, *thinned(steps, smoothed(losses)), color="leaf", width=1.5)
    axes.set_ylabel("loss (nats per token)")


def _reward(axes: Axes, run: Run) -> None:
    steps = np.array([entry["step"] for entry in run.decoding], dtype=float)
    parts = [name for name in run.decoding[0]["measured"] if name not in _NO_PART]
    for i, name in enumerate(parts if len(parts) > 1 else ()):
        values = np.array([entry["measured"][name] for entry in run.decoding])
        color = LINE_COLORS[(i + 1) % len(LINE_COLORS)]
        line(axes, steps, values, color=color, width=0.9, label=name)
    rewards = np.array([entry["reward"] for entry in run.decoding])
    line(axes, steps, rewards, color="leaf", width=1.6, label="reward")
    axes.set_ylabel("reward")
    legend_beside(axes)


def _drift(axes: Axes, run: Run) -> None:
    names = list(dict.fromkeys(name for entry in run.decoding for name in entry["drift"]))
    steps = np.array([0, *(entry["step"] for entry in run.decoding)], dtype=float)
    for i, name in enumerate(names):
        moved = np.array([0.0, *(entry["drift"].get(name, 0.0) for entry in run.decoding)])
        label = SHORT.get(name, name.replace("_", " "))
        line(axes, steps, moved, color=LINE_COLORS[i % len(LINE_COLORS)], width=1.4, label=label)
    axes.set_ylabel("moved by")
    legend_beside(axes)
