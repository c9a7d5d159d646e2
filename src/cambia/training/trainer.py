"""The one training loop.

It reads from top to bottom: a batch, what it trains, a step, what was measured, growth, records. It
calls its parts by name and broadcasts nothing.

    trainer = Trainer(model, optimizer=optimizer, growth=manager, config=TrainingConfig(steps=500))
    trainer.train(stream, run=RunWriter("runs/mine"))

Everything that a resumed run needs to go on bit by bit is in `state_dict`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia import rundir
from cambia.data.batches import Batch, evaluation_batches
from cambia.data.streams import Stream
from cambia.errors import NonFiniteLossError
from cambia.growth import GrowthEvent, GrowthManager
from cambia.models.architectures import count_parameters, flops_per_token
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.probes import Likelihood, bits_per_byte
from cambia.records import Allocation, Allocator, Knobs, Measured, Signals
from cambia.rundir import RunWriter
from cambia.training.checkpoint import random_state, save_checkpoint, set_random_state
from cambia.training.display import Display
from cambia.training.interrupts import Interrupts
from cambia.training.optim import load_optimizer_state, optimizer_state, set_learning_rate
from cambia.training.settings import CheckpointConfig, EvaluationConfig, Progress, TrainingConfig


class PlainAllocator:
    """Every batch trains everything: pretraining."""

    def allocate(self, batch: Batch, signals: Signals) -> Allocation:
        return Allocation()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Trainer:
    """Trains a model on a stream, growing it on the way.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        config, evaluation, checkpoint: see there.
        growth: asked after every step; None never grows.
        allocator: decides what a batch trains.
        tokenizer: saved beside the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        evaluation: EvaluationConfig | None = None,
        checkpoint: CheckpointConfig | None = None,
        growth: GrowthManager | None = None,
        allocator: Allocator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.evaluation = evaluation or EvaluationConfig()
        self.checkpoint = checkpoint or CheckpointConfig()
        self.growth = growth
        self.allocator = allocator or PlainAllocator()
        self.tokenizer = tokenizer
        self.knobs = Knobs()
        self.progress = Progress()
        self.base_rate = float(optimizer.param_groups[0]["lr"])
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "float16")
        self.values: dict[str, Measured] = {}
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self._shape_changed()

    # ---- the loop --------------------------------------------------------------------------------

    def train(self, stream: Stream, *, run: RunWriter, stage_steps: list[int]) -> bool:
        """Train until every task has had its steps.

        Args:
            stream: the tasks and their batches.
            run: where everything is recorded.
            stage_steps: optimizer steps of each task.

        Returns:
            False if it was interrupted (the run is saved and can be resumed), else True.

        Raises:
            NonFiniteLossError: the loss broke and `on_nonfinite` is "stop".
        """
        p, config = self.progress, self.config
        with Interrupts() as interrupts, Display(stream, stage_steps, p.step) as display:
            if p.matrix_rows == 0:
                self._score(stream, run, task_trained="none")
                self.save(stream, run, rundir.LATEST)
            while p.stage < len(stream.tasks):
                while p.stage_step < stage_steps[p.stage]:
                    began = time.perf_counter()

                    # One step: which batch, what of it trains, at which rate.
                    batch = stream.next_batch(p.stage)
                    signals = self._signals(None, None, stage_steps)
                    allocation = self.allocator.allocate(batch, signals)
                    rate = self._learning_rate(stage_steps)
                    set_learning_rate(self.optimizer, rate * self.knobs.learning_rate_factor)
                    loss, grad_norm = self._step(batch, run) if allocation.train else (None, None)
                    p.step += 1
                    p.stage_step += 1
                    p.tokens += batch.input_ids.numel()
                    p.flops += batch.input_ids.numel() * self.flops_per_token

                    # Once in a while: the validation loss.
                    if self._due(self.evaluation.every_steps):
                        self._validate(stream, run)

                    # Signals up; the rules may answer with growth.
                    self._measured(allocation.measured)
                    signals = self._signals(loss, grad_norm, stage_steps)
                    events = self.growth.step(signals) if self.growth is not None else []
                    for event in events:
                        run.append_json(rundir.GROWTH, event.as_dict())
                        display.grew(event)
                    if events:
                        self._shape_changed()

                    # Records, and once in a while a checkpoint.
                    if self._due(config.log_every_steps) or events:
                        self._log(run, stream, signals)
                        self._log_clock(run, batch, time.perf_counter() - began, events)
                    display.stepped(signals)
                    if self._due(self.checkpoint.every_steps) or interrupts.requested:
                        self.save(stream, run, rundir.LATEST)
                    if self._due(self.checkpoint.named_every_steps):
                        self.save(stream, run, rundir.checkpoint_step_name(p.step))
                        run.keep_only(self.checkpoint.keep)
                    if interrupts.requested:
                        return False

                # The end of a task: score every task, so that the matrix has a whole row.
                p.stage += 1
                p.stage_step = 0
                self._score(stream, run, task_trained=stream.tasks[p.stage - 1].name)
                if self.checkpoint.keep_tasks:
                    self.save(stream, run, rundir.checkpoint_task_name(p.stage - 1))
                self.save(stream, run, rundir.LATEST)
        return True

    # ---- its parts -------------------------------------------------------------------------------

    def _step(self, batch: Batch, run: RunWriter) -> tuple[float, float]:
        """Forward, backward, clip, step; returns the loss (nats per token) and the gradient norm."""
        device = self.model.device
        count = int((batch.targets != -100).sum())
        total = 0.0
        rows = math.ceil(len(batch.input_ids) / self.config.accumulation)
        for first in range(0, len(batch.input_ids), rows):
            inputs = batch.input_ids[first : first + rows].to(device)  # (B / accumulation, T)
            targets = batch.targets[first : first + rows].to(device)
            with self._autocast():
                loss = self.forward(
                    input_ids=inputs,
                    labels=targets,
                    shift_labels=targets,
                    num_items_in_batch=count,
                    use_cache=False,
                    **self._extra,
                ).loss
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.clip_norm or math.inf
        ).item()
        # With float16 an infinite gradient is the loss scaler's daily work: it leaves the step out itself.
        if not math.isfinite(total) or (not math.isfinite(norm) and not self.scaler.is_enabled()):
            self._nonfinite(batch, total, norm, run)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _nonfinite(self, batch: Batch, loss: float, norm: float, run: RunWriter) -> None:
        if self.config.on_nonfinite == "skip":
            self.progress.skipped += 1
            return
        raise NonFiniteLossError(
            f"loss {loss}, gradient norm {norm} at step {self.progress.step + 1} on a batch of "
            f"{batch.source}; the last good checkpoint is {run.folder / rundir.LATEST}: lower "
            "--optimizer.learning_rate, or leave such steps out with --training.on_nonfinite skip"
        )

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.precision == "float16" else torch.bfloat16
        return torch.autocast(self.model.device.type, dtype, enabled=self.config.precision != "float32")

    def _learning_rate(self, stage_steps: list[int]) -> float:
        p, schedule = self.progress, self.config.schedule
        if schedule.over == "run":
            return self.base_rate * schedule.factor(p.step, sum(stage_steps))
        return self.base_rate * schedule.factor(p.stage_step, stage_steps[p.stage])

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _signals(self, loss: float | None, grad_norm: float | None, stage_steps: list[int]) -> Signals:
        p = self.progress
        return Signals(
            step=p.step,
            tokens=p.tokens,
            flops=p.flops,
            progress=p.step / max(1, sum(stage_steps)),
            loss=loss,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            grad_norm=grad_norm,
            values=self.values,
        )

    def _measured(self, values: Mapping[str, float]) -> None:
        # A new dictionary each time: signals that were handed out keep what they said.
        new = {name: Measured(value, self.progress.step) for name, value in values.items()}
        self.values = {**self.values, **new}

    def _shape_changed(self) -> None:
        """What depends on the model's shape."""
        self.flops_per_token = flops_per_token(self.model, self.config.sequence_length)
        self.parameters = count_parameters(self.model)
        self.forward: Any = self.model
        self._extra = {"skip_logits": True} if isinstance(self.model, CambiaForCausalLM) else {}
        if self.config.compile:
            torch.compiler.reset()
            self.forward = torch.compile(self.model)

    # ---- scores and records ----------------------------------------------------------------------

    def score(self, stream: Stream, stage: int, split: str) -> Likelihood:
        """Likelihood of one task's text."""
        head = stream.tasks[stage].corpus.splits[split].head(self.evaluation.max_bytes)
        batches = evaluation_batches(
            head, batch_size=self.evaluation.batch_size, sequence_length=self.config.sequence_length
        )
        with self._autocast():
            return bits_per_byte(self.model, batches)

    def _validate(self, stream: Stream, run: RunWriter) -> None:
        likelihood = self.score(stream, self.progress.stage, "valid")
        self._measured(
            {
                "validation_loss": likelihood.nats_per_token,
                "validation_bits_per_byte": likelihood.bits_per_byte,
            }
        )
        if len(stream.tasks) == 1:
            self._keep_best(likelihood.bits_per_byte, stream, run)

    def _score(self, stream: Stream, run: RunWriter, *, task_trained: str) -> None:
        """Score every task and append a whole row of the task matrix, split by split."""
        means = {}
        for split in ("valid", "test"):
            scores = [self.score(stream, i, split) for i in range(len(stream.tasks))]
            means[split] = sum(score.bits_per_byte for score in scores) / len(scores)
            for task, score in zip(stream.tasks, scores, strict=True):
                run.append_row(
                    rundir.EVAL,
                    {
                        "task_trained": task_trained,
                        "task_eval": task.name,
                        "split": split,
                        "route": "own",
                        "nll_per_byte": score.nats_per_byte,
                        "bits_per_byte": score.bits_per_byte,
                        "tokens": score.tokens,
                        "bytes": score.bytes,
                        "stage": self.progress.stage,
                        "step": self.progress.step,
                    },
                )
        self.progress.matrix_rows += 1
        if self.progress.step:
            self._keep_best(means["valid"], stream, run)

    def _keep_best(self, bits: float, stream: Stream, run: RunWriter) -> None:
        best = self.progress.best_bits_per_byte
        if best is None or bits < best:
            self.progress.best_bits_per_byte = bits
            self.save(stream, run, rundir.BEST)

    def _log(self, run: RunWriter, stream: Stream, signals: Signals) -> None:
        p = self.progress
        run.append_row(
            rundir.METRICS,
            {
                "step": p.step,
                "task": stream.tasks[p.stage].name,
                "tokens": p.tokens,
                "flops": p.flops,
                "loss": signals.loss,
                "learning_rate": signals.learning_rate,
                "grad_norm": signals.grad_norm,
                "validation_loss": signals.fresh("validation_loss"),
                "validation_bits_per_byte": signals.fresh("validation_bits_per_byte"),
                "parameters": self.parameters,
                "skipped": p.skipped,
            },
        )

    def _log_clock(self, run: RunWriter, batch: Batch, seconds: float, events: list[GrowthEvent]) -> None:
        run.append_row(
            rundir.TIMING,
            {
                "step": self.progress.step,
                "seconds": round(seconds, 6),
                "growth_seconds": round(sum(event.seconds for event in events), 6),
                "tokens_per_second": round(batch.input_ids.numel() / seconds, 1),
                "memory_bytes": _peak_memory(self.model.device),
            },
        )

    # ---- saving and resuming ---------------------------------------------------------------------

    def save(self, stream: Stream, run: RunWriter, name: str) -> None:
        """Write a checkpoint from which `load_state_dict` goes on bit by bit."""
        state = {
            **self.state_dict(),
            "stream": stream.state_dict(),
            "log_lengths": run.log_lengths(),
        }
        save_checkpoint(run.checkpoint(name), model=self.model, state=state, tokenizer=self.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "values": {name: asdict(measured) for name, measured in self.values.items()},
            "optimizer": optimizer_state(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "growth": self.growth.state_dict() if self.growth is not None else None,
            "allocator": self.allocator.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], events: list[GrowthEvent]) -> None:
        """Take up a saved state; the model already has the checkpoint's shape and weights.

        Args:
            events: growth so far, from growth.jsonl.
        """
        self.progress = replace(self.progress, **state["progress"])
        self.values = {name: Measured(**value) for name, value in state["values"].items()}
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.growth is not None:
            self.growth.load_state_dict(state["growth"], events)
        self.allocator.load_state_dict(state["allocator"])
        set_random_state(state["random"])
        self._shape_changed()


def _peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
