"""What a launcher makes of what its workers say, with workers that are only told what to say.

The same with real processes is in test_launch.py; there it takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cambia.errors import SweepError
from cambia.sweepdir import Result, SweepReader, SweepWriter
from cambia.sweeps import Limits, cells_of, read_grid
from cambia.sweeps.grid import Grid
from cambia.sweeps.launch import Launch
from cambia.sweeps.supply import Listed
from cambia.sweeps.worker import Outcome, Task
from tests.sweeps.grids import grid


class Scripted:
    """Two workers that answer by a script."""

    def __init__(self, sweep: SweepWriter, script: Callable[[Task], str | None]):
        self.sweep, self.script = sweep, script
        self.tasks: list[Task] = []
        self.busy: list[Task] = []
        self.killed: list[str] = []

    @property
    def free(self) -> int:
        return 2 - len(self.busy)

    def start(self, task: Task) -> None:
        self.tasks.append(task)
        self.busy.append(task)

    def wait(self, seconds: float) -> list[Outcome]:
        for task in self.busy:
            said = "died" if task.cell.hash in self.killed else self.script(task)
            if said is None:
                continue
            self.busy.remove(task)
            kind, _, error = said.partition(": ")
            if kind in ("finished", "failed"):
                cell = task.cell.record
                self.sweep.record(Result(cell.name, cell.hash, cell.choice, kind, error=error or None))
            return [Outcome(task.cell.hash, kind, error)]
        return []

    def kill(self, hash: str) -> None:
        self.killed.append(hash)

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def launch(
    folder: Path, script: Callable[[Task], str | None], limits: Limits | None = None, **more: object
) -> tuple[Scripted, SweepReader]:
    read: Grid = read_grid(grid(seeds=4, **more))
    cells = cells_of(read)
    sweep = SweepWriter(folder / "sweep")
    sweep.write_grid("", [cell.record for cell in cells])
    limits = limits or Limits()
    workers = Scripted(sweep, script)
    supply = Listed(cells, sweep.results(), retry=limits.retry)
    Launch(read, sweep, supply, limits, Console(quiet=True)).run(workers)
    return workers, SweepReader(folder / "sweep")


def test_every_cell_once(tmp_path: Path) -> None:
    workers, sweep = launch(tmp_path, lambda task: "finished")
    assert len(workers.tasks) == len(sweep.results()) == 8


def test_at_most_so_many(tmp_path: Path) -> None:
    workers, _ = launch(tmp_path, lambda task: "finished", Limits(most=3))
    assert len(workers.tasks) == 3


def test_failures_are_skipped_until_they_are_asked_for(tmp_path: Path) -> None:
    def script(task: Task) -> str:
        return "failed: so" if task.cell.choice["seed"] == 2 else "finished"

    launch(tmp_path, script)
    workers, _ = launch(tmp_path, script)
    assert not workers.tasks
    workers, sweep = launch(tmp_path, lambda task: "finished", Limits(retry=True))
    assert len(workers.tasks) == 2 and all(task.retry for task in workers.tasks)
    assert {result.status for result in sweep.results().values()} == {"finished"}


def test_a_cell_whose_worker_dies_goes_on_in_another(tmp_path: Path) -> None:
    workers, sweep = launch(tmp_path, lambda task: "died: SIGKILL" if task.attempt < 3 else "finished")
    assert len(workers.tasks) == 24
    assert {result.status for result in sweep.results().values()} == {"finished"}


def test_a_cell_that_kills_its_workers_has_failed(tmp_path: Path) -> None:
    def script(task: Task) -> str:
        return "died: SIGSEGV" if task.cell.choice["seed"] == 3 else "finished"

    workers, sweep = launch(tmp_path, script, attempts=2)
    failed = [result for result in sweep.results().values() if result.status == "failed"]
    assert len(workers.tasks) == 6 + 2 * 2 and len(failed) == 2
    assert {result.error for result in failed} == {
        "its worker died (SIGSEGV) 2 times; what it printed is in logs/"
    }


def test_a_cell_that_takes_too_long_has_failed_at_once(tmp_path: Path) -> None:
    def script(task: Task) -> str | None:
        return None if task.cell.choice == {"method": "grown", "seed": 1} else "finished"

    workers, sweep = launch(tmp_path, script, cell_seconds=0.05)
    (late,) = [result for result in sweep.results().values() if result.status == "failed"]
    assert late.error == "it took longer than cell_seconds: 0.05" and len(workers.tasks) == 8


@pytest.mark.parametrize("first", [0, 1])
def test_cells_that_fail_alike_from_the_start_end_the_sweep(tmp_path: Path, first: int) -> None:
    said = iter(["finished"] * first + ["failed: the same"] * 20)
    if first:
        workers, _ = launch(tmp_path, lambda task: next(said))
        assert len(workers.tasks) == 8
    else:
        with pytest.raises(SweepError, match=r"the first 3 cells failed alike: the same .*--retry"):
            launch(tmp_path, lambda task: next(said))


def test_different_failures_do_not_end_it(tmp_path: Path) -> None:
    _, sweep = launch(tmp_path, lambda task: f"failed: {task.cell.hash}")
    assert len(sweep.results()) == 8


def test_what_another_launcher_works_on_is_waited_for(tmp_path: Path) -> None:
    asked: list[str] = []

    def script(task: Task) -> str:
        hash = task.cell.hash
        asked.append(hash)
        if task.cell.choice["seed"] or asked.count(hash) > 1:
            return "finished"
        if task.cell.choice["method"] == "fixed":  # the other one finishes it just now
            SweepWriter(tmp_path / "sweep").record(
                Result(task.cell.name, hash, task.cell.record.choice, "finished")
            )
        return "taken"  # or dies over it

    workers, sweep = launch(tmp_path, script)
    assert len(sweep.results()) == 8 and len(workers.tasks) == 9
