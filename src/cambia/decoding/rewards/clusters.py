"""Features of texts sorted into clusters, as MAUVE does (Pillutla et al. 2021, MAUVE: Measuring the Gap
Between Neural Text and Human Text using Divergence Frontiers, arXiv:2102.01454).

Where we differ: the clusters are made once, of what people wrote and of what the model writes by itself,
since the value of one set of texts must not depend on another, and few texts make bad clusters. Features are
brought to one scale per dimension in place of a projection on main directions. What is unlike anything that
the clusters were made of, as loops are, has a cluster of its own. The histograms are compared by a distance
that few texts do not bias (`rewards.distance`), not by the area under the divergence frontier, which they do.
"""

# N texts, D features, K clusters

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 30


@dataclass(frozen=True, eq=False)
class Clusters:
    """Features sorted by the nearest of some centers."""

    centers: Tensor
    """(K, D) float64."""
    mean: Tensor
    """(D,) of the features that they were made of."""
    spread: Tensor
    """(D,) their standard deviation."""
    reach: float
    """How far the furthest of them lay from its center."""

    def __len__(self) -> int:
        return len(self.centers)

    @classmethod
    def of(cls, features: Tensor, most: int, *, seed: int = 0) -> Clusters:
        """At most so many clusters of features (N, D): k-means (Lloyd 1982, Least squares quantization in
        PCM), begun by k-means++ (Arthur and Vassilvitskii 2007)."""
        features = features.detach().to("cpu", torch.float64)
        mean = features.mean(0)
        spread = features.std(0, correction=0).clamp_min(1e-9)
        points = (features - mean) / spread
        centers = _apart(points, most, torch.Generator().manual_seed(seed))
        nearest = _nearest(points, centers)
        for _ in range(_ROUNDS):
            sums = torch.zeros_like(centers).index_add(0, nearest, points)
            count = nearest.bincount(minlength=len(centers))[:, None]
            centers = torch.where(count > 0, sums / count.clamp_min(1), centers)
            before, nearest = nearest, _nearest(points, centers)
            if torch.equal(before, nearest):
                break
        reach = torch.cdist(points, centers).amin(1).max().item()
        return cls(centers, mean, spread, reach)

    def assign(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,): the nearest cluster of each; K for what lies further from it than anything did."""
        points = (features.detach().to("cpu", torch.float64) - self.mean) / self.spread
        distance, nearest = torch.cdist(points, self.centers).min(1)
        return torch.where(distance <= self.reach * (1 + 1e-6) + 1e-9, nearest, len(self))


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(points, centers).argmin(1)


def _apart(points: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Points far from each other, (K, D): each drawn by its squared distance from those before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < most and bool((distance > 0).any()):
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]
