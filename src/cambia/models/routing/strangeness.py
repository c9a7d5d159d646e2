"""How strange a prefix is to a Part, measured against the Part's own text of the same length.

What is ordinary is measured once, on rows of the Part's domain from which neither it nor its statistics
learned: for each kind of evidence and each of some prefix lengths, mean and spread. Evidence of several kinds
is put into these units and averaged, and the average into its own; lengths in between are interpolated.

A bound holds a stated share of the domain's own prefixes: that of Student's prediction interval, which knows
how few rows were measured, or the conformal one where rows far out were seen (Vovk, Gammerman and Shafer
2005, Algorithmic Learning in a Random World).
"""

# B prefixes, N held-out rows, L prefix lengths, S kinds of evidence

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens of prefixes that are measured, as far as rows reach."""
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
    ranked: Tensor
    """(L, N) float64, ascending: the average of the kinds for each row, to rank among."""

    @classmethod
    def of(cls, lengths: list[int], evidence: Tensor) -> Strangeness:
        """From what held-out rows look like to their own Part, higher being stranger: (L, N, S)."""
        center = evidence.mean(1)
        spread = _std(evidence, 1).clamp_min(_LEAST)
        averaged = ((evidence - center[:, None]) / spread[:, None]).mean(2)
        return cls(tuple(lengths), center, spread, averaged.sort(1).values)

    def units(self, evidence: Tensor, lengths: Tensor) -> Tensor:
        """(B, S) of prefixes of some lengths (B,) -> (B,): the average, in its standard deviations."""
        center, spread = (
            between(self.lengths, self.center, lengths),
            between(self.lengths, self.spread, lengths),
        )
        averaged = ((evidence - center) / spread).mean(1)
        own = torch.stack([self.ranked.mean(1), _std(self.ranked, 1).clamp_min(_LEAST)], 1)  # (L, 2)
        mean, deviation = between(self.lengths, own, lengths).unbind(1)
        return (averaged - mean) / deviation

    def bound(self, share: float, lengths: Tensor) -> Tensor:
        """(B,): below which this share of the Part's own prefixes lie, in the units of `units`."""
        count = self.ranked.shape[1]
        units = (self.ranked - self.ranked.mean(1, keepdim=True)) / _std(self.ranked, 1, keep=True).clamp_min(
            _LEAST
        )
        rank = math.ceil(share * (count + 1))  # beyond the last row the interval alone says
        seen = units[:, min(rank, count) - 1]
        limit = student(share, count - 1) * math.sqrt(1 + 1 / count)
        return between(self.lengths, seen.clamp_min(limit)[:, None], lengths)[:, 0]

    def inside(self, evidence: Tensor, lengths: Tensor, share: float) -> Tensor:
        """(B, S) -> (B,): how far prefixes lie inside of this bound, in the same units; negative outside."""
        return self.bound(share, lengths) - self.units(evidence, lengths)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "lengths": list(self.lengths)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Strangeness:
        """The inverse of `state_dict`."""
        return cls(**{**state, "lengths": tuple(state["lengths"])})


def _std(values: Tensor, axis: int, *, keep: bool = False) -> Tensor:
    return values.std(axis, correction=1, keepdim=keep)


def between(known: tuple[int, ...], values: Tensor, lengths: Tensor) -> Tensor:
    """Values (L, S) at some lengths -> (B, S) at others (B,): linear in the logarithm, level outside."""
    if len(known) == 1:
        return values.expand(len(lengths), -1)
    grid = torch.tensor(known, dtype=torch.float64).log2()
    at = lengths.double().clamp(known[0], known[-1]).log2()
    above = torch.searchsorted(grid, at).clamp(1, len(known) - 1)
    share = ((at - grid[above - 1]) / (grid[above] - grid[above - 1]))[:, None]
    return values[above - 1] * (1 - share) + values[above] * share


def student(share: float, freedom: int) -> float:
    """The quantile of Student's t, by its expansion (Abramowitz and Stegun 1964, 26.7.5)."""
    x = NormalDist().inv_cdf(share)
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    return x + first / freedom + second / freedom**2
