"""A synthetic run that looks like a real one, written through `RunWriter` as the training loop writes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cambia import rundir
from cambia.config import to_yaml
from cambia.records import GrowthEvent
from cambia.rundir import RunWriter

_PER_STEP = 16 * 256
_END = {"english": 2.21, "python": 1.52, "legal": 1.87}


@dataclass
class Synthetic:
    """What to write."""

    folder: Path
    tasks: Sequence[str] = ("english", "python", "legal")
    stages: Sequence[Sequence[str]] | None = None
    """Names of the tasks that each stage trains; None for each task once."""
    steps: int = 200
    """Per stage."""
    growth_steps: Sequence[int] = (150, 420)
    exactness: Sequence[str] = ("tolerance", "tolerance")
    logit_errors: Sequence[float | None] = (3.1e-7, 0.0)
    validation_every: int | None = 25
    stop_at: int | None = None
    """The last step that was logged; None for the end."""
    summary: dict[str, Any] | None = field(default_factory=dict)
    """Changes to summary.json; None writes none."""
    skipped: int = 0
    forgotten_per_task: float = 0.1
    """Bits per byte that training another task adds to those before the last."""
    routes: Sequence[str] = ("own",)
    """Who says which task a text is of; the oracle loses only half as much."""
    has_accuracy: bool = False
    """Whether answers are counted."""

    def write(self) -> RunWriter:
        """Write the run; the writer is still open, so the run is going until it is closed."""
        run = RunWriter(self.folder)
        tree = self.config()
        run.write_config(tree, to_yaml(tree))
        random = np.random.default_rng(3)
        parameters, flops, total = 1_049_216, 0.0, len(self.trained) * self.steps
        grown = 0
        self.score(run, 0, 0, "none")
        for step in range(1, (total if self.stop_at is None else self.stop_at) + 1):
            stage, stage_step = divmod(step - 1, self.steps)
            flops += _PER_STEP * 6.2 * parameters
            if grown < len(self.growth_steps) and step == self.growth_steps[grown]:
                after = int(parameters * 1.45)
                run.append_json(rundir.GROWTH, self.event(grown, step, parameters, after).as_dict())
                parameters, grown = after, grown + 1
            self.log(run, step, flops, parameters, random)
            if stage_step == self.steps - 1:
                self.score(run, stage + 1, step, "+".join(self.trained[stage]))
        if self.summary is not None:
            run.write_summary({**self.full_summary(flops, parameters), **self.summary})
        return run

    @property
    def trained(self) -> Sequence[Sequence[str]]:
        """Names of the tasks that each stage trains."""
        return self.stages or [[task] for task in self.tasks]

    def config(self) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "model": {"hidden_size": 128, "num_hidden_layers": 4},
            "data": [{"name": task, "type": "embedded"} for task in self.tasks],
            "training": {"steps": self.steps, "batch_size": 16, "sequence_length": 256},
            "evaluation": {"every_steps": self.validation_every},
        }

    def loss(self, stage: int, stage_step: int) -> float:
        """Nats per token, without noise."""
        end = _END.get(self.trained[stage][0], 2.0) * 1.35
        start = 7.6 if stage == 0 else end + 1.4
        return end + (start - end) * math.exp(-stage_step / (0.12 * self.steps))

    def rate(self, stage_step: int) -> float:
        warmup, decay = 0.05 * self.steps, 0.2 * self.steps
        return 3e-3 * min(1.0, (stage_step + 1) / (warmup + 1), (self.steps - stage_step) / decay)

    def log(
        self,
        run: RunWriter,
        step: int,
        flops: float,
        parameters: int,
        random: np.random.Generator,
    ) -> None:
        stage, stage_step = divmod(step - 1, self.steps)
        clean = self.loss(stage, stage_step)
        measured = self.validation_every is not None and step % self.validation_every == 0
        run.append_row(
            rundir.METRICS,
            {
                "step": step,
                "task": "+".join(self.trained[stage]),
                "tokens": step * _PER_STEP,
                "flops": flops,
                "loss": clean + 0.06 * random.standard_normal(),
                "learning_rate": self.rate(stage_step),
                "grad_norm": 0.4 + 2.5 * math.exp(-stage_step / 20) + 0.1 * random.random(),
                "validation_loss": clean + 0.05 if measured else None,
                "validation_bits_per_byte": (clean + 0.05) / 1.35 if measured else None,
                "parameters": parameters,
                "skipped": self.skipped,
            },
        )
        speed = 21_000 * 1e6 / parameters
        run.append_row(
            rundir.TIMING,
            {
                "step": step,
                "seconds": round(_PER_STEP / speed, 6),
                "tokens_per_second": round(speed, 1),
                "memory_bytes": 700_000_000,
            },
        )

    def event(self, index: int, step: int, before: int, after: int) -> GrowthEvent:
        operators = [
            {"type": "widen_ffn", "factor": 1.5, "layers": "all", "multiple_of": 8},
            {"type": "add_layers", "add": 2, "where": "interpose", "initial": "copy", "preserve": True},
        ]
        error = self.logit_errors[index % len(self.logit_errors)]
        loss = 5.1 - 0.9 * index
        exactness = self.exactness[index % len(self.exactness)]
        moved = 0.21 if exactness == "none" else 2.4e-7 * bool(error)
        return GrowthEvent(
            operators=(operators[index % 2],),
            reason=[
                "plateau: validation_loss not below 3.0412 for 5 measurements",
                "schedule: 420 steps reached",
            ][index % 2],
            parameters_before=before,
            parameters_after=after,
            flops_per_token_before=6.2 * before,
            flops_per_token_after=6.2 * after,
            exactness=exactness,
            logit_error=error,
            loss_before=loss,
            loss_after=loss + moved,
            step=step,
            tokens=step * _PER_STEP,
            config_changes={"intermediate_size": (512, 768)}
            if index % 2 == 0
            else {"num_hidden_layers": (4, 6)},
        )

    def bits(self, stage: int, task: int, route: str = "own") -> float:
        """Bits per byte on a task: learned at its own stage, a little forgotten afterwards."""
        visits = [i for i, names in enumerate(self.trained[:stage], 1) if self.tasks[task] in names]
        if not visits:
            return 8.02 - 0.9 * min(stage, 4) - 0.01 * task
        end = _END.get(self.tasks[task], 2.0)
        lost = self.forgotten_per_task if route == "own" else self.forgotten_per_task / 2
        return end + lost * (stage - visits[-1])

    def score(self, run: RunWriter, stage: int, step: int, trained: str) -> None:
        for split, extra in (("valid", 0.01), ("test", 0.0)):
            for route, (j, task) in itertools.product(self.routes, enumerate(self.tasks)):
                bits = self.bits(stage, j, route) + extra
                run.append_row(
                    rundir.EVAL,
                    {
                        "task_trained": trained,
                        "task_eval": task,
                        "split": split,
                        "route": route,
                        "nll_per_byte": bits * math.log(2),
                        "bits_per_byte": bits,
                        "accuracy": round(1 - bits / 10, 3) if self.has_accuracy else None,
                        "tokens": 40_000,
                        "bytes": 65_536,
                        "stage": stage,
                        "step": step,
                    },
                )

    def full_summary(self, flops: float, parameters: int) -> dict[str, Any]:
        steps = len(self.trained) * self.steps
        return {
            "status": "finished",
            "name": self.folder.name,
            "cambia_version": "0.1.0",
            "versions": {"python": "3.12.4", "torch": "2.13.0", "transformers": "5.20.1"},
            "machine": {
                "cpu": "Intel Xeon Platinum 8375C",
                "cores": 2,
                "threads": 2,
                "device": "cpu",
                "platform": "Linux-6.1-x86_64",
            },
            "command": f"cambia run first_growth --name {self.folder.name} --training.steps {self.steps}",
            "started": "2026-11-20T10:00:00+00:00",
            "finished": "2026-11-20T10:03:12+00:00",
            "wall_seconds": 192.4,
            "parameters_start": 1_049_216,
            "parameters_end": parameters,
            "tokens": steps * _PER_STEP,
            "flops": flops,
            "steps": steps,
            "skipped_steps": self.skipped,
            "optimizer_covers_all_parameters": True,
            "tasks": list(self.tasks),
            "data": [
                {
                    "name": task,
                    "train_bytes": 1_812_345,
                    "valid_bytes": 101_200,
                    "test_bytes": 99_871,
                    "documents": 412,
                    "source": f"embedded: {task} text that comes with Python and its packages",
                }
                for task in self.tasks
            ],
            "notes": ["cpp text was generated because torch headers are missing"],
        }


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, under a short relative name, as users have it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMBIA_RUNS", raising=False)
    return Path("runs")


@pytest.fixture
def make_run(runs: Path) -> Iterator[Callable[..., Path]]:
    """``make_run("name", steps=20, ...)`` writes a run; ``going=True`` leaves it open."""
    open_runs: list[RunWriter] = []

    def make(name: str = "rings", *, going: bool = False, **settings: Any) -> Path:
        writer = Synthetic(runs / name, **settings).write()
        if going:
            open_runs.append(writer)
        else:
            writer.close()
        return runs / name

    yield make
    for writer in open_runs:
        writer.close()
