"""A worker: a process that runs one cell after another, so that imports are paid for once.

It is told what to do on its standard input and answers on its standard output, a line of JSON each; whatever
else is printed joins its standard error, a log. When its launcher dies the input ends, and so does the
worker, in the middle of a step if need be: what a run had saved is there for the next one.

    python -m cambia.sweeps.worker FOLDER
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cambia.errors import CambiaError
from cambia.sweepdir import CellRecord, Result, SweepWriter, is_settled
from cambia.sweeps.grid import Cell

Kind = Literal["finished", "failed", "interrupted", "taken", "known", "died"]


@dataclass(frozen=True)
class Task:
    """A cell, and how it is to be run."""

    cell: Cell
    attempt: int = 1
    """The how-manieth worker tries."""
    retry: bool = False
    """Try again though it has failed before."""
    keep_checkpoints: bool = True

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        values = json.loads(line)
        cell = values.pop("cell")
        return cls(Cell(CellRecord(**cell["record"]), cell["tree"], cell["choice"]), **values)


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    hash: str
    kind: Kind
    """interrupted: saved, to go on later · taken: another process works on it · known: it has a result ·
    died: the worker did; the others are in the results."""
    error: str | None = None


def work(folder: Path, task: Task) -> Outcome:
    """Run a cell, from where it stopped if it was begun, and record what becomes of it."""
    sweep, cell = SweepWriter(folder), task.cell
    claim = sweep.claim(cell.hash)
    if claim is None:
        return Outcome(cell.hash, "taken")
    try:
        if is_settled(sweep.results().get(cell.hash), task.retry):
            return Outcome(cell.hash, "known")
        try:
            return _ran(sweep, task)
        except Exception as error:  # whatever a cell raises is that cell's result
            said = str(error) if isinstance(error, CambiaError) else f"{type(error).__name__}: {error}"
            said = " ".join(said.split())
            sweep.write_error(cell.name, "".join(traceback.format_exception(error)))
            sweep.record(_result(task, "failed", error=said))
            return Outcome(cell.hash, "failed", said)
    finally:
        claim.release()


def _ran(sweep: SweepWriter, task: Task) -> Outcome:
    from cambia.experiment.build import train_in
    from cambia.rundir import RunReader

    cell = task.cell
    folder = sweep.folder / cell.name
    if not train_in(folder, cell.experiment()):
        return Outcome(cell.hash, "interrupted")
    run = RunReader(folder)
    summary = run.summary() or {}
    sweep.record(_result(task, "finished", results=summary["results"], seconds=summary["wall_seconds"]))
    if not task.keep_checkpoints:
        for checkpoint in run.checkpoints():
            shutil.rmtree(checkpoint)
    return Outcome(cell.hash, "finished")


def _result(task: Task, status: Literal["finished", "failed"], **more: Any) -> Result:
    record = task.cell.record
    return Result(
        cell=record.name,
        hash=record.hash,
        choice=record.choice,
        status=status,
        attempts=task.attempt,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    )


def failed(sweep: SweepWriter, task: Task, error: str) -> bool:
    """Record that a cell has failed whose worker cannot say so; False where another process has it by now."""
    claim = sweep.claim(task.cell.hash)
    if claim is None:
        return False
    try:
        return sweep.record(_result(task, "failed", error=error))
    finally:
        claim.release()


def main() -> None:
    """Run tasks until the input ends."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed joins the log, which the launcher has opened
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    while True:
        task = Task.from_json(tasks.get())
        print(f"---- {task.cell.name}", file=sys.stderr, flush=True)
        outcome = work(folder, task)
        answers.write(json.dumps(asdict(outcome)) + "\n")


def _listen(tasks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
