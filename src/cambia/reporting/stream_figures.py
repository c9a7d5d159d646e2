"""The picture of a stream from which experts were learned: what was new, whose its rows were, how certain.

drawing = stream_drawing(run)
"""

# N logged batches, B buckets of them, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cambia.reporting.curves import smoothed, thinned
from cambia.reporting.drawing import (
    COLORS,
    LINE_COLORS,
    Drawing,
    dots,
    dress,
    legend_beside,
    line,
    new_figure,
)
from cambia.reporting.figures import mark_stretches, tokens_axis
from cambia.reporting.run import Run
from cambia.reporting.sweeps.tables import shortened

_MOST_BUCKETS = 240
_MOST_PARTS = 7  # with a band of their own
_LONGEST = 18  # letters of a name
_DECISIONS: dict[str, dict[str, Any]] = {
    "sealed": {"marker": "s", "color": COLORS["leaf"]},
    "dropped": {"marker": "X", "color": COLORS["bark"]},
    "turned down": {"marker": "v", "color": COLORS["bark"]},
    "reopened": {"marker": "^", "color": COLORS["sky"]},
    "released": {"marker": "o", "color": COLORS["sky"], "markerfacecolor": "none"},
}
"""How each is marked; growth is marked as in every other picture."""


def stream_drawing(run: Run) -> Drawing | None:
    """Novelty and maturity with what was decided, each expert's share of the rows, and how certain that was.

    None where nothing of the kind was measured.
    """
    use = [entry for entry in run.stream if "use" in entry]
    if "novelty" not in run.metrics or not use:
        return None
    figure = new_figure(6.2)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1.15, 1, 1))
    for axes in panels:
        dress(axes)
        mark_stretches(axes, run, labels=axes is panels[0], numbers=axes is panels[0])
    _novelty(panels[0], run)
    others = _use(panels[1], use)
    _certainty(panels[2], run)
    tokens_axis(panels[2])
    for axes in panels:
        legend_beside(axes, without="growth")
    return Drawing(
        figure,
        "Above: the evidence that something new has come (at 1 an expert may grow, dashed), how many rows "
        "are strange to all that is known, how far the expert that is taught is from mature (at 1), and what "
        "was decided. In the middle: whose the rows of the stream are; white is nobody's, or the model's own."
        f"{others} Below: of rows that are known, how probable it is, by how strange they are, that they are "
        "the expert's that they were taken for, and the entropy between all.",
    )


def _known(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of a column, where it was measured."""
    values = run.metrics.get(name, np.full(len(run.metrics["tokens"]), np.nan))
    keep = np.isfinite(values)
    return run.metrics["tokens"][keep], values[keep]


def _novelty(axes: Axes, run: Run) -> None:
    x, strange = _known(run, "novel_rows")
    rows = thinned(x, strange)
    axes.fill_between(*rows, step="pre", color=COLORS["pale-leaf"], linewidth=0, label="strange rows")
    line(axes, *thinned(*_known(run, "novelty")), color="leaf", width=1.4, label="evidence of something new")
    x, maturity = _known(run, "maturity")
    if len(x):
        dots(axes, x, maturity, color="bark", size=3.2, label="maturity")
    for what, style in _DECISIONS.items():
        at = [entry["tokens"] for entry in run.stream if entry.get("what") == what]
        if at:
            axes.plot(at, [1.12] * len(at), linestyle="none", markersize=5, label=what, zorder=4, **style)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylabel("novelty, maturity")


def _use(axes: Axes, use: Sequence[Mapping[str, Any]]) -> str:
    """Bands of the experts' shares; what to say of those that have none of their own."""
    counts: dict[str, int] = {}
    for entry in use:
        for part, rows in entry["use"].items():
            counts[part] = counts.get(part, 0) + rows
    largest = set(sorted(counts, key=lambda part: -counts[part])[:_MOST_PARTS])
    shown = [part for part in counts if part in largest]  # in the order in which they came
    rest = len(counts) - len(shown)
    shares = np.array([[entry["use"].get(part, 0) / entry["rows"] for part in shown] for entry in use])
    if rest:
        every = np.array([sum(entry["use"].values()) / entry["rows"] for entry in use])
        shares = np.column_stack([shares.reshape(len(use), -1), every - shares.sum(1)])
    x, bands = _bucketed(np.array([entry["tokens"] for entry in use], dtype=float), shares)
    names = [*(shortened(part, _LONGEST) for part in shown), *([f"{rest} more"] if rest else [])]
    colors = [COLORS[LINE_COLORS[i % len(LINE_COLORS)]] for i in range(len(names))]
    if names:
        bodies = axes.stackplot(x, bands.T, labels=names, colors=colors, linewidth=0, step="pre")
        for i, body in enumerate(bodies):
            body.set_alpha(0.85 if i < len(LINE_COLORS) else 0.4)
    axes.set_ylim(0, 1)
    axes.set_ylabel("rows")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return f" {rest} experts with fewer rows share a band." if rest else ""


def _bucketed(x: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (N, E) -> (B,) and (B, E): means of neighbors, no more than can be seen."""
    if len(x) <= _MOST_BUCKETS:
        return x, shares
    buckets = np.array_split(np.arange(len(x)), _MOST_BUCKETS)
    return np.array([x[b].mean() for b in buckets]), np.array([shares[b].mean(0) for b in buckets])


def _certainty(axes: Axes, run: Run) -> None:
    measured = {name: _known(run, f"routing_{name}") for name in ("confidence", "entropy")}
    for (x, values), color in zip(measured.values(), ("pale-leaf", "rule"), strict=True):
        line(axes, *thinned(x, values), color=color, width=0.6)
    shown = (("leaf", "confidence"), ("sky", "entropy (nats)"))
    for (x, values), (color, label) in zip(measured.values(), shown, strict=True):
        line(axes, *thinned(x, smoothed(values)), color=color, width=1.5, label=label)
    highest = max(float(np.max(values, initial=1)) for _, values in measured.values())
    axes.set_ylim(0, 1.06 * highest)
    axes.set_ylabel("certainty of known rows")
