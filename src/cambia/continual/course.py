"""How a Part is taught: its phases, their rates, and when it has learned what it can.

Warm-up and cycles are those of `TwoPhaseLRScheduler`; but a seeding ends when the stream says so, not after a
number of steps, and the consolidation after it has an end too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from cambia.continual.two_phase import half_cosine
from cambia.models.routing.hybrid import Maturity

Phase = Literal["seeding", "consolidating"]


@dataclass(frozen=True)
class Course:
    """How a Part is taught."""

    warmup_steps: Annotated[int, Ge(0)] = 10
    """Steps in which its learning rate rises to the highest."""
    cycle_steps: Annotated[int, Gt(0)] | None = None
    """Steps of a cycle of its seeding: the rate falls as half a cosine and is set up again; null: none."""
    cycle_low: Annotated[float, Ge(0), Le(1)] = 0.1
    """Where a cycle ends, as a share of the highest rate."""
    consolidation_steps: Annotated[int, Ge(0)] = 80
    """Steps at a falling rate at its end, on rows that it has read."""
    memory_rows: Annotated[int, Gt(0)] = 1280
    """Rows of its text that are kept for that until it is sealed: a random sample; the latest ones would
    be of one place in a text that drifts."""
    held_rows: Annotated[int, Ge(0)] = 16
    """Of its first rows so many are not trained on, to see what it has learned; at most a third."""
    calibration_rows: Annotated[int, Ge(0)] = 48
    """Later every eighth row waits too, up to so many; the oldest are learned from as newer ones come. They
    tell the router what is ordinary."""
    birth: Literal["zero", "nearest"] = "zero"
    """A new Part begins as nothing, or as a copy of the one that foretells its first rows best."""
    measure_steps: Annotated[int, Gt(0)] | None = 20
    """Steps between looks at its loss on the rows that are held back for good; null: it is never mature."""
    maturity: Maturity = field(default_factory=lambda: Maturity(window=8, slope=0.002))
    """When it has learned what it can and consolidates, though nothing else has come."""

    def rate(self, phase: Phase, step: int) -> float:
        """The rate of a phase's `step`-th step, counted from 1, as a share of the highest."""
        if phase == "consolidating":
            return 1 - (step - 0.5) / self.consolidation_steps
        if self.cycle_steps is None or step <= self.warmup_steps:
            return min(1.0, step / (self.warmup_steps + 1))
        done = (step - 1 - self.warmup_steps) % self.cycle_steps / self.cycle_steps
        return half_cosine(done, 1.0, self.cycle_low)
