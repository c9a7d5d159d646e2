"""What is ordinary for a domain: how strange its own windows were to it before it had learned from them.

A new window is ranked among them, which gives a conformal p-value (Vovk, Gammerman and Shafer 2005,
Algorithmic Learning in a Random World): if the window is one more of the same kind, exchangeable with those
remembered, then P(p <= e) <= e for every e, whatever the scores are. No distribution is assumed.

A p-value is never below one in the number of windows, so few of them would call nothing strange. Where a
domain is learned and has few, a window that is stranger than all of them is put into their standard
deviations: whatever their distribution is, if it has one peak, no more than 4 / (9 (1 + b^2)) of it lies more
than b above its mean (Vysochanskij and Petunin 1983, Justification of the 3-sigma rule).

That is an average over which windows happened to be remembered. For the ones at hand the rate may lie
higher; `risk` says how likely that is (Vovk 2012, Conditional validity of inductive conformal predictors,
arXiv:1209.2673).

Nothing is kept but scores: no text.
"""

# B windows, S scores, N windows that are ranked among

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cambia.errors import DataError
from cambia.models.routing.strangeness import LEAST_ROWS, widened


@dataclass(frozen=True, eq=False)
class Calibration:
    """How strange a domain's own windows are to it."""

    center: Tensor
    """(S,) float64: the mean of each score."""
    spread: Tensor
    """(S,) float64: its standard deviation."""
    ranked: Tensor
    """(N,) float64, ascending: combined scores that new ones are ranked among."""

    @classmethod
    def of(cls, strangeness: Tensor) -> Calibration:
        """From the scores (2 N, S) of windows that nothing had been fitted to, in the order of the text.

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
        """(B,) -> (B,): the share of own windows, the new one among them, that are at least as strange."""
        below = torch.searchsorted(self.ranked, combined.contiguous())
        count = len(self.ranked)
        return (1 + count - below).double() / (count + 1)

    def tail(self, combined: Tensor) -> Tensor:
        """(B,) -> (B,): at most that share lies as far above the own windows, if they have one peak; 1 where
        they are too few to have a spread."""
        count = len(self.ranked)
        if count < LEAST_ROWS:
            return torch.ones_like(combined)
        above = (combined - self.ranked.mean()) / (self.ranked.std().clamp_min(1e-9) * widened(count))
        return torch.where(above > 2, 4 / (9 * (1 + above**2)), 1.0)

    def risk(self, level: float, allowed: float) -> float:
        """How likely it was to meet windows by which more than `allowed` of the domain's fall to `level`.

        The share that does is Beta distributed over draws of the N windows, whatever the scores are:
        P(share > allowed) = P(Binomial(N, allowed) < rank of the level).
        """
        count = len(self.ranked)
        rank = math.floor(level * (count + 1) + 1e-9)
        return sum(math.comb(count, i) * allowed**i * (1 - allowed) ** (count - i) for i in range(rank))


class Ordinary:
    """The scores of a domain's own windows, remembered while it learns.

    A text that is read on is judged best by how strange its earlier stretches were when they came: windows
    that are held out between others which were learned from know too much of their neighbors. So windows are
    remembered with the scores that they had before anything was fitted to them (Dawid 1984, Present position
    and potential developments: the prequential approach), those of the later half of what the domain has
    taken in, since it was a beginner before.

    Args:
        num_scores: S.
        most: windows remembered; where more come, every other one is let go.
    """

    def __init__(self, num_scores: int, most: int):
        self.most = most
        self._scores = torch.empty(0, num_scores, dtype=torch.float64)
        self._ages = torch.empty(0, dtype=torch.int64)
        self._seen, self._stride, self._beginning = 0, 1, 0
        self.is_complete = False
        """Whether the domain has learned what it will learn."""
        self.calibration = Calibration.of(self._scores)

    def remember(self, strangeness: Tensor) -> None:
        """Scores (B, S) of windows that came together, in the order of the text."""
        if not len(strangeness):
            return
        kept = (torch.arange(self._seen, self._seen + len(strangeness)) % self._stride) == 0
        ages = torch.full((int(kept.sum()),), self._seen)  # how much the domain had taken in before
        self._scores = torch.cat([self._scores, _checked(strangeness)[kept]])
        self._ages = torch.cat([self._ages, ages])
        self._beginning = self._seen // 2
        self._seen += len(strangeness)
        while len(self._scores) > self.most:
            self._scores, self._ages, self._stride = self._scores[::2], self._ages[::2], 2 * self._stride
        self._calibrate()

    def p_values(self, combined: Tensor) -> Tensor:
        """(B,) -> (B,), as those of the calibration; where a domain is learned and has few windows, by their
        tail for one that is stranger than all of them."""
        found = self.calibration.p_values(combined)
        return found.minimum(self.calibration.tail(combined)) if self._has_few else found

    @property
    def _has_few(self) -> bool:
        return self.is_complete and len(self.calibration.ranked) < _ENOUGH

    def _calibrate(self) -> None:
        self.calibration = Calibration.of(self._scores[self._ages >= self._beginning])

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "scores": self._scores,
            "ages": self._ages,
            "counts": [self._seen, self._stride, self._beginning],
            "is_complete": self.is_complete,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self._scores, self._ages = state["scores"], state["ages"]
        self._seen, self._stride, self._beginning = state["counts"]
        self.is_complete = state["is_complete"]
        self._calibrate()


_ENOUGH = 99
"""Windows that are ranked among, with which a p-value reaches 0.01."""


def _checked(strangeness: Tensor) -> Tensor:
    if not bool(strangeness.isfinite().all()):
        raise DataError(
            "a window's novelty score is not a number: a window without two tokens has no likelihood, and "
            "features of one that overflowed have no distance; leave such windows out"
        )
    return strangeness.to("cpu", torch.float64)
