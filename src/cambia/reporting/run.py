"""A run read back: what it did, as numbers.

Everything comes from the run directory, so a run that is still going or that was killed can be read as
well: rows cut short are left out, and what the summary does not say yet is taken from the logs.

    >>> run = load_run("first_growth")
    >>> run.metrics["loss"][-1], run.growth[0].parameters_after
    (2.07, 1245824)
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cambia import rundir
from cambia.evaluation import (
    GrowthMetrics,
    Route,
    TaskMatrix,
    TransferMetrics,
    Value,
    growth_metrics,
    run_metrics,
)
from cambia.evaluation import task_matrix as matrix_of
from cambia.records import GrowthEvent
from cambia.rundir import RunReader

Status = Literal["going", "finished", "interrupted"]

_METRICS = (
    "step",
    "task",
    "tokens",
    "flops",
    "loss",
    "learning_rate",
    "grad_norm",
    "validation_loss",
    "validation_bits_per_byte",
    "parameters",
    "skipped",
)
_TIMING = ("step", "seconds", "tokens_per_second", "memory_bytes")


@dataclass(frozen=True)
class Stretch:
    """The logged rows of one task, and the tokens over which it was trained."""

    task: str
    rows: slice
    first_token: int
    last_token: int


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory's content; read-only."""

    name: str
    folder: Path
    status: Status
    """going: a process is writing it · finished · interrupted: stopped or killed, and can be resumed."""
    config: Mapping[str, Any]
    config_yaml: str
    """The text of config.yaml, which runs again."""
    summary: Mapping[str, Any]
    """What summary.json says; empty before it is written."""
    metrics: Mapping[str, np.ndarray]
    """Columns of metrics.csv, one entry per logged step; what was not measured is nan."""
    timing: Mapping[str, np.ndarray]
    """Columns of timing.csv."""
    growth: tuple[GrowthEvent, ...]
    """In the order in which the model grew."""
    not_grown: tuple[GrowthEvent, ...]
    """Growths that were asked for and left undone; their reasons say why."""
    stream: tuple[Mapping[str, Any], ...]
    """Of a run with experts: whose the rows of each logged batch were, and what was decided, in order."""
    decoding: tuple[Mapping[str, Any], ...]
    """Of a run whose decoding learns: what came of each of its steps."""
    scores: tuple[Mapping[str, Any], ...]
    """Rows of eval.csv."""

    @property
    def teaches_weights(self) -> bool:
        """Whether anything but decoding learns."""
        training = self.config.get("training")
        steps = training.get("neural_steps_per_batch", 1) if isinstance(training, Mapping) else 1
        return bool(steps)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the order of training, as far as they are known."""
        named = self.summary.get("tasks") or [row["task_eval"] for row in self.scores]
        return list(dict.fromkeys(str(name) for name in named or self.metrics["task"]))

    @property
    def splits(self) -> list[str]:
        """Splits that have scores: "test" and "valid"."""
        return sorted({str(row["split"]) for row in self.scores})

    @property
    def split(self) -> str:
        """The split that results are read from: the test text where it was scored."""
        return "test" if "test" in self.splits or not self.splits else self.splits[0]

    @property
    def at_start(self) -> str:
        """What the model is called before the first step: "untrained" or "pretrained"."""
        model = self.config.get("model")
        from_scratch = not isinstance(model, Mapping) or model.get("type", "native") == "native"
        return "untrained" if from_scratch else "pretrained"

    def task_matrix(
        self, split: str = "test", *, route: Route | None = None, value: Value = "bits_per_byte"
    ) -> TaskMatrix:
        """What was scored so far, a row per stage, a column per task; see `cambia.evaluation.task_matrix`."""
        return matrix_of(self.scores, split=split, route=route, value=value)

    def transfer_metrics(
        self, split: str = "test", *, value: Value = "bits_per_byte"
    ) -> TransferMetrics | None:
        """What was learned and forgotten; None before every task was trained and scored, or all is over."""
        is_whole = self.status == "finished" or not self.task_matrix(split, value=value).untrained
        return run_metrics(self.scores, split=split, value=value) if is_whole else None

    def growth_metrics(self, *, window: int = 50) -> GrowthMetrics:
        """How often and how far the model grew, and how the training loss went on; see there."""
        steps, losses = self.metrics["step"], self.metrics["loss"]
        logged = [(int(step), float(loss)) for step, loss in zip(steps, losses, strict=True)]
        return growth_metrics([*self.growth, *self.not_grown], logged, window=window)

    def stretches(self) -> list[Stretch]:
        """The logged rows, task by task."""
        names, tokens = self.metrics["task"], self.metrics["tokens"]
        starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
        found: list[Stretch] = []
        for start, end in zip(starts, [*starts[1:], len(names)], strict=False):
            first = found[-1].last_token if found else 0
            found.append(Stretch(str(names[start]), slice(start, end), first, int(tokens[end - 1])))
        return found

    # ---- totals: the summary's where it is there, else the logs' --------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self._furthest("steps", "step"))

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return int(self._furthest("tokens", "tokens"))

    @property
    def flops(self) -> float:
        """Floating-point operations of training."""
        return float(self._furthest("flops", "flops"))

    @property
    def skipped_steps(self) -> int:
        """Steps left out because the loss was not finite."""
        return int(self._furthest("skipped_steps", "skipped"))

    @property
    def parameters_start(self) -> int | None:
        """Parameters of the model before training."""
        if self.growth:
            return self.growth[0].parameters_before
        return self._said_or_logged("parameters_start", 0)

    @property
    def parameters_end(self) -> int | None:
        """Parameters of the model as it is now."""
        if self.growth:
            return self.growth[-1].parameters_after
        return self._said_or_logged("parameters_end", -1)

    @property
    def wall_seconds(self) -> float | None:
        """Time taken; while the run is not finished, an estimate from the logged steps."""
        said = self.summary.get("wall_seconds")
        if said is not None and self.status == "finished":
            return float(said)
        step, seconds = self.timing["step"], self.timing["seconds"]
        logged = float(np.nansum(seconds * np.diff(step, prepend=0))) if len(step) else None
        known = [float(value) for value in (said, logged) if value is not None]
        return max(known) if known else None

    @property
    def report(self) -> Path:
        """Where report.html is, or will be."""
        return self.folder / rundir.REPORT

    @property
    def handle(self) -> str:
        """What to call the run on the command line: its name, or its path where the name is not enough."""
        return handle_of(self.name, self.folder)

    def _furthest(self, key: str, column: str) -> float:
        # A summary can be older than the logs (interrupted, resumed, killed), and the logs than the
        # summary (not every step is logged).
        logged = self.metrics[column]
        last = float(logged[-1]) if len(logged) and math.isfinite(logged[-1]) else 0.0
        return max(last, float(self.summary.get(key) or 0))

    def _said_or_logged(self, key: str, row: int) -> int | None:
        if self.summary.get(key) is not None:
            return int(self.summary[key])
        logged = self.metrics["parameters"]
        return int(logged[row]) if len(logged) and math.isfinite(logged[row]) else None


def stage_names(matrix: TaskMatrix) -> list[str]:
    """What the stages are called: "english", "english + legal", "4 tasks", "english again"."""
    names, before = [], set()
    for number, stage in enumerate(matrix.trained, 1):
        name = " + ".join(matrix.tasks[j] for j in stage) or f"stage {number}"
        if len(stage) > 2:
            name = f"{'all ' if len(stage) == len(matrix.tasks) else ''}{len(stage)} tasks"
        names.append(f"{name} again" if stage and stage in before else name)
        before.add(stage)
    return names


def handle_of(name: str, folder: Path) -> str:
    """What to call a run or a sweep on the command line, quoted for a shell."""
    by_name = rundir.runs_root() / name
    known = by_name.exists() and by_name.resolve() == folder.resolve()
    return shlex.quote(name if known else str(folder))


def load_run(name: str | Path) -> Run:
    """Read a run, finished or not.

    Args:
        name: of a run under `cambia.rundir.runs_root`, or its folder.

    Raises:
        RunError: there is no such run; the message names the nearest.
        CheckpointError: its config.json or summary.json is broken.
    """
    reader = RunReader(name)
    summary = reader.summary() or {}
    yaml = reader.folder / rundir.CONFIG_YAML
    events = [GrowthEvent.from_dict(line) for line in reader.growth()]
    return Run(
        name=reader.name,
        folder=reader.folder,
        status=_status(reader, summary),
        config=reader.config(),
        config_yaml=yaml.read_text(encoding="utf-8") if yaml.exists() else "",
        summary=summary,
        metrics=_columns(reader.rows(rundir.METRICS), _METRICS),
        timing=_columns(reader.rows(rundir.TIMING), _TIMING),
        growth=tuple(event for event in events if event.done),
        not_grown=tuple(event for event in events if not event.done),
        stream=tuple(reader.stream()),
        decoding=tuple(reader.decoding()),
        scores=tuple(reader.rows(rundir.EVAL)),
    )


def _status(reader: RunReader, summary: Mapping[str, Any]) -> Status:
    if summary.get("status") == "finished":
        return "finished"
    return "going" if reader.is_going() else "interrupted"


def _columns(rows: Sequence[Mapping[str, Any]], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """Each column as an array; one that is missing altogether is all nan."""
    names = list(dict.fromkeys([*expected, *(rows[0] if rows else ())]))
    found = {name: _column(name, [row.get(name) for row in rows]) for name in names}
    for column in found.values():
        column.setflags(write=False)
    return found


def _column(name: str, values: Sequence[Any]) -> np.ndarray:
    if name == "task" or any(isinstance(value, str) for value in values):
        return np.array(["" if value is None else str(value) for value in values], dtype=np.str_)
    if values and all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
