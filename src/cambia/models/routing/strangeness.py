"""How strange a prefix is to a Part, measured against the Part's own text of the same length.

What is ordinary is measured once, on rows of the Part's domain from which neither it nor its statistics
learned: for each kind of evidence and each of some prefix lengths, mean and spread. Evidence of several kinds
is put into these units and averaged, and the average into its own; lengths in between are interpolated.

Rows that were held out are few and later text drifts, so no tail is taken for normal: whatever a distribution
is, if it has one peak, no more than 4 / (9 (1 + b^2)) of it lies more than b standard deviations above its
mean (Vysochanskij and Petunin 1983, Justification of the 3-sigma rule for unimodal distributions).
"""

# B prefixes, N held-out rows, L prefix lengths, S kinds of evidence

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens of prefixes that are measured, as far as rows reach."""
LEAST_ROWS = 4
"""Held-out rows without which nothing can be said of what is ordinary."""
_LEAST = 1e-9


def lengths_within(width: int) -> list[int]:
    """The lengths that rows of so many tokens can be measured at; their own where they are very short."""
    return [length for length in LENGTHS if length <= width] or [width]


@dataclass(frozen=True, eq=False)
class Strangeness:
    """What is ordinary for one Part."""

    lengths: tuple[int, ...]
    """L prefix lengths, ascending."""
    center: Tensor
    """(L, S) float64: the mean of each kind of evidence."""
    spread: Tensor
    """(L, S) float64: its standard deviation."""
    average: Tensor
    """(L, 2) float64: mean and standard deviation of the average over kinds. A new row's is uncertain by what
    the N rows do not say: the deviation is that of the predictive distribution, Student's."""

    @classmethod
    def of(cls, lengths: list[int], evidence: Tensor) -> Strangeness:
        """From what held-out rows look like to their own Part, higher being stranger: (L, N, S)."""
        count = evidence.shape[1]
        center, spread = evidence.mean(1), evidence.std(1).clamp_min(_LEAST)
        averaged = ((evidence - center[:, None]) / spread[:, None]).mean(2)  # (L, N)
        spread_of_new = averaged.std(1).clamp_min(_LEAST) * widened(count)
        average = torch.stack([averaged.mean(1), spread_of_new], 1)
        return cls(tuple(lengths), center, spread, average)

    def units(self, evidence: Tensor, lengths: Tensor) -> Tensor:
        """(B, S) of prefixes of some lengths (B,) -> (B,): the average, in its standard deviations."""
        known = torch.cat([self.center, self.spread, self.average], 1)
        kinds = self.center.shape[1]
        center, spread, average = between(self.lengths, known, lengths).split([kinds, kinds, 2], 1)
        return (((evidence - center) / spread).mean(1) - average[:, 0]) / average[:, 1]

    def usual_gain(self, lengths: Tensor) -> Tensor:
        """(B,) nats per token that the Part gains over the base on its own text of some lengths (B,)."""
        return -between(self.lengths, self.center[:, 2:], lengths)[:, 0]

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "lengths": list(self.lengths)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Strangeness:
        """The inverse of `state_dict`."""
        return cls(tuple(state["lengths"]), state["center"], state["spread"], state["average"])


def widened(count: int) -> float:
    """By how much the deviation of a new value is larger than that of `count` known ones, 4 at least: that of
    the predictive distribution, Student's."""
    return math.sqrt((1 + 1 / count) * (count - 1) / (count - 3))


def between(known: tuple[int, ...], values: Tensor, lengths: Tensor) -> Tensor:
    """Values (L, S) at some lengths -> (B, S) at others (B,): linear in the logarithm, level outside."""
    if len(known) == 1:
        return values.expand(len(lengths), -1)
    grid = torch.tensor(known, dtype=torch.float64).log2()
    at = lengths.double().clamp(known[0], known[-1]).log2()
    above = torch.searchsorted(grid, at).clamp(1, len(known) - 1)
    share = ((at - grid[above - 1]) / (grid[above] - grid[above - 1]))[:, None]
    return values[above - 1] * (1 - share) + values[above] * share
