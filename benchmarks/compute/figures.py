"""The picture of `compute_to_loss`: decayed losses over what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure

from compute.curves import Ran

_MARKERS = "oDsv^P*Xdp<>h8"


def curves_figure(arms: Mapping[str, Sequence[Ran]]) -> Figure:
    """Lines for sizes that never change, which were scored at several ends, dots for the other arms.

    Small dots are single seeds, large ones means.
    """
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = [arm for arm in arms if len(arms[arm][0].ends) > 1]
    others = [arm for arm in arms if arm not in sizes]
    for i, arm in enumerate(sizes):
        grey = str(0.1 + 0.75 * i / len(sizes))
        places = [*zip(*(run.ends for run in arms[arm]), strict=True)]
        flops = [statistics.fmean(end.flops / 1e12 for end in ends) for ends in places]
        bits = [statistics.fmean(end.test for end in ends) for ends in places]
        axes.plot(flops, bits, "-o", color=grey, markersize=4, label=f"{arm}, never grows", zorder=2)
    for i, arm in enumerate(others):
        color = colormaps["tab20"](i % 20)
        dots = [(run.last.flops / 1e12, run.last.test) for run in arms[arm]]
        axes.plot(*zip(*dots, strict=True), ".", color=color, markersize=4, alpha=0.6, zorder=3)
        mean = [statistics.fmean(each) for each in zip(*dots, strict=True)]
        size, order = (10, 9) if arm == "B-depth" else (6, 8)
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(*mean, marker, color=color, markersize=size, label=arm, zorder=order)
    axes.set_xscale("log")
    span = sorted(end.flops / 1e12 for runs in arms.values() for run in runs for end in run.ends)
    steps = [span[0] * (span[-1] / span[0]) ** (i / 5) for i in range(6)]
    axes.set_xticks(steps, [f"{step:.3g}" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("TFLOP, all of training and growing")
    axes.set_ylabel("test bits per byte, decayed")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
