"""What a sweep costs above its runs, and whether two workers with one thread beat one with two.

    cambia bench sweep_speed --preset full

Goals: what is not a run (starting workers, imports, claims, results) takes less than 3 % of cells of 30
seconds; two workers with one thread each finish a grid of cells of a million parameters sooner than one
worker with two threads. The sides alternate; each repeat is a new sweep, text prepared before.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import arguments, keep, table
from rich.console import Console

from cambia.sweepdir import SweepReader
from cambia.sweeps import run_grid

PRESETS = {
    "quick": {"cells": 2, "steps": 5, "repeats": 1},
    "full": {"cells": 4, "steps": 230, "repeats": 3},
}
SIDES = {"1 worker, 1 thread": (1, 1), "2 workers, 1 thread": (2, 1), "1 worker, 2 threads": (1, 2)}


def grid(cells: int, steps: int, threads: int) -> dict[str, Any]:
    """`first_growth`'s model at the size that it ends with, as many steps as take half a minute."""
    return {
        "base": "fixed_size",
        "seeds": cells,
        "threads": threads,
        "settings": {
            "training.epochs": None,
            "training.steps": steps,
            "data.tasks": [{"name": "english", "source": {"type": "generated", "size_bytes": 2_000_000}}],
            "evaluation.max_bytes": 20_000,
        },
    }


def once(preset: dict[str, int], workers: int, threads: int, name: str) -> dict[str, float]:
    """Wall seconds of a sweep, and of its runs all together."""
    began = time.perf_counter()
    tree = grid(preset["cells"], preset["steps"], threads)
    folder = run_grid(tree, name=name, workers=workers, console=Console(quiet=True))
    wall = time.perf_counter() - began
    results = SweepReader(folder).results().values()
    return {"wall": wall, "runs": sum(result.seconds for result in results)}


def measured(preset: dict[str, int]) -> dict[str, list[dict[str, float]]]:
    """Every side, so many times in turn."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(preset["repeats"]):
        for side in list(SIDES) if repeat % 2 else list(SIDES)[::-1]:
            found[side].append(
                once(preset, *SIDES[side], name=f"{side.replace(', ', '-').replace(' ', '-')}-{repeat}")
            )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    rows = []
    for side, times in result["sides"].items():
        wall, runs = (statistics.median(one[key] for one in times) for key in ("wall", "runs"))
        rows.append([side, f"{wall:.1f}", f"{runs:.1f}"])
    head = ("side", "wall seconds, median", "of that runs, all together")
    return (
        f"{table(head, rows)}\n\n"
        f"Above cells of {result['cell_seconds']:.1f} s a sweep takes {100 * result['overhead']:.1f} %; "
        f"2 workers with 1 thread take {result['two_workers_against_two_threads']:.2f} of the time of "
        "1 worker with 2."
    )


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"CAMBIA_RUNS": f"{folder}/runs", "CAMBIA_CACHE": str(Path(folder) / "cache")}
        once({"cells": 1, "steps": 2}, 1, 1, "warm-up")
        sides = measured(preset)
    alone = sides["1 worker, 1 thread"]
    result = {
        "preset": preset,
        "sides": sides,
        "cell_seconds": statistics.median(one["runs"] / preset["cells"] for one in alone),
        "overhead": statistics.median(one["wall"] / one["runs"] - 1 for one in alone),
        "two_workers_against_two_threads": statistics.median(
            mine["wall"] / other["wall"]
            for mine, other in zip(sides["2 workers, 1 thread"], sides["1 worker, 2 threads"], strict=True)
        ),
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
