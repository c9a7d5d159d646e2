"""What continual-learning methods cost: a step of the training loop with each, against a plain loop by hand.

    cambia bench continual_cost --preset full

The plain loop draws a batch, computes the loss, its gradient, clips, updates: nothing else. It trains a model
of its own, with the same weights at first, between any two steps of Cambia's loop, so that both sides see the
same machine. Timed is everything between two batches, logging included; the median over pairs of (Cambia's
time / the plain loop's) and its bootstrap interval are reported. All methods are timed in a second task, when
they have something to do. Goals: naive at most 1.02, EWC and element masks at most 1.10.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import arguments, keep, median_interval, table

from cambia.config import resolve
from cambia.continual.methods import CONTINUAL_METHODS, Method
from cambia.continual.methods.method import AnyStream
from cambia.data import BytesTokenizer, GeneratedSource, Stream, Task, build_tokenizer
from cambia.data.batches import IGNORED, Batch
from cambia.data.prepare import prepare
from cambia.models import CambiaConfig, CambiaForCausalLM
from cambia.rundir import RunWriter
from cambia.training import CheckpointConfig, EvaluationConfig, Trainer, TrainingConfig
from cambia.training.optim import AdamW


@dataclass(frozen=True)
class Preset:
    """What is measured and how often."""

    pairs: int
    hidden: int = 128
    layers: int = 4
    rows: int = 16


PRESETS = {"quick": Preset(3, hidden=64, layers=2), "full": Preset(61)}
GOALS = {"naive": 1.02, "ewc": 1.10, "masks": 1.10}
WARM_UP = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "replay": {"fraction": 0.25},
    "derpp": {"fraction": 0.25, "capacity": 500, "logits": 32},
    "ewc": {"batches": 2},
}


@dataclass
class PlainLoop:
    """A training step as one would write it by hand."""

    model: CambiaForCausalLM
    stream: Stream
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = AdamW().build(self.model)

    def step(self, stage: int) -> None:
        began = time.perf_counter()
        batch = self.stream.next_batch(stage)
        count = int((batch.targets != IGNORED).sum())
        loss = self.model(
            input_ids=batch.input_ids,
            shift_labels=batch.targets,
            num_items_in_batch=count,
            use_cache=False,
            skip_logits=True,
        ).loss
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(time.perf_counter() - began)


def timed(method: Method, plain: PlainLoop, times: list[float]) -> Method:
    """The method, with a step of the plain loop before each of its batches, and a clock beside."""
    drawn, left = method.batch, [0.0]

    def batch(stream: AnyStream, stage: int, at: float) -> Batch:
        if left[0]:
            times.append(time.perf_counter() - left[0])
        plain.step(stage)
        left[0] = time.perf_counter()
        return drawn(stream, stage, at)

    method.batch = batch  # ty: ignore[invalid-assignment]
    return method


def ratios(name: str, preset: Preset, tasks: list[Task]) -> dict[str, Any]:
    """Steps of one method and of the plain loop in turn."""
    torch.manual_seed(0)
    config = CambiaConfig(
        vocab_size=264,
        hidden_size=preset.hidden,
        intermediate_size=3 * preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = CambiaForCausalLM(config)
    other = copy.deepcopy(model).train()
    streams = [Stream(tasks, batch_size=preset.rows, sequence_length=128, seed=0) for _ in range(2)]
    plain, times = PlainLoop(other, streams[0]), []
    method = resolve(CONTINUAL_METHODS[name], {}, "method")(**SETTINGS.get(name, {}))
    trainer = Trainer(
        model,
        optimizer=AdamW(),
        config=TrainingConfig(steps=1, sequence_length=128),
        evaluation=EvaluationConfig(every_steps=None, max_bytes=2000),
        checkpoint=CheckpointConfig(every_steps=None, keep_tasks=False),
        method=timed(method, plain, times),
    )
    first, second = 3, WARM_UP + preset.pairs
    with tempfile.TemporaryDirectory() as folder:
        run = RunWriter(Path(folder) / "run")
        trainer.train(streams[1], run=run, stage_steps=[first, second + 1])
        run.close()
    # The last ones: what stands before them has scored tasks in between, or warmed up.
    ours, theirs = times[-preset.pairs :], plain.times[-preset.pairs - 1 : -1]
    middle, low, high = median_interval([a / b for a, b in zip(ours, theirs, strict=True)])
    return {
        "method": name,
        "ratio": middle,
        "low": low,
        "high": high,
        "ours_ms": [round(1000 * t, 3) for t in ours],
        "plain_ms": [round(1000 * t, 3) for t in theirs],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table of all methods."""
    rows = []
    for one in result["rows"]:
        goal = GOALS.get(one["method"])
        said = "" if goal is None else f"{goal:.2f}, {'reached' if one['ratio'] <= goal else 'missed'}"
        rows.append([one["method"], f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})", said])
    return table(["method", "step time, plain loop = 1 (95 % interval)", "goal"], rows)


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's row."""
    found = {one["method"]: one for one in result["rows"]}
    told = ", ".join(f"{name} {found[name]['ratio']:.2f}" for name in GOALS)
    return {"a step with a continual-learning method, in steps of a plain loop": told}


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    tokenizer = build_tokenizer(BytesTokenizer())
    with tempfile.TemporaryDirectory() as cache:
        sources = [GeneratedSource(task=task, size_bytes=2_000_000) for task in ("copy", "reverse")]
        tasks = [Task(s.task, prepare(s, tokenizer, cache_dir=cache)) for s in sources]
        rows = []
        for name in CONTINUAL_METHODS:
            rows.append(ratios(name, preset, tasks))
            print(markdown({"rows": rows[-1:]}).splitlines()[-1], flush=True)
    result = {"rows": rows}
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
