"""What a sweep costs above its runs, and whether two workers with one thread beat one with two.

    cambia bench sweep_speed --preset full

Goals: what is not a run (starting launcher and worker, imports, claims, results, the report) takes less than
3 % of cells of 30 seconds; two workers with one thread each finish a grid of cells of a million parameters
sooner than one worker with two threads.

The first is measured on one call of the command, from its start to its end. For the second the sides take
turns, each a new sweep. Text is prepared before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from harness import arguments, keep, table
from rich.console import Console

from cambia.sweepdir import SweepReader
from cambia.sweeps import run_grid

PRESETS = {
    "quick": {"grid": 2, "cells": 2, "steps": 5, "repeats": 1},
    "full": {"grid": 12, "cells": 4, "steps": 115, "repeats": 3},
}
SIDES = {"2 workers, 1 thread": (2, 1), "1 worker, 2 threads": (1, 2)}


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


def command(folder: Path, cells: int, steps: int) -> dict[str, float]:
    """Wall seconds of `cambia sweep` with one worker, and of its runs all together."""
    path = folder / "command.yaml"
    path.write_text(yaml.safe_dump(grid(cells, steps, 1)), encoding="utf-8")
    began = time.perf_counter()
    words = [sys.executable, "-m", "cambia", "sweep", str(path), "--workers", "1"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"wall": time.perf_counter() - began, "runs": runs_of("command")}


def once(name: str, cells: int, steps: int, workers: int, threads: int) -> dict[str, float]:
    """Wall seconds of a sweep in a launcher that is there already, and of its runs all together."""
    began = time.perf_counter()
    run_grid(grid(cells, steps, threads), name=name, workers=workers, console=Console(quiet=True))
    return {"wall": time.perf_counter() - began, "runs": runs_of(name)}


def runs_of(name: str) -> float:
    """Seconds of all runs of a sweep."""
    return sum(result.seconds for result in SweepReader(name).results().values())


def compared(preset: Mapping[str, int]) -> dict[str, list[dict[str, float]]]:
    """Both sides, so many times in turn."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(preset["repeats"]):
        for side in list(SIDES) if repeat % 2 else list(SIDES)[::-1]:
            workers, threads = SIDES[side]
            name = f"{workers}x{threads}-{repeat}"
            found[side].append(once(name, preset["cells"], preset["steps"], workers, threads))
    return found


def markdown(result: Mapping[str, Any]) -> str:
    rows = [
        [side, *(f"{statistics.median(one[key] for one in times):.1f}" for key in ("wall", "runs"))]
        for side, times in result["sides"].items()
    ]
    told, cells = result["command_line"], result["preset"]["grid"]
    return (
        f"{table(('side', 'wall seconds, median', 'of its runs, all together'), rows)}\n\n"
        f"2 workers with 1 thread take {ratio(result):.2f} of the time of 1 worker with 2. One call of "
        f"`cambia sweep` with {cells} cells of {told['runs'] / cells:.1f} s takes {overhead(result):.1f} % "
        f"more than its runs, {told['wall'] - told['runs']:.1f} s in all."
    )


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    told, cells = result["command_line"], result["preset"]["grid"]
    return {
        f"a sweep of {cells} cells of {told['runs'] / cells:.0f} s, imports and report counted: time above "
        "that of its runs": f"{overhead(result):.1f} %",
        "2 workers with 1 thread against 1 worker with 2 threads: time": f"{ratio(result):.2f}",
    }


def overhead(result: Mapping[str, Any]) -> float:
    """What the command takes above its runs, %."""
    return 100 * (result["command_line"]["wall"] / result["command_line"]["runs"] - 1)


def ratio(result: Mapping[str, Any]) -> float:
    """Wall time of two workers over that of two threads, the median of the pairs."""
    pairs = zip(*(result["sides"][side] for side in SIDES), strict=True)
    return statistics.median(one["wall"] / other["wall"] for one, other in pairs)


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"CAMBIA_RUNS": f"{folder}/runs", "CAMBIA_CACHE": f"{folder}/cache"}
        once("warm-up", 1, 2, 1, 1)
        result = {
            "preset": preset,
            "command_line": command(Path(folder), preset["grid"], preset["steps"]),
            "sides": compared(preset),
        }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
