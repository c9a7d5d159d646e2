"""The state of a trainer: everything that a resumed run needs to go on bit by bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from cambia.continual.methods.method import AnyStream
from cambia.errors import ConfigError
from cambia.records import GrowthEvent, Measured
from cambia.training.allocation import PlainAllocator
from cambia.training.checkpoint import random_state, set_random_state
from cambia.training.optim import load_optimizer_state, optimizer_state
from cambia.training.schedules import WSD

if TYPE_CHECKING:
    from cambia.training.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything but the model and the place in the text."""
    return {
        "progress": asdict(trainer.progress),
        "values": {name: asdict(measured) for name, measured in trainer.values.items()},
        "optimizer": optimizer_state(trainer.optimizer, trainer.trained),
        "scaler": trainer.step.scaler.state_dict(),
        "average": trainer.average.state_dict() if trainer.average is not None else None,
        "growth": trainer.growth.state_dict() if trainer.growth is not None else None,
        "allocator": trainer.allocator.state_dict(),
        "method": trainer.method.state_dict(),
        "engine": trainer.engine.state_dict() if trainer.engine is not None else None,
        "random": random_state(),
    }


def take_up(trainer: Trainer, state: Mapping[str, Any], events: Sequence[GrowthEvent]) -> None:
    """Go on where `state_of` was taken; the model has its shape and weights already.

    Args:
        events: growth so far.
    """
    trainer.method.restore(state["method"])
    vars(trainer.progress).update(state["progress"])
    trainer.values = {name: Measured(**value) for name, value in state["values"].items()}
    load_optimizer_state(trainer.optimizer, trainer.trained, state["optimizer"])
    if trainer.step.scaler.is_enabled():
        trainer.step.scaler.load_state_dict(state["scaler"])
    if trainer.average is not None:
        trainer.average.load_state_dict(state["average"])
    if trainer.growth is not None:
        trainer.growth.load_state_dict(state["growth"], events)
    trainer.allocator.load_state_dict(state["allocator"])
    trainer.method.load_state_dict(state["method"])
    if trainer.engine is not None:
        trainer.engine.load_state_dict(state["engine"])
    set_random_state(state["random"])


# ---- a run that ends earlier, on trial ------------------------------------------------------------


@contextmanager
def kept(trainer: Trainer, stream: AnyStream) -> Generator[None]:
    """After the block everything is, bit by bit, as it was; inside it may be trained, but not grown."""
    weights = [(tensor, tensor.detach().clone()) for tensor in _tensors(trainer)]
    state = copy.deepcopy({**state_of(trainer), "stream": stream.state_dict()})
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in weights:
                tensor.copy_(before)
        # What the optimizer had no state of yet, it has none of again.
        trainer.optimizer.state.clear()
        take_up(trainer, state, trainer.growth.history if trainer.growth is not None else ())
        stream.load_state_dict(state["stream"])


def _tensors(trainer: Trainer) -> Generator[torch.Tensor]:
    yield from itertools.chain(trainer.trained.parameters(), trainer.trained.buffers())


def ends_of(trainer: Trainer, stage_steps: Sequence[int]) -> dict[int, int]:
    """Where the run is scored as if it ended earlier: the step at which that decay begins -> where it ends.

    Raises:
        ConfigError: it has several tasks, no decay, or more to it than a model that trains.
    """
    shares, schedule = trainer.evaluation.decayed_at, trainer.config.schedule
    if not shares:
        return {}
    plain = isinstance(trainer.allocator, PlainAllocator) and trainer.engine is None
    if not isinstance(schedule, WSD) or len(stage_steps) > 1 or not plain:
        raise ConfigError(
            "--evaluation.decayed_at is for runs of one task, without experts and without learned decoding, "
            "whose rate decays at the end: --training.schedule.type wsd, or leave it out"
        )
    ends = [max(1, round(share * stage_steps[0])) for share in shares]
    return {schedule.decay_begins(end): end for end in ends}
