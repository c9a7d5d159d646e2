"""The picture of `compute_to_loss`: decayed losses over what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from compute.curves import Ended, Ran

_MARKERS = "oDsv^P*Xdp<>h8"


def over_runs(runs: Sequence[Ran]) -> list[Ended]:
    """The mean of each end over seeds."""
    return [
        Ended(
            *(
                statistics.fmean(each)
                for each in zip(*((e.flops, e.test, e.valid) for e in ends), strict=True)
            )
        )
        for ends in zip(*(run.ends for run in runs), strict=True)
    ]


def curves_figure(arms: Mapping[str, Sequence[Ran]]) -> Figure:
    """Lines for sizes that never change, which were scored at several ends, dots for the other arms.

    Small dots are single seeds, large ones means.
    """
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = [arm for arm in arms if len(arms[arm][0].ends) > 1]
    others = [arm for arm in arms if arm not in sizes]
    greys = dict(zip(sizes, ("0.1", "0.45", "0.6", "0.75", "0.85"), strict=False))
    for arm in sizes:
        mean = over_runs(arms[arm])
        line = [end.flops / 1e12 for end in mean], [end.test for end in mean]
        axes.plot(*line, "-o", color=greys[arm], markersize=4, label=f"{arm}, never grows", zorder=2)
    for i, arm in enumerate(others):
        color = colormaps["tab20"](i % 20)
        dots = [(run.last.flops / 1e12, run.last.test) for run in arms[arm]]
        axes.plot(*zip(*dots, strict=True), ".", color=color, markersize=4, alpha=0.6, zorder=3)
        mean = [statistics.fmean(each) for each in zip(*dots, strict=True)]
        marker, size = _MARKERS[i % len(_MARKERS)], 10 if arm == "B-depth" else 6
        axes.plot(
            *mean, marker, color=color, markersize=size, linestyle="none", label=arm, zorder=9 - (i > 0)
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    span = sorted(end.flops / 1e12 for runs in arms.values() for run in runs for end in run.ends)
    steps = [span[0] * (span[-1] / span[0]) ** (i / 5) for i in range(6)]
    axes.set_xticks(steps, [f"{step:.3g}" for step in steps])
    axes.set_xlabel("TFLOP, all of training and growing")
    axes.set_ylabel("test bits per byte, decayed")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
