"""What a continual-learning method may do to plain training.

A method is one object that the loop calls by name. Each of its calls does nothing unless overridden:

    prepare      before the optimizer is made: what of the model trains
    attach       the optimizer is there
    begin_stage  a task begins             } only on streams that let the learner see it
    end_stage    a task ends               }
    batch        which rows train: new ones, replayed ones, rows of every task
    penalty      what is added to the loss, from the rows' logits
    gradients    what becomes of the gradient, between backward and clipping
    stepped      right after the optimizer
    answering    the model as it answers texts of one task

Dataclass fields are a method's settings; what it remembers is made in `attach` and kept by `state_dict`.
To add one: subclass `Method`, say in `contract` what it needs, and name it in `CONTINUAL_METHODS`.
"""

# B batch (rows), T time, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.data.batches import Batch
from cambia.data.loaders import LoaderStream
from cambia.data.streams import Stream
from cambia.models.bodies import count_parameters
from cambia.records import Allocator, StreamEvent

AnyStream = Stream | LoaderStream
Backward = Callable[[Batch], float]
"""Adds a batch's gradient, in the precision of training; returns its mean loss in nats per token."""


@dataclass(frozen=True)
class Contract:
    """What a method needs and promises; tables and refusals are made from it."""

    needs_boundaries: bool = False
    """Must be told where a task begins and ends."""
    needs_identity: bool = False
    """Must be told of which task a text is when it answers."""
    stores_text: bool = False
    """Keeps text of earlier tasks."""
    chooses_rows: bool = False
    """Says which rows a batch has; one method of a run can."""
    rewrites_weights: bool = False
    """Says itself which weights the model has; one method of a run can, and no average follows them."""
    seals_weights: bool = False
    """Holds weights of the model that nothing else may set."""
    grows: bool = True
    """Works on a model that grows meanwhile."""
    needs_growth: bool = False
    """Can learn only with what growth rules add."""
    routes: bool = False
    """Says itself who answers a text; where the right answerer is known, both are scored."""
    keeps_answers: bool = False
    """A task's logits stay, bit by bit, once its stage is over."""


@dataclass(frozen=True)
class Parameters:
    """How many parameters a method takes."""

    trained: int
    """That train at one time."""
    stored: int
    """That must be kept to answer for every task so far."""
    active: int
    """That one answer uses."""


@dataclass(frozen=True, eq=False)
class Situation:
    """What a method is told when training begins."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    stream: AnyStream
    seed: int
    trained: nn.Module | None = None
    """The module that holds all that trains, where that is more than the model: an adapter beside it."""
    weights: Callable[[], Mapping[str, Tensor] | None] = lambda: None
    """The model's weights as others should load them, where they are not its own: with an adapter in them."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision of training."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name."""
        return {name: p for name, p in (self.trained or self.model).named_parameters() if p.requires_grad}


class Method:
    """A continual-learning method; by itself it changes nothing (naive fine-tuning)."""

    CONTRACT: ClassVar[Contract] = Contract()
    """What every method of the class needs and promises."""
    extra_tokens: float = 0.0
    """Training beside the batches since `spent` was asked last, in tokens' worth of a training step."""

    @property
    def contract(self) -> Contract:
        """What this one needs and promises, which may depend on its settings."""
        return self.CONTRACT

    # ---- before training ---------------------------------------------------------------------------

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        """Refuse settings that cannot work, before training.

        Raises:
            ConfigError: with what repairs it.
        """

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Say what of the model trains.

        Returns:
            The module whose trainable parameters an optimizer takes: the model itself, or one around it.
        """
        return model

    def attach(self, situation: Situation) -> None:
        """Begin. The situation is kept as `self.situation`."""
        self.situation = situation

    def allocator(self) -> Allocator | None:
        """Who decides what a batch trains, asked after `attach`; None: every batch trains everything."""
        return None

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what its allocator measures, for triggers to read."""
        return ()

    def told(self) -> list[StreamEvent]:
        """What its allocator has decided since this was asked last."""
        return []

    # ---- what the loop calls -----------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        """A stage begins."""

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        """The rows of the next step.

        Args:
            at: the share of the stage that is done, 0 to below 1.
        """
        return stream.next_batch(stage, at=at)

    @property
    def owes(self) -> bool:
        """Whether there is still to be trained when a text has ended, out of the method's own memory."""
        return False

    @contextmanager
    def teaching(self, parts: tuple[str, ...]) -> Generator[None]:
        """Inside the block a step trains these Parts."""
        yield

    @property
    def needs_logits(self) -> bool:
        """Whether `penalty` is to be given the logits of the next batch."""
        return False

    def penalty(self, batch: Batch, rows: slice, logits: Tensor) -> Tensor | None:
        """What is added to the loss of some rows of a batch; asked only where `needs_logits`.

        Args:
            batch: as `batch` gave it, whole.
            rows: which of its rows these are, where the batch is worked through in parts.
            logits: theirs, (rows, T, V).

        Returns:
            A scalar; the values of all parts of a batch add up.
        """
        return None

    def gradients(self, backward: Backward) -> float:
        """Change the gradients that the batch has left in the parameters.

        Args:
            backward: to add the gradient of other rows.

        Returns:
            The value of the penalty whose gradient was added, 0 where there is none.
        """
        return 0.0

    def stepped(self) -> None:
        """The optimizer has made its step."""

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        """A stage has ended; the model is about to be scored."""

    def answerer(self, model: PreTrainedModel) -> Any:
        """Who is asked for an answer: the model, or what asks it in another way."""
        return model

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        """Inside the block the model is as it answers texts of this task; only where `needs_identity`."""
        yield

    # ---- where the method routes texts ------------------------------------------------------------

    def routes(self, input_ids: Tensor) -> list[str | None]:
        """Which Part answers each row of (N, T) when nobody says whose it is; None: the model alone."""
        return [None] * len(input_ids)

    @contextmanager
    def answered_by(self, part: str | None) -> Generator[None]:
        """Inside the block this Part answers, or the model alone."""
        yield

    def answerers_for_good(self, task: int) -> list[str | None]:
        """The Part that answers texts of a task, if it will never say anything else; else none."""
        return []

    # ---- what it costs and keeps -------------------------------------------------------------------

    def spent(self) -> float:
        """Tokens' worth of training beside the batches since this was asked last."""
        extra, self.extra_tokens = self.extra_tokens, 0.0
        return extra

    @property
    def cost(self) -> float:
        """What training on a token costs, where plain training costs 1."""
        return 1.0

    def parameters(self) -> Parameters:
        """How many it takes now."""
        model = self.situation.model
        stored = count_parameters(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Parameters(trained, stored, stored)

    @property
    def replay_bytes(self) -> int:
        """Bytes of text, or of what stands for it, that are kept of earlier tasks."""
        return 0

    def promised(self) -> Mapping[str, Tensor]:
        """Tensors that no later step may change, by names that stay; they only become more."""
        return {}

    def saved_weights(self) -> Mapping[str, Tensor] | None:
        """The weights of the model as others should load it; None where they are the model's own."""
        return None

    def write_beside(self, folder: Path) -> None:
        """Write what stands beside the model, for others to load, into a checkpoint's folder."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make anew what had come to the model when `state_dict` was taken, before the optimizer's state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; called after `attach`."""


@dataclass
class Naive(Method):
    """Fine-tuning on one task after another, nothing else: what every method is measured against."""


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
