"""Learning-rate schedules: a factor between 0 and 1 at each place of a stretch of training.

WSD(warmup_fraction=0.05, decay_fraction=0.2).factor(step, length)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

SCHEDULES: dict[str, str] = {
    "wsd": "cambia.training.schedules:WSD",
    "cosine": "cambia.training.schedules:Cosine",
    "constant": "cambia.training.schedules:Constant",
}

Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning-rate schedule over a stretch of optimizer steps."""

    warmup_fraction: Share = 0.05
    """Share of the stretch in which the rate rises from zero."""
    over: Literal["task", "run"] | None = None
    """What the stretch is: every task for itself (the rate re-warms and decays in each, so that the rows
    of the task matrix compare), or the whole run. Left out: every task, or the run where the learner may not
    see where tasks end."""

    def warmup_steps(self, length: int) -> int:
        """Steps in which the rate rises, of a stretch of `length` steps."""
        return round(self.warmup_fraction * length)

    def factor(self, step: int, length: int) -> float:
        """The factor at the 0-based `step` of a stretch of `length` steps; beyond it, that of its end."""
        warmup = self.warmup_steps(length)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(1, length - warmup)
        return self.after_warmup(step - warmup if step < length else left, left)

    def falls(self, step: int, length: int) -> bool:
        """Whether the rate is below its highest after it was there."""
        return step >= self.warmup_steps(length) and self.factor(step, length) < 1

    @abstractmethod
    def after_warmup(self, step: int, length: int) -> float:
        """The factor in the remaining `length` steps."""


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): grow in the stable phase, decay once.

    The decay follows one minus the square root (Hägele et al. 2024, arXiv:2405.18392).
    """

    decay_fraction: Share = 0.2
    """Share of the stretch, at its end, in which the rate falls."""
    final: Share = 0.0
    """The factor at the very end."""

    def decay_begins(self, length: int) -> int:
        """The first step at which the rate falls, of a stretch of `length` steps."""
        warmup = self.warmup_steps(length)
        return warmup + self._stable(max(1, length - warmup))

    def after_warmup(self, step: int, length: int) -> float:
        begin = self._stable(length)
        if step < begin or begin == length:
            return 1.0
        return self.final + (1 - self.final) * (1 - math.sqrt((step - begin + 1) / (length - begin + 1)))

    def _stable(self, length: int) -> int:
        """Steps at the full rate, of those after the warm-up."""
        whole = length / max(1e-9, 1 - self.warmup_fraction)
        return length - min(length, round(self.decay_fraction * whole))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine down after the warm-up (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    final: Share = 0.1
    """The factor at the end."""

    def after_warmup(self, step: int, length: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * step / length))


@dataclass(frozen=True)
class Constant(Schedule):
    """The full rate after the warm-up."""

    def after_warmup(self, step: int, length: int) -> float:
        return 1.0
