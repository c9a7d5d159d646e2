"""Tracking: others are told what the run directory is told, and a missing package is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cambia.config import build, dump
from cambia.errors import MissingExtraError
from cambia.experiment import train
from cambia.experiment.tree import Experiment, experiment_from, plain_tree
from cambia.rundir import RunReader
from cambia.training import tracking
from cambia.training.tracking import TRACKERS, TensorBoard, Tracker, WeightsAndBiases

TREE = {
    "data": {
        "tasks": [
            {"name": "counting", "source": {"type": "generated", "task": "counting", "limit_bytes": 40_000}}
        ]
    },
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"steps": 4, "batch_size": 4, "sequence_length": 32},
    "evaluation": {"every_steps": 2, "max_bytes": 500},
    "growth": {
        "rules": [{"when": {"type": "schedule", "at_steps": [2]}, "then": {"type": "widen_ffn", "add": 8}}]
    },
    "methods": [],
    "threads": 1,
}
HEARD: list[tuple[Any, ...]] = []


@dataclass
class Listening(Tracker):
    """Keeps what it was told."""

    volume: int = 1
    is_open: bool = field(default=False, init=False)

    def open(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.is_open = True
        HEARD.append(("open", name, config["training"]["steps"]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self.is_open and all(math.isfinite(value) for value in values.values())
        HEARD.append(("log", step, dict(values)))

    def text(self, name: str, step: int, value: str) -> None:
        HEARD.append((name, step, value))

    def checkpoint(self, folder: Path) -> None:
        HEARD.append(("checkpoint", folder.name))

    def close(self) -> None:
        HEARD.append(("close",))


def experiment(*trackers: Any) -> Experiment:
    return experiment_from({**TREE, "tracking": list(trackers)}, source="test", flags={})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CAMBIA_CACHE", str(tmp_path / "cache"))
    HEARD.clear()
    return tmp_path / "runs"


def test_a_tracker_is_told_everything(here: Path) -> None:
    train(experiment("tests.training.test_tracking:Listening"), name="told")
    reader = RunReader(here / "told")
    assert HEARD[0] == ("open", "told", 4) and HEARD[-1] == ("close",)
    rows = {row["step"]: row for row in reader.rows("metrics.csv")}
    losses = {what[1]: what[2]["loss"] for what in HEARD if what[0] == "log" and "loss" in what[2]}
    assert losses == {step: row["loss"] for step, row in rows.items()}
    (growth,) = [what for what in HEARD if what[0] == "growth"]
    assert json.loads(growth[2])["parameters_after"] == reader.growth()[0]["parameters_after"]
    matrix = [what[2] for what in HEARD if what[0] == "log" and "test/counting" in what[2]]
    scored = [row["bits_per_byte"] for row in reader.rows("eval.csv") if row["split"] == "test"]
    assert [row["test/counting"] for row in matrix] == scored
    assert {what[1] for what in HEARD if what[0] == "checkpoint"} >= {"latest", "best", "ckpt_task0"}


def test_it_is_closed_when_training_breaks() -> None:
    broken = experiment("tests.training.test_tracking:Listening")
    broken.optimizer = build(type(broken.optimizer), {"learning_rate": 1e30})
    with pytest.raises(ArithmeticError):
        train(broken, name="broken")
    assert HEARD[-1] == ("close",)


def test_settings_survive_the_configuration() -> None:
    for tracker in (TensorBoard(log_dir="x"), WeightsAndBiases(project="rings", mode="offline")):
        name = next(key for key, value in TRACKERS.items() if value.endswith(f":{type(tracker).__name__}"))
        plain = plain_tree(experiment({"type": name, **dump(tracker)}))["tracking"][0]
        assert plain == {"type": name, **dump(tracker)}
        assert "run" not in plain and "writer" not in plain


@pytest.mark.parametrize(
    ("package", "extra"), [("tensorboard", "track"), ("wandb", "track"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(tracking, "import_module", missing)
    with pytest.raises(MissingExtraError, match=rf"'{package}' is not installed.*cambia\[{extra}\]"):
        train(experiment(package), name="missing")


def test_tensorboard_writes_event_files(here: Path) -> None:
    pytest.importorskip("tensorboard")
    train(experiment("tensorboard"), name="board")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(here / "board/tensorboard"))
    found.Reload()
    losses = [event.value for event in found.Scalars("loss")]
    logged = [row["loss"] for row in RunReader(here / "board").rows("metrics.csv")]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(logged), rtol=1e-6, atol=0)


def test_weights_and_biases_works_offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "rings")
    sent: dict[str, set[str]] = {}
    log = wandb.sdk.wandb_run.Run.log_artifact

    def remembered(run: Any, artifact: Any, *rest: Any, **more: Any) -> Any:
        sent[artifact.name] = set(artifact.manifest.entries)
        return log(run, artifact, *rest, **more)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log_artifact", remembered)
    train(experiment({"type": "wandb", "mode": "offline", "log_checkpoints": True}), name="biased")
    assert list((here / "biased/wandb").glob("offline-run-*"))
    assert sent["biased-results"] == {"growth.jsonl", "eval.csv"}
    assert "model.safetensors" in sent["biased-latest"]
