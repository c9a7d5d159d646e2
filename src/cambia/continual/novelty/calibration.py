"""What is ordinary for a domain: how strange its own held-out windows are to it.

A new window is ranked among them, which gives a conformal p-value (Vovk, Gammerman and Shafer 2005,
Algorithmic Learning in a Random World): if the window is one more of the same kind, exchangeable with those
held out, then P(p <= e) <= e for every e, whatever the scores are. No distribution is assumed.

That is an average over which windows happened to be held out. For the ones at hand the rate may lie higher;
`risk` says how likely that is (Vovk 2012, Conditional validity of inductive conformal predictors,
arXiv:1209.2673).
"""

# B windows, S scores, N windows held out

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cambia.errors import DataError


@dataclass(frozen=True, eq=False)
class Calibration:
    """A domain's held-out windows, as numbers."""

    center: Tensor
    """(S,) float64: the mean of each score."""
    spread: Tensor
    """(S,) float64: its standard deviation."""
    ranked: Tensor
    """(N,) float64, ascending: combined scores that new ones are ranked among."""

    @classmethod
    def of(cls, strangeness: Tensor) -> Calibration:
        """From the scores (N, S) of held-out windows, in the order of the text.

        Every other window gives the scale and the rest the ranks: were they the same windows, those ranked
        would fit the scale better than a new one does, and p-values would be a little too small.

        Raises:
            DataError: a score is not a number.
        """
        strangeness = _checked(strangeness)
        scale, rest = strangeness[0::2], strangeness[1::2]
        num_scores = strangeness.shape[1]
        if len(scale) < 2:
            # Nothing to compare with: every p-value will be 1.
            none = torch.zeros(num_scores, dtype=torch.float64)
            return cls(none, torch.ones_like(none), strangeness.new_empty(0))
        spread = scale.std(0).clamp_min(1e-9)
        made = cls(scale.mean(0), spread, strangeness.new_empty(0))
        return cls(made.center, made.spread, made.combined(rest).sort().values)

    def combined(self, strangeness: Tensor) -> Tensor:
        """(B, S) -> (B,): the mean of the scores, each in standard deviations of the domain's own windows."""
        return ((_checked(strangeness) - self.center) / self.spread).mean(1)

    def p_values(self, combined: Tensor) -> Tensor:
        """(B,) -> (B,): the share of held-out windows, the new one among them, at least as strange."""
        below = torch.searchsorted(self.ranked, combined.contiguous())
        count = len(self.ranked)
        return (1 + count - below).double() / (count + 1)

    def risk(self, level: float, allowed: float) -> float:
        """How likely it was to hold out windows that let more than `allowed` of the domain's fall to `level`.

        The share that does is Beta distributed over draws of the N windows, whatever the scores are:
        P(share > allowed) = P(Binomial(N, allowed) < rank of the level).
        """
        count = len(self.ranked)
        rank = math.floor(level * (count + 1) + 1e-9)
        return sum(math.comb(count, i) * allowed**i * (1 - allowed) ** (count - i) for i in range(rank))

    def state_dict(self) -> dict[str, Any]:
        """Tensors alone."""
        return {"center": self.center, "spread": self.spread, "ranked": self.ranked}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Calibration:
        """The inverse of `state_dict`."""
        return cls(state["center"], state["spread"], state["ranked"])


def _checked(strangeness: Tensor) -> Tensor:
    if not bool(strangeness.isfinite().all()):
        raise DataError(
            "a window's novelty score is not a number: a window without two tokens has no likelihood, and "
            "features of one that overflowed have no distance; leave such windows out"
        )
    return strangeness.to("cpu", torch.float64)
