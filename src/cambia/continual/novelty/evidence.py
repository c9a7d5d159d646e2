"""When the evidence that something new has come is enough to act on.

What is watched are the shares of windows that are strange to every known domain. Ordinary text has some: a
table, a name, a quotation. So the null hypothesis is not "nothing has changed", which a running text violates
on every page, but "nothing relevant has": of each group of windows that follow each other, whatever came
before, on average no more than `allowed` are as strange as a `level` says. A fair bet against it,

    e = 1 + stake (share / allowed - 1),    E[e | past] <= 1 under the null,

multiplies one's wealth (Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by
betting, arXiv:2010.09686), and great wealth is evidence. Windows of one group may hang together in any way,
and groups need not be independent: only the mean given the past counts.

A change may come at any time, so a bet begins at every group, in one of two ways:

* `martingale`: with the t-th part of the stake, 1 / (t (t + 1)). The wealth never reaches 1 / delta, in an
  endless stream, but with probability delta (Ville 1939; conformal test martingales: Vovk 2021,
  arXiv:2102.10439).
* `cusum`: with 1, but one bet at a time: max(wealth, 1) e. It reaches A no sooner than after A groups on
  average (Page 1954; as e-detectors: Shin, Ramdas and Rinaldo 2022, arXiv:2203.03532).

Bets are made at several levels side by side, since a far domain is seen by few windows that are very strange
and a near one by many that are somewhat strange; the mean of their wealths is a fair wealth too.
"""

# L levels

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["martingale", "cusum"]


def log_bets(shares: Tensor, allowed: Sequence[float], stake: float) -> Tensor:
    """(..., L) shares of a group that fall to each level -> (..., L) logarithms of e."""
    limits = torch.tensor(allowed, dtype=torch.float64)
    return torch.log1p(stake * (shares / limits - 1))


def advance(rule: Rule, log_wealth: Tensor, log_bet: Tensor, group: int) -> Tensor:
    """The logarithms of wealth (..., L) after one more group, the `group`-th, counted from 1."""
    if rule == "cusum":
        return log_wealth.clamp_min(0) + log_bet
    part = torch.tensor(-math.log(group) - math.log(group + 1), dtype=torch.float64)
    return torch.logaddexp(log_wealth, part) + log_bet


def log_evidence(log_wealth: Tensor) -> Tensor:
    """(..., L) -> (...): the logarithm of the mean wealth."""
    return log_wealth.logsumexp(-1) - math.log(log_wealth.shape[-1])
