"""Several methods that work together, and what cannot work together."""

# T time, V vocabulary

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.config import resolve, type_name
from cambia.continual.methods.method import AnyStream, Backward, Contract, Method, Parameters, Situation
from cambia.continual.methods.registry import CONTINUAL_METHODS
from cambia.data.batches import Batch
from cambia.errors import ConfigError
from cambia.records import Allocator, StreamEvent


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
            both = [name_of(member) for member in self.members if getattr(member.contract, what)]
            if len(both) > 1:
                raise ConfigError(f"{both[0]} and {both[1]} both {told} of a run: leave one of them out")
        setting = [name_of(member) for member in self.members if member.contract.rewrites_weights]
        sealing = [name_of(member) for member in self.members if member.contract.seals_weights]
        if setting and sealing:
            raise ConfigError(
                f"{sealing[0]} holds weights that {setting[0]} would set: leave one of them out"
            )

    @property
    def contract(self) -> Contract:
        return _together([member.contract for member in self.members])

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

    def allocator(self) -> Allocator | None:
        return next((found for m in self.members if (found := m.allocator()) is not None), None)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(name for member in self.members for name in member.measures)

    def told(self) -> list[StreamEvent]:
        return [event for member in self.members for event in member.told()]

    def begin_stage(self, stage: int) -> None:
        for member in self.members:
            member.begin_stage(stage)

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        choosing = next((m for m in self.members if m.contract.chooses_rows), None)
        return (choosing or super()).batch(stream, stage, at)

    @property
    def owes(self) -> bool:
        return any(member.owes for member in self.members)

    @contextmanager
    def teaching(self, parts: tuple[str, ...]) -> Generator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.teaching(parts))
            yield

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

    def answerer(self, model: PreTrainedModel) -> Any:
        for member in self.members:
            model = member.answerer(model)
        return model

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.answering(task))
            yield

    def routes(self, input_ids: Tensor) -> list[str | None]:
        return self._router.routes(input_ids)

    @contextmanager
    def answered_by(self, part: str | None) -> Generator[None]:
        with self._router.answered_by(part):
            yield

    def answerers_for_good(self, task: int) -> list[str | None]:
        return self._router.answerers_for_good(task)

    @property
    def _router(self) -> Method:
        """The one that routes, or one that does not."""
        return next((member for member in self.members if member.contract.routes), Method())

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

    def write_beside(self, folder: Path) -> None:
        for member in self.members:
            member.write_beside(folder)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def restore(self, state: Mapping[str, Any]) -> None:
        for member, saved in zip(self.members, state["members"], strict=True):
            member.restore(saved)

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
        needs, name = member.contract, name_of(member)
        if needs.needs_boundaries and not boundaries:
            raise ConfigError(
                f"{name} must be told where a task begins and ends, and this stream does not say: set "
                f"--data.stream.boundaries true, or take a method that needs no boundaries ({_boundless()})"
            )
        if needs.needs_boundaries and stages is not None and stages < 2:
            raise ConfigError(f"{name} works from one task to the next, and there is one task: add another")
        if needs.needs_growth and not grows:
            raise ConfigError(
                f"{name} learns with what a growth rule adds, and there is none: growth: {{rules: [{{when: "
                "{type: novelty}, then: {type: add_lora_expert}}]}"
            )
        if grows and not needs.grows:
            raise ConfigError(f"{name} does not follow a model that grows: set --growth.enabled false")
        if averages and needs.rewrites_weights:
            raise ConfigError(
                f"{name} sets weights itself, which an average would not follow: leave out "
                "--training.average_decay"
            )


def _boundless() -> str:
    """The methods that need no boundaries, by name."""
    kinds: dict[str, Any] = {n: resolve(n, CONTINUAL_METHODS, "method") for n in CONTINUAL_METHODS}
    return ", ".join(name for name, kind in kinds.items() if not kind().contract.needs_boundaries)


def name_of(method: Method) -> str:
    """What a method is called in a configuration."""
    return type_name(type(method), CONTINUAL_METHODS)


def _together(contracts: Sequence[Contract]) -> Contract:
    """What several methods need and promise when they work together."""
    needed = (
        "needs_boundaries",
        "needs_identity",
        "stores_text",
        "chooses_rows",
        "rewrites_weights",
        "seals_weights",
        "needs_growth",
        "routes",
    )
    return Contract(
        **{name: any(getattr(c, name) for c in contracts) for name in needed},
        grows=all(c.grows for c in contracts),
        keeps_answers=any(c.keeps_answers for c in contracts),
    )
