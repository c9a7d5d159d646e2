"""The launcher: takes a grid to exactly one result per cell, whatever happens on the way.

    >>> folder = run_grid("grid.yaml", workers=2)

It may be killed and started again at any time, and several may work on one folder: what counts is in the
sweep directory (`cambia.sweepdir`), and a cell that was begun goes on where it had saved.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cambia import sweepdir
from cambia.config import to_yaml
from cambia.errors import ConfigError, SweepError
from cambia.sweepdir import ERRORS, LOGS, SweepWriter, is_settled
from cambia.sweeps.display import Display
from cambia.sweeps.grid import Cell, Grid, cells_of, chosen, plain_grid, read_grid
from cambia.sweeps.pool import Pool, Workers
from cambia.sweeps.search import refuse_changed
from cambia.sweeps.supply import Listed, Searched, Supply
from cambia.sweeps.worker import Outcome, Task, failed
from cambia.training.interrupts import Interrupts

_LOOK_SECONDS = 0.5
"""How often clocks are looked at, and cells that other launchers have."""
_ALIKE = 3
"""So many cells that fail alike before any has finished end the sweep."""
_SAVING_SECONDS = 60.0
"""What cells have for saving when the sweep is interrupted."""


@dataclass
class Limits:
    """How much of a sweep this launcher takes on."""

    only: Sequence[str] = ()
    """``"axis=value"``; a cell must match all of them."""
    most: int | None = None
    """So many cells are started at most."""
    retry: bool = False
    """Cells that have failed are run again."""


def run_grid(
    grid: str | Path | Mapping[str, Any] | Grid,
    *,
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    limits: Limits | None = None,
    yes: bool = False,
    ray: bool | str = False,
    console: Console | None = None,
) -> Path:
    """Run every cell of a grid that has no result yet.

    Args:
        grid: a YAML file, a mapping, or a `Grid`.
        name: of the sweep's folder under runs/; an existing sweep goes on.
        overrides: dotted settings for all cells.
        workers: cells at a time, instead of the grid's own.
        limits: run only some of them.
        yes: make the cells even if there are very many.
        ray: run them on the Ray cluster at this address, or with True on a Ray of this machine's own.
        console: where progress is shown; by default standard error.

    Returns:
        The sweep's folder, for `cambia.reporting.load_sweep`.

    Raises:
        ConfigError: the grid is not one; nothing was run.
        SweepError: the first cells all failed alike, and so would the others.
        KeyboardInterrupt: it was interrupted; cells have saved, and the same call goes on.
    """
    grid = read_grid(grid, overrides)
    limits = limits or Limits()
    cells = cells_of(grid, yes=yes)
    wanted = chosen(cells, limits.only, grid)
    sweep = open_sweep(grid, cells, name)
    supply: Supply = Listed(wanted, sweep.results(), retry=limits.retry)
    if grid.search is not None:
        supply = Searched(grid, wanted, sweep, retry=limits.retry)
    launch = Launch(grid, sweep, supply, limits, console or Console(stderr=True))
    pool = _workers(grid, sweep.folder, workers, ray)
    try:
        launch.run(pool)
    finally:
        pool.close()
    return sweep.folder


def open_sweep(grid: Grid, cells: Sequence[Cell], name: str | None = None) -> SweepWriter:
    """The sweep's folder, with what it consists of written down."""
    grid.name = name or grid.name or "sweep"  # so that grid.yaml goes on here
    folder = sweepdir.sweep_folder(grid.name)
    if grid.search is not None:
        refuse_changed(grid.search, folder)
    try:
        sweep = SweepWriter(folder)
        sweep.write_grid(to_yaml(plain_grid(grid)), None if grid.search else [cell.record for cell in cells])
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ConfigError(f"{folder} cannot be written: set CAMBIA_RUNS to a folder that can") from None
    return sweep


def _workers(grid: Grid, folder: Path, count: int | None, ray: bool | str) -> Workers:
    if ray:
        from cambia.sweeps.on_ray import RayWorkers

        return RayWorkers(
            folder, count or grid.workers, threads=grid.threads, address=None if ray is True else ray
        )
    gpus = torch.cuda.device_count()
    return Pool(folder, count or worker_count(grid), threads=grid.threads, gpus=gpus)


def worker_count(grid: Grid) -> int:
    """Cells at a time: the grid's own, one for each GPU, or as many as the cores have room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return grid.workers or torch.cuda.device_count() or max(1, cores // grid.threads)


class Launch:
    """One launcher at work on a sweep."""

    def __init__(self, grid: Grid, sweep: SweepWriter, supply: Supply, limits: Limits, console: Console):
        self.grid, self.sweep, self.supply, self.limits = grid, sweep, supply, limits
        self.began = time.monotonic()
        self.started = 0
        self.running: dict[str, tuple[Task, float]] = {}
        """Hash -> task and when it was started, by the monotonic clock."""
        self.elsewhere: dict[str, Cell] = {}
        """Cells that other launchers work on."""
        self.losses: Counter[str] = Counter()
        """Hash -> workers that died of it."""
        self.errors: list[str] = []
        """Of cells that failed here, until one has finished."""
        self.late: set[str] = set()
        self.has_waited = False
        known = sweep.results()
        self.skipped = sum(is_settled(known.get(cell.hash), limits.retry) for cell in supply.records())
        self.display = Display(console, supply.total, self.skipped)

    def run(self, workers: Workers) -> None:
        """Until every cell has a result, or it is interrupted."""
        with Interrupts() as interrupts, self.display:
            try:
                while not interrupts.requested:
                    self._fill(workers)
                    if not self.running and not self.elsewhere:
                        break
                    self._take(workers.wait(_LOOK_SECONDS), workers)
                    self._look(workers)
                    self._snapshot()
                    self._stop_if_all_fail_alike()
                if interrupts.requested:
                    self._interrupt(workers)
                if self.supply.refused:
                    count, last = len(self.supply.refused), self.supply.refused[-1]
                    self.display.say(f"{count} trials of the search were no experiments, for example: {last}")
            finally:
                self._snapshot()
                self.sweep.write_table(self.supply.records())

    def _fill(self, workers: Workers) -> None:
        while workers.free > 0 and (self.limits.most is None or self.started < self.limits.most):
            cell = self.supply.next()
            if cell is None:
                return
            self.started += 1
            self._start(cell, workers)

    def _start(self, cell: Cell, workers: Workers) -> None:
        task = Task(cell, 1 + self.losses[cell.hash], self.limits.retry, self.grid.keep_checkpoints)
        self.running[cell.hash] = (task, time.monotonic())
        workers.start(task)
        self.display.started(cell.name)

    def _take(self, outcomes: Sequence[Outcome], workers: Workers) -> None:
        for outcome in outcomes:
            task, began = self.running.pop(outcome.hash)
            cell = task.cell
            self.display.stopped(cell.name)
            if outcome.kind == "died":
                self._died(task, outcome, workers)
            elif outcome.kind == "taken":
                self.elsewhere[cell.hash] = cell
            elif outcome.kind != "interrupted":
                self._counted(cell, time.monotonic() - began)

    def _died(self, task: Task, outcome: Outcome, workers: Workers) -> None:
        hash = task.cell.hash
        self.losses[hash] += 1
        error = f"its worker died ({outcome.error}) {self.losses[hash]} times; what it printed is in {LOGS}/"
        if hash in self.late:
            error = f"it took longer than cell_seconds: {self.grid.cell_seconds:g}"
        elif self.losses[hash] < self.grid.attempts:
            self._start(task.cell, workers)
            return
        failed(self.sweep, task, error)
        self._counted(task.cell, 0.0)

    def _counted(self, cell: Cell, seconds: float) -> None:
        """A cell has a result, from here or elsewhere."""
        result = self.sweep.results().get(cell.hash)
        if result is None:  # the process that has it by now will say
            self.elsewhere[cell.hash] = cell
            return
        if result.status == "finished":
            self.errors = [""]
        else:
            self.errors.append(result.error or "")
        self.display.counted(result, seconds)
        self.supply.done(cell, result)

    def _look(self, workers: Workers) -> None:
        """At the clock, and at cells that other launchers have."""
        if self.grid.cell_seconds is not None:
            for hash, (_, began) in self.running.items():
                if hash not in self.late and time.monotonic() - began > self.grid.cell_seconds:
                    self.late.add(hash)
                    workers.kill(hash)
        if not self.elsewhere:
            return
        results = self.sweep.results()
        for hash, cell in list(self.elsewhere.items()):
            if is_settled(results.get(hash), self.limits.retry):
                del self.elsewhere[hash]
                self._counted(cell, 0.0)
            elif workers.free > 0 and not self.running:
                # Nothing else is left to do: perhaps whoever had it is dead.
                self._say_waiting()
                del self.elsewhere[hash]
                self._start(cell, workers)
                time.sleep(_LOOK_SECONDS)

    def _say_waiting(self) -> None:
        if not self.has_waited:
            self.has_waited = True
            self.display.say("the rest is being worked on by another launcher; waiting for it")

    def _stop_if_all_fail_alike(self) -> None:
        if len(self.errors) >= _ALIKE and len(set(self.errors)) == 1 and self.errors[0]:
            raise SweepError(
                f"the first {len(self.errors)} cells failed alike: {self.errors[0]} "
                f"({self.sweep.folder / ERRORS} has more; when it is repaired: the same command with --retry)"
            )

    def _interrupt(self, workers: Workers) -> None:
        """Let cells save, then leave."""
        self.display.say("saving; a second Ctrl-C ends at once")
        workers.interrupt()
        deadline = time.monotonic() + _SAVING_SECONDS
        while self.running and time.monotonic() < deadline:
            for outcome in workers.wait(_LOOK_SECONDS):
                task, began = self.running.pop(outcome.hash)
                if outcome.kind in ("finished", "failed"):
                    self._counted(task.cell, time.monotonic() - began)
        self.display.say("the same command goes on from here")
        raise KeyboardInterrupt

    def _snapshot(self) -> None:
        results = self.sweep.results()
        states = Counter(results[cell.hash].status for cell in self.supply.records() if cell.hash in results)
        self.sweep.write_progress(
            {
                "total": self.supply.total,
                "done": states["finished"],
                "skipped": self.skipped,
                "failed": states["failed"],
                "elapsed": round(time.monotonic() - self.began, 1),
                "current": [
                    *(task.cell.name for task, _ in self.running.values()),
                    *(cell.name for cell in self.elsewhere.values()),
                ],
            }
        )
