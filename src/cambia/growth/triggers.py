"""Triggers say when a model should grow.

A trigger reads `Signals` once per optimizer step and answers with a reason, or with None. It acts only
on fresh measurements and keeps a state that a checkpoint can hold.

    class Bored(Trigger):
        def update(self, signals):
            return "bored" if signals.step % 1000 == 0 else None

A trigger's dataclass fields are its configuration; fields with `init=False` are its state.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Gt

from cambia.config import Spelled
from cambia.errors import ConfigError
from cambia.records import Signals

TRIGGERS: dict[str, str] = {
    "plateau": "cambia.growth.triggers:PlateauTrigger",
    "schedule": "cambia.growth.triggers:ScheduleTrigger",
}


class Trigger(Spelled, ABC):
    """Says when."""

    @abstractmethod
    def update(self, signals: Signals) -> str | None:
        """Take in what is known after a step; return a reason to grow, or None."""

    def reset(self) -> None:
        """Start afresh after the model has grown. Does nothing unless overridden."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain values: the fields with `init=False`."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class ScheduleTrigger(Trigger):
    """Fires once at each of the given marks, so that every machine grows at the same place.

    Exactly one kind of mark is given. For pretraining, one mark inside the stable phase of a
    warm-up-stable-decay schedule is the best known choice (Bu 2025, arXiv:2511.04981).
    """

    at_steps: list[int] | None = None
    """Optimizer steps."""
    at_tokens: list[int] | None = None
    """Training tokens seen."""
    at_fractions: list[float] | None = None
    """Shares of the planned run, between 0 and 1."""
    passed: int = field(default=0, init=False)
    """How many marks lie behind."""

    def __post_init__(self) -> None:
        given = [marks for marks in (self.at_steps, self.at_tokens, self.at_fractions) if marks]
        if len(given) != 1:
            raise ConfigError("a schedule trigger takes exactly one of at_steps, at_tokens and at_fractions")
        if self.at_fractions and not all(0 < mark < 1 for mark in self.at_fractions):
            raise ConfigError(f"at_fractions={self.at_fractions} must lie between 0 and 1")

    def update(self, signals: Signals) -> str | None:
        marks, now, unit = self._marks(signals)
        behind = sum(mark <= now for mark in marks)
        if behind <= self.passed:
            return None
        mark = sorted(marks)[behind - 1]
        self.passed = behind
        return f"schedule: {mark:g} {unit} reached"

    def _marks(self, signals: Signals) -> tuple[list[int] | list[float], float, str]:
        if self.at_steps:
            return self.at_steps, signals.step, "steps"
        if self.at_tokens:
            return self.at_tokens, signals.tokens, "tokens"
        return self.at_fractions or [], signals.progress, "of the run"


@dataclass
class PlateauTrigger(Trigger):
    """Fires when a measured loss has stopped improving.

    It needs a measurement (`evaluation.every_steps`); between measurements it waits. For saving compute
    in pretraining it fires too late by construction: use it on streams.
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {
        "window_steps": "patience",
        "eps": "min_improvement",
        "threshold": "min_improvement",
    }

    patience: Annotated[int, Gt(0)] = 5
    """Measurements in a row without improvement."""
    min_improvement: float = 0.002
    """An improvement is a loss lower than the best so far by at least this, in the loss's own unit."""
    metric: str = "validation_loss"
    """Name of the measurement to watch."""
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience={self.patience} must be at least 1 measurement")

    def update(self, signals: Signals) -> str | None:
        value = signals.fresh(self.metric)
        if value is None or not math.isfinite(value):
            return None
        if self.best is None or value <= self.best - self.min_improvement:
            self.best, self.waited = value, 0
            return None
        self.waited += 1
        if self.waited < self.patience:
            return None
        return f"plateau: {self.metric} not below {self.best:.4f} for {self.waited} measurements"

    def reset(self) -> None:
        # The best so far stays: the grown model must beat it, not start from nothing.
        self.waited = 0
