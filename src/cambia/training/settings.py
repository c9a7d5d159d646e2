"""The settings of training, and where a run stands: each a plain dataclass whose fields say what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from cambia.config import Member
from cambia.errors import ConfigError
from cambia.probes import SLICES, Slice
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
    neural_steps_per_batch: Annotated[int, Ge(0)] = 1
    """Optimizer steps on each batch; 0 leaves the weights as they are, while decoding learns."""
    accumulation: Annotated[int, Gt(0)] = 1
    """Parts in which a batch is worked through, to save memory; the result is the same."""
    schedule: Annotated[Schedule, Member(SCHEDULES, "schedule", default="wsd")] = field(default_factory=WSD)
    """The learning rate over time."""
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    """Gradients of a larger global norm are scaled down to this; null switches it off."""
    average_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Keep a moving average of the weights with this decay per step, and score and save the averaged model;
    null keeps none. The checkpoint's folder averaged/ holds it."""
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

    def steps_of(self, num_tokens: int | None, tokens_per_batch: int, *, share: float = 1.0) -> int:
        """Optimizer steps on a text of so many tokens, from whichever length was given; else one pass.

        Args:
            share: of that length.

        Raises:
            ConfigError: it is told in passes, and nobody knows how long the text is.
        """
        if self.steps:
            steps = float(self.steps)
        elif self.tokens:
            steps = self.tokens / tokens_per_batch
        elif num_tokens is not None:
            steps = (self.epochs or 1.0) * num_tokens / tokens_per_batch
        else:
            raise ConfigError("the data do not say how long a pass is: set steps, TrainingConfig(steps=1000)")
        return max(1, math.ceil(share * steps))


@dataclass
class EvaluationConfig:
    """When and on how much text a model is scored."""

    every_steps: Annotated[int, Gt(0)] | None = 50
    """Steps between measurements of the current task's validation loss; null switches them off."""
    max_bytes: Annotated[int, Gt(0)] = 65_536
    """Text per task and split that is scored, in whole documents."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Sequences scored at once."""
    context_tokens: Annotated[int, Ge(0)] = 0
    """Tokens with which each scored sequence begins that the one before has scored: so no token is scored
    without as many before it."""
    slices: list[Annotated[Slice, Member(SLICES, "slice")]] = field(default_factory=list)
    """Parts of the validation text that are measured beside the rest, for a slice spike trigger."""
    decayed_at: list[Annotated[float, Gt(0), Lt(1)]] = field(default_factory=list)
    """Shares of the run at which it is also scored as if it had ended there: a copy's learning rate decays as
    at the end, it is scored, and the run goes on as if nothing had been. For runs of one task whose schedule
    is wsd; decayed.csv holds the scores."""
    probes: dict[str, str] = field(default_factory=dict)
    """Measurements of your own: name -> "my_module:function" of (model, batches), which returns a number."""

    @property
    def measured(self) -> list[str]:
        """Names of all that is measured every `every_steps`."""
        if self.every_steps is None:
            return []
        sliced = [f"{side}_loss/{item.name}" for item in self.slices for side in ("slice", "rest")]
        return ["validation_loss", "validation_bits_per_byte", *sliced, *self.probes]


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
    """Of training, by the shape of each step."""
    flops_grown: float = 0.0
    """Of verifying growth."""
    flops_scored: float = 0.0
    """Of measuring the validation loss, slices and probes while training."""
    skipped: int = 0
    """Steps left out for a loss that was not finite."""
    matrix_rows: int = 0
    """Rows of the task matrix that are written; the first is of the untrained model."""
    best_bits_per_byte: float | None = None
