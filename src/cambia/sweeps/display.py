"""What a person sees while a sweep is going: a bar over all cells, and those that are running."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cambia.sweepdir import Result

_SHOWN = ("test_bits_per_byte", "validation_bits_per_byte", "loss")
_A_DAY = 86_400.0
"""Cells may take long: their rate is that of the whole session."""


class Display:
    """A progress bar; on a plain file it prints a line per cell instead."""

    def __init__(self, console: Console, total: int, done: int):
        self.console, self.total, self.done, self.failed = console, total, done, 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_A_DAY,
        )
        self._bar = self._progress.add_task("cells", total=total, completed=done, failed="")
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        if self.done:
            self.say(f"{self.done:,} of {self.total:,} cells have a result already")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, cell: str) -> None:
        """A worker has begun with a cell."""
        self._running[cell] = self._progress.add_task(f"  {cell}", total=None, failed="")

    def stopped(self, cell: str) -> None:
        """A worker is done with it, whatever came of it."""
        self._progress.remove_task(self._running.pop(cell))

    def counted(self, result: Result, seconds: float) -> None:
        """A cell has its result."""
        self.done += 1
        self.failed += result.status == "failed"
        failed = f"{self.failed} failed" if self.failed else ""
        self._progress.update(self._bar, completed=self.done, failed=failed)
        name = next((name for name in _SHOWN if result.results.get(name) is not None), None)
        what = f"{name} {result.results[name]:.4f}" if name else ""
        said = what if result.status == "finished" else f"[red]failed[/red]: {escape(result.error or '')}"
        took = f"{seconds:.1f} s  " if seconds else ""
        self.say(f"{self.done}/{self.total}  {result.cell}  {took}{said}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True, highlight=False)
