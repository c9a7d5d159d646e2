"""What runs say of each other: operations to one loss, and what was saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cambia import rundir
from cambia.rundir import RunReader


@dataclass(frozen=True)
class Ended:
    """A run at its end, with its rate decayed; or what it would have been, had it ended there."""

    flops: float
    """All that it took."""
    test: float
    """Bits per byte."""
    valid: float


@dataclass(frozen=True)
class Ran:
    """One run."""

    seed: int
    ends: tuple[Ended, ...]
    """By what they cost; the last is its own."""
    tokens: int
    grown_at: tuple[float, ...]
    """Shares of the run after which it grew."""

    @property
    def last(self) -> Ended:
        return self.ends[-1]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Ran:
        ends = tuple(Ended(**end) for end in found["ends"])
        return cls(**{**found, "ends": ends, "grown_at": tuple(found["grown_at"])})


def ran(folder: Path, seed: int) -> Ran:
    """A finished run, as its folder tells it."""
    run = RunReader(folder)
    summary = run.summary() or {}
    scores = {row["split"]: row["bits_per_byte"] for row in run.rows(rundir.EVAL)}
    earlier = [
        Ended(row["flops"], row["test_bits_per_byte"], row["valid_bits_per_byte"])
        for row in run.rows(rundir.DECAYED)
    ]
    # Training, verifying growth, and what triggers had measured.
    spent = summary["flops"] + summary["flops_grown"] + summary["flops_scored"]
    last = Ended(spent, scores["test"], scores["valid"])
    grown = [event["step"] / summary["steps"] for event in run.growth() if event["done"]]
    return Ran(seed, (*earlier, last), summary["tokens"], tuple(grown))


def spent_to(curve: Sequence[Ended], bits: float) -> float:
    """Operations at which a curve reaches a loss, test bits per byte.

    Between its points the logarithm of operations is linear in that of the loss; beyond them the nearest
    piece goes on.
    """
    points = [(math.log(end.test), math.log(end.flops)) for end in curve]
    if len(points) < 2:
        raise ValueError("a curve has two points or more")
    pieces = list(pairwise(points))
    wanted = math.log(bits)
    piece = next((one for one in pieces if one[1][0] <= wanted), pieces[-1])
    (left, low), (right, high) = piece
    if right >= left:  # more was spent for no better a loss: that says nothing
        return math.exp(low if wanted >= left else high)
    return math.exp(low + (high - low) * (wanted - left) / (right - left))


def is_beyond(curve: Sequence[Ended], bits: float) -> bool:
    """Whether a loss is none between a curve's first and last."""
    return not curve[-1].test <= bits <= curve[0].test


def saving(curve: Sequence[Ended], spent: float, bits: float) -> float:
    """The share of operations that reaching a loss with `spent` saves; negative where it cost more."""
    return 1 - spent / spent_to(curve, bits)
