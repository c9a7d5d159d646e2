"""Tracking: a run's numbers sent to TensorBoard, Weights & Biases or trackio, beside the run directory.

The run directory is complete without it. A tracker gets the rows of metrics.csv, each growth event, the
task matrix and the run's checkpoints, and a resumed run goes on in the same place (extras: track, trackio).

    tracking:
      - {type: tensorboard}
      - {type: wandb, project: rings, mode: offline}
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from cambia.errors import MissingExtraError
from cambia.files import read_json
from cambia.records import GrowthEvent, StreamEvent
from cambia.rundir import CONFIG_JSON, EVAL, GROWTH

TRACKERS: dict[str, str] = {
    "tensorboard": "cambia.training.tracking:TensorBoard",
    "wandb": "cambia.training.tracking:WeightsAndBiases",
    "trackio": "cambia.training.tracking:Trackio",
}


@dataclass
class Tracker(ABC):
    """Somewhere else that a run's numbers go to."""

    @abstractmethod
    def open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run of that name.

        Raises:
            MissingExtraError: the package is not installed.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimizer step."""

    @abstractmethod
    def text(self, name: str, step: int, value: str) -> None:
        """Something to read: a growth event, the task matrix."""

    def checkpoint(self, folder: Path) -> None:  # noqa: B027 (most keep none)
        """A checkpoint was written. Not sent anywhere unless overridden."""

    def close(self) -> None:  # noqa: B027
        """The run has ended. Nothing to do unless overridden."""

    # What the journal calls, the same for every tracker.

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.csv."""
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        self.log(int(row["step"]), numbers)

    def grew(self, event: GrowthEvent) -> None:
        self.text("growth", event.step, json.dumps(event.as_dict(), indent=1))

    def told(self, step: int, event: StreamEvent) -> None:
        self.text("stream", step, json.dumps(asdict(event), indent=1))

    def used(self, step: int, shares: Mapping[str, float]) -> None:
        """The share of a batch's rows that are each Part's own."""
        self.log(step, {f"use/{part}": share for part, share in shares.items()})

    def scored(self, step: int, split: str, scores: Mapping[str, float]) -> None:
        """A row of the task matrix: bits per byte by task."""
        self.log(step, {f"{split}/{task}": bits for task, bits in scores.items() if math.isfinite(bits)})


def _package(name: str, extra: str = "track") -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error.name or name, extra) from None


@dataclass
class TensorBoard(Tracker):
    """Event files that `tensorboard --logdir runs` shows."""

    log_dir: str | None = None
    """Where they are written; the run directory's tensorboard/ by default."""
    writer: Any = field(default=None, init=False, repr=False, compare=False)

    def open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        _package("tensorboard")
        summary_writer = _package("torch.utils.tensorboard").SummaryWriter
        self.writer = summary_writer(self.log_dir or str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def text(self, name: str, step: int, value: str) -> None:
        self.writer.add_text(name, f"```\n{value}\n```", step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


@dataclass
class WeightsAndBiases(Tracker):
    """Weights & Biases; mode offline keeps everything on this machine until `wandb sync`.

    Growth events and the task matrix, growth.jsonl and eval.csv, become an artifact when the run ends.
    """

    project: str | None = None
    """Project; $WANDB_PROJECT, else "cambia", where it is left out."""
    run_name: str | None = None
    """Name shown there; the run directory's by default."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether anything is sent; $WANDB_MODE, else online, where it is left out."""
    log_checkpoints: bool = False
    """Upload checkpoints as artifacts."""
    run: Any = field(default=None, init=False, repr=False, compare=False)
    folder: Path | None = field(default=None, init=False, repr=False, compare=False)

    def open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = _package("wandb").init(
            project=self.project or os.environ.get("WANDB_PROJECT") or "cambia",
            name=self.run_name or name,
            id=name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=self.mode,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, name: str, step: int, value: str) -> None:
        wandb = _package("wandb")
        self.run.log({name: wandb.Html(f"<pre>{value}</pre>")}, step=step)

    def checkpoint(self, folder: Path) -> None:
        if self.log_checkpoints:
            artifact = _package("wandb").Artifact(f"{self.run.id}-{folder.name}", type="checkpoint")
            artifact.add_dir(str(folder))
            self.run.log_artifact(artifact)

    def close(self) -> None:
        if self.run is None or self.folder is None:
            return
        results = _package("wandb").Artifact(f"{self.run.id}-results", type="results")
        for name in (GROWTH, EVAL):
            if (self.folder / name).exists():
                results.add_file(str(self.folder / name))
        self.run.log_artifact(results)
        self.run.finish()


@dataclass
class Trackio(Tracker):
    """trackio, Hugging Face's local-first tracker; `trackio show` opens it."""

    project: str = "cambia"
    """Project."""
    run_name: str | None = None
    """Name shown there; the run directory's by default."""
    run: Any = field(default=None, init=False, repr=False, compare=False)

    def open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.run = _package("trackio", "trackio").init(
            project=self.project, name=self.run_name or name, config=dict(config), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, name: str, step: int, value: str) -> None:
        self.run.log({name: value}, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


@contextmanager
def tracked(trackers: Sequence[Tracker], folder: Path) -> Generator[Sequence[Tracker]]:
    """Trackers that are open for the run in a folder, and closed however it ends."""
    config = read_json(folder / CONFIG_JSON) if trackers and (folder / CONFIG_JSON).exists() else {}
    with ExitStack() as opened:
        for tracker in trackers:
            tracker.open(folder.name, folder, config)
            opened.callback(tracker.close)
        yield trackers
