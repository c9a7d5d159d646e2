"""The pictures of the continual benchmark: learned against lost, losses over stages, task matrices."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from cambia.reporting import MethodPoint, stability_plasticity

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
Columns = Callable[[str], Mapping[str, Sequence[float]]]
"""A method -> its measures, over seeds."""
SHOWN = ("naive", "replay", "ewc", "lora", "lora_per_task", "joint")
"""Methods whose matrices are drawn."""


def draw(folder: Path, name: str, cells: Cells, labels: Mapping[str, str], columns: Columns) -> None:
    """All pictures of one stream, as NAME_KIND.png."""
    points = []
    for method, label in labels.items():
        found = columns(method)
        points.append(MethodPoint(label, tuple(found["learned"]), tuple(found["forgetting"])))
    figures = {
        "tradeoff": stability_plasticity(points),
        "lost": losses_figure(cells, labels),
        "matrices": matrices_figure({method: cells[method] for method in SHOWN if method in cells}, labels),
    }
    for kind, figure in figures.items():
        figure.savefig(folder / f"{name}_{kind}.png", dpi=130, facecolor="white")


def losses_figure(cells: Cells, labels: Mapping[str, str]) -> Figure:
    """How much of a domain is lost with each further domain, the mean over domains and seeds."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = {}
    for method, runs in cells.items():
        lost: dict[int, list[float]] = {}
        for run in runs:
            matrix = run["matrix"]
            for j in range(len(run["tasks"])):
                for later in range(1, len(run["tasks"]) - j):
                    lost.setdefault(later, []).append(matrix[j + 1 + later][j] - matrix[j + 1][j])
        lines[method] = [0.0, *(statistics.fmean(lost[later]) for later in sorted(lost))]
    ranked = sorted(lines, key=lambda method: -lines[method][-1])
    colors = np.linspace(0.05, 0.95, len(ranked))
    for place, method in zip(colors, ranked, strict=True):
        line = lines[method]
        axes.plot(
            range(len(line)),
            line,
            marker="o",
            markersize=3,
            linewidth=1.3,
            color=colormaps["viridis"](place),
            label=labels[method],
        )
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_yticks(
        [-0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0], labels=["-0.3", "-0.1", "0", "0.1", "0.3", "1", "3"]
    )
    axes.minorticks_off()
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(lines[ranked[0]])))
    axes.set_xlabel("further domains since it was learned")
    axes.set_ylabel("bits per byte lost")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def matrices_figure(cells: Cells, labels: Mapping[str, str]) -> Figure:
    """The task matrices of a few methods, of the first seed, all on one scale."""
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    grid = figure.subplots(2, 3)
    values = [value for runs in cells.values() for row in runs[0]["matrix"] for value in row]
    for axes, (method, runs) in zip(grid.flat, cells.items(), strict=False):
        matrix, tasks = np.array(runs[0]["matrix"]), runs[0]["tasks"]
        image = axes.imshow(matrix, vmin=min(values), vmax=max(values), cmap="viridis_r", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            dark = value > (min(values) + max(values)) / 2
            weight = "bold" if i == j + 1 else "normal"
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                weight=weight,
                color="white" if dark else "black",
            )
        axes.set_xticks(range(len(tasks)), tasks, fontsize=7, rotation=20)
        axes.set_yticks(range(len(tasks) + 1), ["before", *(f"after {task}" for task in tasks)], fontsize=7)
        axes.set_title(labels[method], fontsize=9)
        axes.spines[:].set_visible(False)
    for axes in list(grid.flat)[len(cells) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=grid, label="bits per byte", shrink=0.6)
    return figure
