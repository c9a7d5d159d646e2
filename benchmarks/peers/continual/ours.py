"""Cambia's side: the tasks, laid down for both, and its runs, each by the `Trainer` as anyone calls it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cambia import rundir
from cambia.continual.methods import Method, Naive
from cambia.continual.methods.agem import AGem
from cambia.continual.methods.ewc import EWC
from cambia.continual.methods.method import AnyStream
from cambia.continual.methods.replay import Replay
from cambia.data import BytesTokenizer, GeneratedSource, Stream, Task, build_tokenizer
from cambia.data.batches import Batch
from cambia.data.prepare import prepare
from cambia.data.sources import TRAIN
from cambia.evaluation import task_matrix
from cambia.rundir import RunReader, RunWriter
from cambia.training import CheckpointConfig, EvaluationConfig, Trainer, TrainingConfig
from cambia.training.optim import SGD, AdamW
from cambia.training.schedules import Constant
from peers.continual.course import (
    BATCH,
    BETAS,
    COMPARED,
    LENGTH,
    MEMORY,
    PATTERNS,
    RATES,
    REPLAYED,
    Matrix,
    Rows,
    Run,
    fisher_file,
    new_model,
    rows_file,
)

TEXT_BYTES, SCORED_BYTES = 300_000, 8192
STREAMS = {
    "unlike": {
        "counting": GeneratedSource(task="counting", size_bytes=TEXT_BYTES),
        "arithmetic": GeneratedSource(task="modular_arithmetic", size_bytes=TEXT_BYTES),
        "brackets": GeneratedSource(task="brackets", size_bytes=TEXT_BYTES),
    },
    "alike": {
        f"counting by {step}": GeneratedSource(task="counting", step=step, size_bytes=TEXT_BYTES)
        for step in (1, 3, -2)
    },
}
"""Stream -> task -> its text."""


class OneRow(Stream):
    """One row again and again, and then the second task: whatever is drawn from the memory is that row."""

    def next_batch(self, stage: int, *, at: float = 0.0, rows: int | None = None) -> Batch:
        batch = super().next_batch(stage, at=at, rows=rows)
        if stage:
            return batch
        window = torch.from_numpy(self.tasks[0].file(TRAIN).ids(np.arange(LENGTH + 1)))
        every = window.expand(len(batch.input_ids), -1)
        return Batch(every[:, :-1].clone(), every[:, 1:].clone(), batch.num_bytes, batch.source)


class LentEWC(EWC):
    """EWC with the Fisher information that Avalanche has found: what remains to differ are the springs."""

    folder: Path
    run: Run

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        super().end_stage(stream, stage)
        fisher = load_file(fisher_file(self.folder, self.run, stage))
        self.load_state_dict({**self.state_dict(), "fisher": fisher})


class Course:
    """The tasks, prepared in a folder that has both sides' files."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer = build_tokenizer(BytesTokenizer())
        self.vocabulary = tokenizer.vocab_size
        self.tasks = {
            stream: [
                Task(name, prepare(source, tokenizer, cache_dir=folder / "text"))
                for name, source in tasks.items()
            ]
            for stream, tasks in STREAMS.items()
        }
        self.tasks["one_row"] = self.tasks["unlike"][:2]

    def stream(self, run: Run) -> Stream:
        kind = OneRow if run.stream == "one_row" else Stream
        return kind(self.tasks[run.stream], batch_size=BATCH, sequence_length=LENGTH, seed=run.seed)

    def lay_down(self, run: Run) -> None:
        """Write the model that a run begins with and its rows, unless they are there."""
        model, rows = self.folder / f"model-{run.seed}", rows_file(self.folder, run)
        if not model.exists():
            new_model(run.seed, self.vocabulary).save_pretrained(model)
        if rows.exists():
            return
        stream = self.stream(run)
        train, held_out = [], []
        for task in range(len(stream.tasks)):
            batches = [stream.next_batch(task) for _ in range(run.steps)]
            train.append(torch.cat([torch.cat([b.input_ids, b.targets[:, -1:]], dim=1) for b in batches]))
        for task in range(len(stream.tasks)):
            scored = list(stream.evaluation(task, "test", SCORED_BYTES, batch_size=32))
            inputs, targets = (torch.cat([getattr(b, n) for b in scored]) for n in ("input_ids", "targets"))
            held_out.append((inputs, targets, sum(batch.num_bytes for batch in scored)))
        Rows(train, held_out).save(rows)

    def train(self, run: Run) -> Matrix:
        """Train through all tasks; the loop scores them."""
        trainer = Trainer(
            LlamaForCausalLM.from_pretrained(self.folder / f"model-{run.seed}"),
            optimizer=_optimizer(run.optimizer),
            config=TrainingConfig(
                steps=run.steps,
                batch_size=BATCH,
                sequence_length=LENGTH,
                clip_norm=None,
                schedule=Constant(warmup_fraction=0.0),
            ),
            evaluation=EvaluationConfig(every_steps=None, max_bytes=SCORED_BYTES, batch_size=32),
            checkpoint=CheckpointConfig(every_steps=None, keep_tasks=False),
            method=self.method(run),
            seed=run.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            writer = RunWriter(Path(folder) / "run")
            writer.write_config({}, "")
            try:
                trainer.train(self.stream(run), run=writer)
            finally:
                writer.close()
            matrix = task_matrix(RunReader(writer.folder).rows(rundir.EVAL))
        return [list(row) for row in matrix.rows]

    def method(self, run: Run) -> Method:
        """What a method is in Cambia."""
        if run.method == "ewc":
            method = LentEWC(run.strength, batches=1) if run.lent else EWC(run.strength)
            if isinstance(method, LentEWC):
                method.folder, method.run = self.folder, run
            return method
        if run.method == "replay":
            return Replay(fraction=REPLAYED / BATCH, on_top=True, capacity=MEMORY)
        if run.method == "agem":
            return AGem(capacity=PATTERNS * len(self.tasks[run.stream]), rows=COMPARED)
        return Naive()


def _optimizer(name: str) -> Any:
    if name == "sgd":
        return SGD(learning_rate=RATES[name], momentum=0.0)
    return AdamW(learning_rate=RATES[name], betas=BETAS, weight_decay=0.0)
