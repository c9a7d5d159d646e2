"""MAUVE: how far two sets of texts are apart in what a model makes of them.

Features of texts are sorted into clusters, and the two histograms are compared by the area under their
divergence frontier (Pillutla et al. 2021, MAUVE: Measuring the Gap Between Neural Text and Human Text using
Divergence Frontiers, arXiv:2102.01454): R = l P + (1 - l) Q for l from 0 to 1 gives points exp(-c KL(Q, R)),
exp(-c KL(P, R)), whose area is 1 where P = Q and near 0 where they share nothing. It sees both errors, text
that people would not write and what people write that is missing.

Where we differ: the clusters are made once, of what people wrote and of what the model writes by itself,
since the value of one set of texts must not depend on another, and few texts make bad clusters. Histograms
are smoothed by half a text per cluster (Krichevsky and Trofimov; found best by Pillutla et al. 2022, MAUVE
Scores for Generative Models: Theory and Practice, arXiv:2212.14578). Features are brought to one scale per
dimension in place of a projection on main directions. What is unlike anything that the clusters were made of,
as loops are, has a cluster of its own.
"""

# N texts, D features, K clusters

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEEPNESS = 5.0
"""c of the paper."""
_MIXTURES = 25
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


def smoothed(shares: Tensor, number: int) -> Tensor:
    """The shares (K,) of clusters among so many texts, with half a text more in each."""
    return (number * shares + 0.5) / (number + len(shares) / 2)


def frontier_area(p: Tensor, q: Tensor) -> Tensor:
    """The area under the divergence frontier of two distributions without zeros, (K,) each: 0 to 1."""
    part = torch.linspace(0, 1, _MIXTURES + 2, dtype=p.dtype)[1:-1, None]
    middle = part * p + (1 - part) * q  # (mixtures, K)
    right = torch.exp(-STEEPNESS * (q * (q / middle).log()).sum(1))
    up = torch.exp(-STEEPNESS * (p * (p / middle).log()).sum(1))
    # From (1, 0), R = Q without any P, to (0, 1).
    right = torch.cat([right.new_ones(1), right, right.new_zeros(1)])
    up = torch.cat([up.new_zeros(1), up, up.new_ones(1)])
    return ((right[:-1] - right[1:]) * (up[:-1] + up[1:]) / 2).sum()
