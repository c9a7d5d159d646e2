"""What a router has decided."""

# B rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routes:
    """Who answers each of some sequences, and how certain that is."""

    names: tuple[str | None, ...]
    """(B,) ids of Parts; None: the model alone."""
    confidence: Tensor
    """(B,) float64, between 0 and 1: the probability of the choice among those that were open to it."""
    entropy: Tensor
    """(B,) float64, nats: how undecided it was; 0 where one Part alone came into question."""
    passes: int = 0
    """Rows that were read by a Part in order to decide, summed over Parts: what routing costs beside the
    base's one reading."""

    @classmethod
    def base(cls, rows: int) -> Routes:
        """The model alone answers all of so many, for certain."""
        sure = torch.ones(rows, dtype=torch.float64)
        return cls((None,) * rows, sure, torch.zeros_like(sure))

    @classmethod
    def joined(cls, parts: Sequence[Routes]) -> Routes:
        """Those of some sequences and of others behind them."""
        return cls(
            tuple(name for part in parts for name in part.names),
            torch.cat([part.confidence for part in parts]),
            torch.cat([part.entropy for part in parts]),
            sum(part.passes for part in parts),
        )


def entropy(shares: Tensor, dim: int = 0) -> Tensor:
    """Of probabilities along a dimension, nats."""
    return -(shares * shares.clamp_min(1e-300).log()).sum(dim)
