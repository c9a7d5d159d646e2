"""The settings of training, and where a run stands: each a plain dataclass whose fields say what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from cambia.config import Member
from cambia.training.schedules import SCHEDULES, WSD, Schedule


@dataclass
class TrainingConfig:
    """How a model is trained."""

    steps: Annotated[int, Gt(0)] | None = None
    """Optimizer steps per task. One of steps, tokens and epochs is given."""
    tokens: Annotated[int, Gt(0)] | None = None
    """Training tokens per task."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over each task's training text."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Sequences per optimizer step."""
    sequence_length: Annotated[int, Gt(1)] = 256
    """Tokens per sequence."""
    accumulation: Annotated[int, Gt(0)] = 1
    """Parts in which a batch is worked through, to save memory; the result is the same."""
    schedule: Annotated[Schedule, Member(SCHEDULES, "schedule")] = field(default_factory=WSD)
    """The learning rate over time."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradients of a larger global norm are scaled down to this; null switches it off."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic; weights stay float32. float16 scales the loss."""
    compile: bool = False
    """Compile the model with torch.compile; growth compiles it anew."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss that is infinite or not a number: stop, or leave the step out and count it."""
    log_every_steps: Annotated[int, Gt(0)] = 1
    """Steps between rows of metrics.csv."""


@dataclass
class EvaluationConfig:
    """When and on how much text a model is scored."""

    every_steps: Annotated[int, Gt(0)] | None = 50
    """Steps between measurements of the current task's validation loss; null switches them off."""
    max_bytes: Annotated[int, Gt(0)] = 65_536
    """Text per task and split that is scored, in whole documents."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Sequences scored at once."""


@dataclass
class CheckpointConfig:
    """When a run is saved."""

    every_steps: Annotated[int, Gt(0)] | None = 200
    """Steps between savings of latest/; it is saved at the end of every task in any case."""
    named_every_steps: Annotated[int, Gt(0)] | None = None
    """Steps between checkpoints kept as ckpt_step{n}/; null keeps none."""
    keep: Annotated[int, Ge(0)] = 3
    """How many of the newest ckpt_step{n}/ stay."""
    keep_tasks: bool = True
    """Keep a checkpoint at the end of every task, as ckpt_task{k}/."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    stage: int = 0
    """Tasks that are done."""
    stage_step: int = 0
    """Steps in the current task."""
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0
    """Steps left out for a loss that was not finite."""
    matrix_rows: int = 0
    """Rows of the task matrix that are written; the first is of the untrained model."""
    best_bits_per_byte: float | None = None
