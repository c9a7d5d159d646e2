"""What a training loop works with, and its state: everything that a resumed run needs to go on bit by bit."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from cambia.continual.methods import Method
from cambia.continual.methods.method import AnyStream
from cambia.data.loaders import LoaderStream
from cambia.errors import ConfigError
from cambia.growth import GrowthEvent, GrowthManager
from cambia.records import Allocator, Measured
from cambia.training.allocation import PlainAllocator
from cambia.training.averaging import WeightAverage
from cambia.training.checkpoint import random_state, set_random_state
from cambia.training.engine import Engine
from cambia.training.optim import load_optimizer_state, optimizer_state
from cambia.training.schedules import WSD
from cambia.training.settings import EvaluationConfig, Progress, TrainingConfig
from cambia.training.step import Stepper


class Stateful(ABC):
    """A training loop's parts, and how they are kept."""

    config: TrainingConfig
    evaluation: EvaluationConfig
    trained: nn.Module
    """All that trains: the model, or what a method has around it."""
    optimizer: torch.optim.Optimizer
    step: Stepper
    method: Method
    allocator: Allocator
    growth: GrowthManager | None
    average: WeightAverage | None
    engine: Engine | None
    progress: Progress
    values: dict[str, Measured]
    """The last measurements."""

    @abstractmethod
    def _shape_changed(self) -> None:
        """Take the model in the shape that it has now."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model and the place in the text."""
        return {
            "progress": asdict(self.progress),
            "values": {name: asdict(measured) for name, measured in self.values.items()},
            "optimizer": optimizer_state(self.optimizer, self.trained),
            "scaler": self.step.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "growth": self.growth.state_dict() if self.growth is not None else None,
            "allocator": self.allocator.state_dict(),
            "method": self.method.state_dict(),
            "engine": self.engine.state_dict() if self.engine is not None else None,
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], events: Sequence[GrowthEvent]) -> None:
        """Go on where `state_dict` was taken; the model has its shape and weights already, and the loop its
        stream.

        Args:
            events: growth so far, from growth.jsonl.
        """
        self.method.restore(state["method"])
        vars(self.progress).update(state["progress"])
        self.values = {name: Measured(**value) for name, value in state["values"].items()}
        load_optimizer_state(self.optimizer, self.trained, state["optimizer"])
        if self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.growth is not None:
            self.growth.load_state_dict(state["growth"], events)
        self.allocator.load_state_dict(state["allocator"])
        self.method.load_state_dict(state["method"])
        if self.engine is not None:
            self.engine.load_state_dict(state["engine"])
        set_random_state(state["random"])
        self._shape_changed()

    # ---- a run that ends earlier, on trial --------------------------------------------------------

    @contextmanager
    def kept(self, stream: AnyStream) -> Generator[None]:
        """After the block everything is, bit by bit, as it was; inside it may be trained, but not grown."""
        tensors = [*itertools.chain(self.trained.parameters(), self.trained.buffers())]
        before = [tensor.detach().clone() for tensor in tensors]
        state = copy.deepcopy({**self.state_dict(), "stream": stream.state_dict()})
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, kept in zip(tensors, before, strict=True):
                    tensor.copy_(kept)
            # What the optimizer had no state of yet, it has none of again.
            self.optimizer.state.clear()
            stream.load_state_dict(state["stream"])  # which may draw random numbers
            self.load_state_dict(state, self.growth.history if self.growth is not None else ())

    def earlier_ends(self, stream: AnyStream, stage_steps: Sequence[int]) -> dict[int, int]:
        """Where the run is scored as if it ended earlier: the step at which that decay begins -> its end.

        Raises:
            ConfigError: it has several tasks, no decay, or more to it than a model that trains.
        """
        shares, schedule = self.evaluation.decayed_at, self.config.schedule
        if not shares:
            return {}
        if isinstance(stream, LoaderStream):
            raise ConfigError(
                "--evaluation.decayed_at goes back in the text, which a data loader of one's own cannot: "
                "leave it out, or train on prepared text (cambia.data.Stream)"
            )
        plain = isinstance(self.allocator, PlainAllocator) and self.engine is None
        if not isinstance(schedule, WSD) or len(stage_steps) > 1 or not plain:
            raise ConfigError(
                "--evaluation.decayed_at is for runs of one task, without experts and without learned "
                "decoding, whose rate decays at the end: --training.schedule.type wsd, or leave it out"
            )
        ends = [max(1, round(share * stage_steps[0])) for share in shares]
        begins = {schedule.decay_begins(end): end for end in ends}
        if len(begins) < len(shares) or stage_steps[0] in begins:
            raise ConfigError(
                f"--evaluation.decayed_at {shares}: of {stage_steps[0]} steps, some of these ends are the "
                "same, or have no decay before them; leave them out, or train longer"
            )
        return begins
