"""A normal distribution of features, from sums alone, that stays sound where features are many or alike.

Sums are all that is kept of a text (count, mean, scatter), and those of two texts add up (Chan, Golub and
LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances). The covariance is
shrunk towards a multiple of the identity by as much as its own error asks for: OAS (Chen, Wiesel, Eldar and
Hero 2010, https://arxiv.org/abs/0907.4698). What is measured against a background distribution is the
relative Mahalanobis distance (Ren et al. 2021, https://arxiv.org/abs/2106.09022), here with the volumes.

    >>> gaussian = FeatureGaussian(dimensions=128)
    >>> gaussian.observe(features)
    >>> gaussian.seal()
    >>> gaussian.log_density(features)         # (B,)
"""

# B batch (rows), D features

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cambia.errors import ConfigError


class FeatureGaussian:
    """A normal distribution with a shrunk covariance.

    Args:
        dimensions: D.
    """

    count: int
    """Rows observed."""
    mean: Tensor
    """(D,) float64."""
    scatter: Tensor
    """(D, D) float64: the sum of the outer products of what differs from the mean."""

    def __init__(self, dimensions: int):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        self._factor: Tensor | None = None

    @property
    def is_sealed(self) -> bool:
        return self._factor is not None

    def observe(self, features: Tensor) -> None:
        """Add rows (B, D) to the sums."""
        if self.is_sealed:
            raise ConfigError("these features are sealed: what is observed now belongs to another Part")
        if not len(features):
            return
        features = features.to("cpu", torch.float64)
        mean = features.mean(0)
        apart = features - mean
        moved = mean - self.mean
        total = self.count + len(features)
        self.scatter += apart.T @ apart + torch.outer(moved, moved) * (self.count * len(features) / total)
        self.mean = self.mean + moved * (len(features) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(D, D) float64, shrunk.

        Raises:
            ConfigError: fewer than two rows were observed.
        """
        if self.count < 2:
            raise ConfigError(
                f"a distribution of features needs at least 2 rows of text, and {self.count} came: give "
                "more text, or shorter windows"
            )
        size = len(self.mean)
        sample = self.scatter / self.count
        level = sample.trace() / size
        square, trace_square = sample.square().sum(), sample.trace().square()
        gap = (self.count + 1 - 2 / size) * (square - trace_square / size)
        shrinkage = ((1 - 2 / size) * square + trace_square) / gap if gap > 0 else torch.ones(())
        shrinkage = shrinkage.clamp(0, 1)
        # Features that never moved at all still need a volume.
        floor = torch.finfo(torch.float32).eps * (level + self.mean.square().mean()) + _TINY
        eye = torch.eye(size, dtype=torch.float64)
        return (1 - shrinkage) * sample + (shrinkage * level + floor) * eye

    def seal(self) -> None:
        """Work out the distribution; nothing changes afterwards."""
        if not self.is_sealed:
            self._factor = torch.linalg.cholesky(self.covariance())  # (D, D), lower

    def log_density(self, features: Tensor) -> Tensor:
        """(B, D) -> (B,) float64, nats."""
        factor = self._sealed()
        distance = self._whitened(features).square().sum(1)
        volume = factor.diagonal().log().sum() + len(self.mean) * math.log(2 * math.pi) / 2
        return -distance / 2 - volume

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """(rows, D) float32: features such as this text has, without the text."""
        noise = torch.randn(rows, len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + noise @ self._sealed().T).float()

    def _whitened(self, features: Tensor) -> Tensor:
        """(B, D): what differs from the mean, in units of the distribution."""
        apart = features.to("cpu", torch.float64) - self.mean
        return torch.linalg.solve_triangular(self._sealed(), apart.T, upper=False).T

    def _sealed(self) -> Tensor:
        if self._factor is None:
            raise ConfigError("these features are still being observed: seal() them first")
        return self._factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "sealed": self.is_sealed,
            "count": self.count,
            "mean": self.mean.clone(),
            "scatter": self.scatter.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.scatter = state["count"], state["mean"].clone(), state["scatter"].clone()
        self._factor = None
        if state["sealed"]:
            self.seal()


_TINY = 1e-12
