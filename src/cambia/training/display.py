"""What a person sees while a run is going: a bar with rate and time left, a line per growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cambia.decoding.learners import Update
from cambia.records import GrowthEvent, Signals


class Display:
    """A progress bar over the whole run; on a plain file it prints about twenty lines instead."""

    def __init__(
        self, names: Sequence[str], stage_steps: list[int], done: int, console: Console | None = None
    ):
        self.console = console or Console(stderr=True)
        self.total = sum(stage_steps)
        self._ends = [sum(stage_steps[: i + 1]) for i in range(len(stage_steps))]
        self._names = list(names)
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=self.total, completed=done, rate="", loss="")
        self._smooth: float | None = None
        self._reward: float | None = None
        self._written = 0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stepped(self, signals: Signals) -> None:
        """Move the bar by one step."""
        if signals.loss is not None and math.isfinite(signals.loss):
            previous = signals.loss if self._smooth is None else self._smooth
            self._smooth = 0.95 * previous + 0.05 * signals.loss
        speed = self._progress.tasks[self._bar].speed
        per_step = (signals.tokens if self._smooth is not None else self._written) / max(1, signals.step)
        name = self._names[next((i for i, end in enumerate(self._ends) if signals.step <= end), -1)]
        self._progress.update(
            self._bar,
            completed=signals.step,
            description=name,
            rate=f"{speed * per_step:,.0f} tokens/s" if speed else "",
            loss=self._measured,
        )
        if not self.console.is_terminal and signals.step % max(1, self.total // 20) == 0:
            self.console.print(f"step {signals.step}/{self.total}  {name}  {self._measured}")

    @property
    def _measured(self) -> str:
        """Loss and reward, as far as they are known."""
        known = {"loss": self._smooth, "reward": self._reward}
        return "  ".join(f"{name} {value:.3f}" for name, value in known.items() if value is not None)

    def decoded(self, update: Update) -> None:
        """Take in what a step of the decoding policy came to."""
        self._reward, self._written = update.reward, update.tokens

    def grew(self, event: GrowthEvent) -> None:
        """Say that the model grew."""
        names = ", ".join(str(operator["type"]) for operator in event.operators)
        if not event.done:
            self.console.print(f"[yellow]not grown[/yellow] at step {event.step}: {names}, {event.reason}")
            return
        self.console.print(
            f"[green]grew[/green] at step {event.step}: {names}, "
            f"{event.parameters_before:,} → {event.parameters_after:,} parameters, "
            f"loss {event.loss_before:.4f} → {event.loss_after:.4f} on the check batch"
        )
