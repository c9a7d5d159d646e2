"""Two phases of a new Part's learning rate: seeding at a high rate, then consolidation at a low one.

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = TwoPhaseLRScheduler(optimizer, high_lr=5e-3, low_lr=5e-4, seeding_steps=200)
    for batch in batches:
        ...
        optimizer.step()
        scheduler.step()

It is a stock torch scheduler: it goes wherever one is taken, the Hugging Face Trainer included.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cambia.errors import ConfigError

_BORN = "two_phase_from"
"""The key of a param group that holds the step at which its seeding began; optimizers save such keys."""


class TwoPhaseLRScheduler(LRScheduler):
    """`high_lr` while a Part is seeded, then down to `low_lr`, where it stays: DyLoRA-MoE's two phases.

    What is given are rates, in the optimizer's own unit, and they are those of its first param group. Each
    other group keeps the ratio that its rate had to the first one's when both were given to the optimizer.

    A group that is added later begins its own seeding with the first step that it takes, and does not
    disturb the others, so one scheduler serves Parts that are born one after another.

    The rate rises in a straight line over `warmup_steps`, and falls after the seeding as half a cosine over
    `decay_steps`. Within the seeding it may fall to `low_lr` and be set up again every `cycle_steps` (warm
    restarts, Loshchilov & Hutter 2017, arXiv:1608.03983), which looks for a wider place to settle in.

    Args:
        optimizer: whose rates are set.
        high_lr: the rate of the seeding.
        low_lr: the rate of the consolidation.
        seeding_steps: optimizer steps at the high rate, the warm-up included.
        warmup_steps: of these, how many lead up to the high rate; None: one in twenty.
        decay_steps: steps from the high rate to the low one, after the seeding; None: as many as the
            seeding; 0: at once.
        cycle_steps: steps of a cycle within the seeding; None: the high rate throughout.
        last_epoch: as in every torch scheduler: steps done, less one, when going on with one that was saved.

    Raises:
        ConfigError: a rate or a number of steps makes no sense, or the first group's own rate is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        high_lr: float,
        low_lr: float,
        seeding_steps: int,
        *,
        warmup_steps: int | None = None,
        decay_steps: int | None = None,
        cycle_steps: int | None = None,
        last_epoch: int = -1,
    ):
        if not 0 < low_lr <= high_lr:
            raise ConfigError(
                f"low_lr {low_lr} and high_lr {high_lr}: expected rates above 0, the low one not the higher"
            )
        self.high_lr, self.low_lr, self.seeding_steps = high_lr, low_lr, seeding_steps
        self.warmup_steps = seeding_steps // 20 if warmup_steps is None else warmup_steps
        self.decay_steps = seeding_steps if decay_steps is None else decay_steps
        self.cycle_steps = cycle_steps
        if min(seeding_steps, self.warmup_steps, self.decay_steps) < 0 or self.warmup_steps > seeding_steps:
            raise ConfigError(
                f"seeding_steps {seeding_steps}, warmup_steps {self.warmup_steps}, decay_steps "
                f"{self.decay_steps}: expected at least 0, and no more warm-up than seeding"
            )
        if cycle_steps is not None and cycle_steps < 1:
            raise ConfigError(f"cycle_steps {cycle_steps}: expected at least 1, or None for no cycles")
        if last_epoch == -1:
            for group in optimizer.param_groups:
                group.pop(_BORN, None)  # of a scheduler before this one
        # A group that is new must not take its first step at the rate it was handed in with.
        optimizer.register_step_pre_hook(self._greet)
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        """The first group's rate at its own 0-based `step`."""
        if step < self.warmup_steps:
            return self.high_lr * (step + 1) / (self.warmup_steps + 1)
        if step < self.seeding_steps:
            if self.cycle_steps is None:
                return self.high_lr
            done = (step - self.warmup_steps) % self.cycle_steps / self.cycle_steps
            return half_cosine(done, self.high_lr, self.low_lr)
        passed = step - self.seeding_steps + 1
        if passed > self.decay_steps:
            return self.low_lr
        return half_cosine(passed / (self.decay_steps + 1), self.high_lr, self.low_lr)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups at the current step."""
        return [self._rate_of(group) for group in self.optimizer.param_groups]

    def _rate_of(self, group: dict[str, Any]) -> float:
        # The group's own step: its seeding began when it was seen first.
        step = self.last_epoch - group.setdefault(_BORN, self.last_epoch)
        first = _given(self.optimizer.param_groups[0])
        if first <= 0:
            raise ConfigError(
                f"the first param group has the rate {first:g}, to which no other has a ratio: give it one "
                "above 0"
            )
        return self.rate(step) * _given(group) / first

    def _greet(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step: give groups that were not there before the rate that their seeding begins with."""
        for group in optimizer.param_groups:
            if _BORN not in group:
                rate = self._rate_of(group)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate


def half_cosine(done: float, high: float, low: float) -> float:
    """From the high rate, at `done` 0, to the low one, at 1."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def _given(group: dict[str, Any]) -> float:
    """The rate that a group was given to the optimizer with."""
    return float(group.setdefault("initial_lr", float(group["lr"])))
