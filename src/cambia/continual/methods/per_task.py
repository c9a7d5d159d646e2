"""Weights of its own for each task, and an oracle that says at test time which task a text is of.

What can be had without interference, and at what price: the bound for everything that routes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cambia.continual.methods.lora import Adapting
from cambia.continual.methods.method import (
    AnyStream,
    Contract,
    Method,
    Parameters,
    Situation,
    copied,
)
from cambia.errors import ConfigError
from cambia.models.bodies import count_parameters

ORACLE = Contract(
    needs_boundaries=True, needs_identity=True, rewrites_weights=True, grows=False, keeps_answers=True
)


class Records:
    """The tensors of each task, as they were when it ended: sealed.

    A task that comes again goes on from its last record and makes a new one; the old one stays.
    """

    def __init__(self, stream: AnyStream, live: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer):
        mixed = [s.name for s in stream.stages if s.until or sum(weight > 0 for weight in s.weights) != 1]
        if mixed:
            raise ConfigError(
                f"weights for each task need stages of one task, and {mixed[0]!r} has text of several: "
                "choose another --data.stream, or a method that shares its weights"
            )
        self.tasks = [max(range(len(s.weights)), key=lambda j, s=s: s.weights[j]) for s in stream.stages]
        self.live, self.optimizer = live, optimizer
        self.start = copied(live)
        self.sealed: dict[str, dict[str, Tensor]] = {}
        """By task and version: "2", and "2.1" where it came again."""

    def of(self, task: int) -> dict[str, Tensor] | None:
        """The last record of a task; None if it never ended."""
        last = self._versions(task) - 1
        return self.sealed[_version(task, last)] if last >= 0 else None

    @torch.no_grad()
    def begin(self, stage: int) -> None:
        """From the task's own record on, or else from the start; with an optimizer that remembers nothing."""
        record = self.of(self.tasks[stage]) or self.start
        for name, parameter in self.live.items():
            parameter.copy_(record[name])
            self.optimizer.state.pop(parameter, None)

    def seal(self, stage: int) -> None:
        task = self.tasks[stage]
        self.sealed[_version(task, self._versions(task))] = copied(self.live)

    @property
    def count(self) -> int:
        """Tasks that have one."""
        return len({name.partition(".")[0] for name in self.sealed})

    def _versions(self, task: int) -> int:
        """How many records a task has."""
        return sum(name.partition(".")[0] == str(task) for name in self.sealed)

    @contextmanager
    def shown(self, task: int) -> Generator[None]:
        """The live tensors are those of a task inside the block."""
        record = self.of(task) or self.start
        before = {name: parameter.data for name, parameter in self.live.items()}
        try:
            for name, parameter in self.live.items():
                parameter.data = record[name]
            yield
        finally:
            for name, parameter in self.live.items():
                parameter.data = before[name]

    def promised(self) -> dict[str, Tensor]:
        return {f"task {v}: {name}": t for v, record in self.sealed.items() for name, t in record.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "sealed": self.sealed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        devices = {name: parameter.device for name, parameter in self.live.items()}
        self.start = {name: value.to(devices[name]) for name, value in state["start"].items()}
        self.sealed = {
            version: {name: value.to(devices[name]) for name, value in record.items()}
            for version, record in state["sealed"].items()
        }


class Recorded(Method):
    """A method that keeps `records` of every task and answers each with its own."""

    records: Records

    def begin_stage(self, stage: int) -> None:
        self.records.begin(stage)

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        self.records.seal(stage)

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        with self.records.shown(task):
            yield

    def promised(self) -> Mapping[str, Tensor]:
        return {**super().promised(), **self.records.promised()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "records": self.records.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.records.load_state_dict(state["records"])


@dataclass
class LoraPerTask(Recorded, Adapting):
    """An adapter for each task on one frozen model: nothing is forgotten, and somebody has to say which to
    use."""

    CONTRACT: ClassVar[Contract] = ORACLE

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self.records = Records(situation.stream, situation.parameters(), situation.optimizer)

    def parameters(self) -> Parameters:
        trained = sum(p.numel() for p in self.records.live.values())
        model = count_parameters(self.situation.model)
        added = sum(p.numel() for p in self.adapter.parameters())
        return Parameters(trained, model + trained * max(1, self.records.count), model + added)


@dataclass
class FullPerTask(Recorded):
    """A whole model for each task, each fine-tuned from the same start: the specialists."""

    CONTRACT: ClassVar[Contract] = ORACLE

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self.records = Records(situation.stream, situation.parameters(), situation.optimizer)

    def parameters(self) -> Parameters:
        trained = sum(p.numel() for p in self.records.live.values())
        model = count_parameters(self.situation.model)
        return Parameters(trained, model * max(1, self.records.count), model)


def _version(task: int, number: int) -> str:
    return f"{task}.{number}" if number else str(task)
