"""What a sweep would take, before it is started: `cambia sweep --dry-run`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cambia.experiment import estimate
from cambia.sweepdir import Result
from cambia.sweeps.grid import Cell

_TIMED = 3
"""Cells of which a few steps are run to see how long they would take."""


@dataclass(frozen=True)
class SweepEstimate:
    """How much is done and how long the rest would take."""

    cells: int
    finished: int
    failed: int
    cell_seconds: float | None
    """Of one cell, the median; None where nothing is left to do."""
    measured: str
    """Where that comes from, in words."""

    @property
    def left(self) -> int:
        return self.cells - self.finished - self.failed

    def seconds(self, workers: int) -> float:
        """Until the end, with so many cells at a time, each as fast as one alone."""
        return (self.cell_seconds or 0.0) * -(-self.left // workers)


def estimate_sweep(cells: Sequence[Cell], results: Mapping[str, Result]) -> SweepEstimate:
    """Count, and say how long a cell takes: as long as those that have finished, or by a few real steps."""
    states = Counter(results[cell.hash].status for cell in cells if cell.hash in results)
    left = [cell for cell in cells if cell.hash not in results]
    known = [result.seconds for result in results.values() if result.status == "finished"]
    seconds, measured = None, ""
    if known:
        seconds, measured = statistics.median(known), f"the {len(known)} that have finished"
    elif left:
        timed = left[:: max(1, len(left) // _TIMED)][:_TIMED]
        seconds = statistics.median(_seconds(cell) for cell in timed)
        measured = f"a few steps of {len(timed)} of them, scoring and saving not counted"
    return SweepEstimate(len(cells), states["finished"], states["failed"], seconds, measured)


def _seconds(cell: Cell) -> float:
    experiment = cell.experiment()
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    return estimate(experiment).seconds
