"""A Gaussian process of what places in a cube are worth, from few noisy values."""

# C candidates, S parameters that are searched, P places

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np


def spread(count: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Points all over the unit cube, (count, size): each of `count` parts of each axis has one (McKay and
    others 1979, A Comparison of Three Methods for Selecting Values of Input Variables in
    the Analysis of Output from a Computer Code)."""
    parts = np.stack([generator.permutation(count) for _ in range(size)], 1)
    return (parts + generator.random((count, size))) / count


def by_round(values: np.ndarray, rounds: np.ndarray, share: float) -> np.ndarray:
    """(C,) values and their rounds -> (C,): below which a share of the values of its round lies."""
    _, places = np.unique(rounds, return_inverse=True)
    return np.array([np.quantile(values[places == place], share) for place in range(places.max() + 1)])[
        places
    ]


@dataclass(frozen=True, eq=False)
class Process:
    """What is worth how much, by noisy values: one candidate's is mostly noise, that of all of them is not.

    A Gaussian process (Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, chapters 2 and
    5; Matern 5/2), with a level of each round, which has prompts of its own, harder or easier ones. Length,
    noise and levels are those that make the values likeliest. The worst third of each round counts as equally
    bad, since a reward may fall without bound.
    """

    points: np.ndarray
    """(C, S) in the unit cube."""
    values: np.ndarray
    """(C,), their mean is 0 and their variance 1."""
    length: float
    scale: float
    """The variance of the worth itself; of the level that all have, the same again."""
    covariance: np.ndarray
    """(C, C) of the values, by `scale`."""

    @classmethod
    def of(cls, points: np.ndarray, values: np.ndarray, rounds: np.ndarray | None = None) -> Process:
        """Fitted to the latest values.

        Args:
            points: (C, S).
            values: (C,).
            rounds: (C,) int; None: all are of one.
        """
        points, values = points[-_MOST:], values[-_MOST:]
        rounds = np.zeros(len(points)) if rounds is None else rounds[-_MOST:]
        values = np.maximum(values, by_round(values, rounds, 1 / 3))
        values = (values - values.mean()) / max(values.std(), 1e-12)
        same = (rounds[:, None] == rounds).astype(float)
        levels = _LEVELS if len(np.unique(rounds)) > 1 else (0.0,)
        likeliest, found = -np.inf, None
        for length in _LENGTHS:
            alike = _alike(points, points, length)
            for noise, level in product(_NOISES, levels):
                covariance = alike + noise * np.eye(len(points)) + level * same
                root = np.linalg.cholesky(covariance)
                scale = np.square(np.linalg.solve(root, values)).mean() + 1e-12
                likely = -0.5 * len(points) * np.log(scale) - np.log(np.diag(root)).sum()
                if found is None or likely > likeliest:
                    likeliest, found = likely, cls(points, values, length, float(scale), covariance)
        assert found is not None
        return found

    def _at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean (P,), and what is needed for the covariance: (P, C), and (C, P) solved for."""
        near = _alike(places, self.points, self.length)
        return (
            near @ np.linalg.solve(self.covariance, self.values),
            near,
            np.linalg.solve(self.covariance, near.T),
        )

    def draw(self, places: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """Functions that may be it, at some places: (P, S) -> (P, count)."""
        mean, near, solved = self._at(places)
        covariance = self.scale * (_alike(places, places, self.length) - near @ solved)
        root = np.linalg.cholesky(covariance + 1e-5 * self.scale * np.eye(len(places)))
        return mean[:, None] + root @ generator.normal(size=(len(places), count))

    def surest(self, than: int | None = None) -> int:
        """The point that is most surely good: where the mean less one standard deviation is largest.

        Points only: between them it may be larger, but that is not sure, since towards the edges they lie far
        from each other.

        Args:
            than: the number of a point; most surely better than that one is meant, and it is this point
                itself where none is.
        """
        mean, near, solved = self._at(self.points)
        covariance = self.scale * (_alike(self.points, self.points, self.length) - near @ solved)
        variance = covariance.diagonal()
        if than is not None:
            mean = mean - mean[than]
            variance = variance + variance[than] - 2 * covariance[than]
        return int(np.argmax(mean - np.sqrt(variance.clip(0))))


_LENGTHS = (0.15, 0.25, 0.4, 0.65, 1.0, 1.6)
"""In the unit cube."""
_NOISES, _LEVELS = (0.001, 0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 0.1, 0.5, 5.0, 50.0)
"""Variances as shares of that of the worth."""
_MOST = 400
"""Candidates that are looked at, the latest ones."""


def _alike(x: np.ndarray, y: np.ndarray, length: float) -> np.ndarray:
    """(X, S), (Y, S) -> (X, Y): the covariance of the worth of two places, 1 to 2."""
    away = np.sqrt(5 * np.square((x[:, None] - y) / length).sum(-1))
    return 1 + (1 + away + away**2 / 3) * np.exp(-away)
