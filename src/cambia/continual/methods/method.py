"""What a continual-learning method may do to plain training, and how several work together.

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

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.config import resolve
from cambia.data.batches import Batch
from cambia.data.loaders import LoaderStream
from cambia.data.streams import Stream
from cambia.errors import ConfigError
from cambia.models.bodies import count_parameters

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
    grows: bool = True
    """Works on a model that grows meanwhile."""
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
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision of training."""

    @property
    def device(self) -> torch.device:
        return self.model.device


class Method:
    """A continual-learning method; by itself it changes nothing (naive fine-tuning)."""

    contract: ClassVar[Contract] = Contract()
    extra_tokens: float = 0.0
    """Training beside the batches since `spent` was asked last, in tokens' worth of a training step."""

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

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        """Inside the block the model is as it answers texts of this task; only where `needs_identity`."""
        yield

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

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; called after `attach`."""


@dataclass
class Naive(Method):
    """Fine-tuning on one task after another, nothing else: what every method is measured against."""


@dataclass
class Methods(Method):
    """Several methods at once, each called in its turn.

    Raises:
        ConfigError: two of them would decide the same thing.
    """

    members: list[Method] = field(default_factory=list)
    """In the order in which they are called."""

    def __post_init__(self) -> None:
        for what, told in (("chooses_rows", "choose the rows"), ("rewrites_weights", "set the weights")):
            both = [type(m).__name__ for m in self.members if getattr(m.contract, what)]
            if len(both) > 1:
                raise ConfigError(f"{both[0]} and {both[1]} both {told} of a run: leave one of them out")
        self.contract = _together([m.contract for m in self.members])  # ty: ignore[invalid-attribute-access]

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        for member in self.members:
            member.check(sequence_length=sequence_length, vocab_size=vocab_size)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        trained = [member.prepare(model) for member in self.members]
        return next((module for module in trained if module is not model), model)

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        for member in self.members:
            member.attach(situation)

    def begin_stage(self, stage: int) -> None:
        for member in self.members:
            member.begin_stage(stage)

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        choosing = next((m for m in self.members if m.contract.chooses_rows), None)
        return (choosing or super()).batch(stream, stage, at)

    @property
    def needs_logits(self) -> bool:
        return any(member.needs_logits for member in self.members)

    def penalty(self, batch: Batch, rows: slice, logits: Tensor) -> Tensor | None:
        asked = [member for member in self.members if member.needs_logits]
        found = [penalty for m in asked if (penalty := m.penalty(batch, rows, logits)) is not None]
        return torch.stack(found).sum() if found else None

    def gradients(self, backward: Backward) -> float:
        return sum(member.gradients(backward) for member in self.members)

    def stepped(self) -> None:
        for member in self.members:
            member.stepped()

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        for member in self.members:
            member.end_stage(stream, stage)

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.answering(task))
            yield

    def spent(self) -> float:
        return sum(member.spent() for member in self.members)

    @property
    def cost(self) -> float:
        return min((member.cost for member in self.members), default=1.0)

    def parameters(self) -> Parameters:
        rewriting = next((m for m in self.members if m.contract.rewrites_weights), None)
        return (rewriting or super()).parameters()

    @property
    def replay_bytes(self) -> int:
        return sum(member.replay_bytes for member in self.members)

    def promised(self) -> Mapping[str, Tensor]:
        return {
            f"{i}.{name}": tensor
            for i, member in enumerate(self.members)
            for name, tensor in member.promised().items()
        }

    def saved_weights(self) -> Mapping[str, Tensor] | None:
        return next((w for m in self.members if (w := m.saved_weights()) is not None), None)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for member, saved in zip(self.members, state["members"], strict=True):
            member.load_state_dict(saved)


def refuse(method: Method, *, stages: int | None, boundaries: bool, grows: bool, averages: bool) -> None:
    """Refuse what a method cannot work with, before anything is trained.

    Args:
        stages: of the stream; None where that is not known yet.
        boundaries: whether the learner may see where they begin and end.
        grows: whether the model grows meanwhile.
        averages: whether an average follows its weights.

    Raises:
        ConfigError: with what repairs it.
    """
    members = method.members if isinstance(method, Methods) else [method]
    for member in members:
        needs, name = member.contract, type(member).__name__
        if needs.needs_boundaries and not boundaries:
            raise ConfigError(
                f"{name} must be told where a task begins and ends, and this stream does not say: set "
                f"--data.stream.boundaries true, or take a method that needs no boundaries ({_boundless()})"
            )
        if needs.needs_boundaries and stages is not None and stages < 2:
            raise ConfigError(f"{name} works from one task to the next, and there is one task: add another")
        if grows and not needs.grows:
            raise ConfigError(f"{name} does not follow a model that grows: set --growth.enabled false")
        if averages and needs.rewrites_weights:
            raise ConfigError(
                f"{name} sets weights itself, which an average would not follow: leave out "
                "--training.average_decay"
            )


def _boundless() -> str:
    """The methods that need no boundaries, by name."""
    from cambia.continual.methods import CONTINUAL_METHODS  # it stands above this module

    kinds: dict[str, Any] = {n: resolve(n, CONTINUAL_METHODS, "method") for n in CONTINUAL_METHODS}
    return ", ".join(name for name, kind in kinds.items() if not kind.contract.needs_boundaries)


def _together(contracts: Sequence[Contract]) -> Contract:
    """What several methods need and promise when they work together."""
    needed = ("needs_boundaries", "needs_identity", "stores_text", "chooses_rows", "rewrites_weights")
    return Contract(
        **{name: any(getattr(c, name) for c in contracts) for name in needed},
        grows=all(c.grows for c in contracts),
        keeps_answers=any(c.keeps_answers for c in contracts),
    )
