"""The pictures of the benchmark of routes: right routes over the prefix, and what tells new from known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""Stream -> way -> the share of right routes at each length."""


def curves_figure(
    lengths: Sequence[int], curves: Curves, labels: Mapping[str, str], goals: Mapping[str, float]
) -> Figure:
    """One panel a stream, with its goal as a dotted line."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (stream, ways) in zip(panels, curves.items(), strict=True):
        for i, (way, shares) in enumerate(ways.items()):
            axes.plot(
                lengths,
                shares,
                marker="o",
                markersize=3.5,
                linewidth=2.0 if i == 0 else 1.2,
                color=colormaps["tab10"](i),
                label=labels[way].replace("`", ""),
                zorder=9 - i,
            )
        axes.axhline(goals[stream], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("bytes of the prefix")
        axes.set_title(stream.replace("_", ", "), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of windows routed right")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def detectors_figure(
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], labels: Mapping[str, str]
) -> Figure:
    """AUROC of each score, by window and by batch: a dot for each change, a diamond for their mean.

    Args:
        scores: window or batch -> stream -> score -> one for each change.
    """
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (what, streams) in zip(panels, scores.items(), strict=True):
        for i, (stream, found) in enumerate(streams.items()):
            for row, score in enumerate(labels):
                place = -row - 0.22 * (i - (len(streams) - 1) / 2)
                values = found[score]
                axes.plot(values, [place] * len(values), ".", color=colormaps["tab10"](i), alpha=0.35)
                mean = sum(values) / len(values)
                name = stream.replace("_", ", ") if row == 0 else None
                axes.plot([mean], [place], "D", markersize=5, color=colormaps["tab10"](i), label=name)
        axes.axvline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlim(right=1.02)
        axes.set_yticks([-row for row in range(len(labels))], list(labels.values()), fontsize=8)
        axes.set_xlabel(f"AUROC of new against known text, by {what}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
