"""What a router has decided."""

# B rows

from __future__ import annotations

from dataclasses import dataclass

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
