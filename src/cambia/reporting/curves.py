"""Arithmetic before anything is drawn: smoothing, leaving out what nobody could see, keeping labels apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_MOST_POINTS = 1500


def smoothed(values: np.ndarray) -> np.ndarray:
    """A straight line fitted around each value, over about a twentieth of all, and read off at the value.

    Unlike a trailing average it is not late where the loss falls steeply, nor ragged at the ends. Spikes
    of one or two values are taken out first.
    """
    size = len(values)
    if size > 2:
        padded = np.pad(values, 2, mode="edge")
        values = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    place = np.arange(size)
    radius = max(2, size // 40)
    low, high = np.maximum(0, place - radius), np.minimum(size, place + radius + 1)

    def mean(of: np.ndarray) -> np.ndarray:
        sums = np.append(0.0, np.cumsum(of))
        return (sums[high] - sums[low]) / (high - low)

    x = place - size / 2
    spread = mean(x * x) - mean(x) ** 2
    shared = mean(x * values) - mean(x) * mean(values)
    slope = np.divide(shared, spread, out=np.zeros(size), where=spread > 0)
    return mean(values) + slope * (x - mean(x))


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MOST_POINTS`: of each bucket its lowest and its highest, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    buckets = np.array_split(np.arange(len(x)), _MOST_POINTS // 2)
    keep = np.unique([pick for b in buckets for pick in (b[np.argmin(y[b])], b[np.argmax(y[b])])])
    return x[keep], y[keep]


def corners(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only the points of a step line where it changes, and its ends."""
    keep = np.append(True, y[1:] != y[:-1])
    keep[-1] = True
    return x[keep], y[keep]


@dataclass(frozen=True)
class Window:
    """From where to where values are drawn."""

    low: float
    high: float

    def beyond(self, found: np.ndarray) -> np.ndarray:
        return (found < self.low) | (found > self.high)

    def clipped(self, found: np.ndarray) -> np.ndarray:
        return np.clip(found, self.low, self.high)


def window_of(found: np.ndarray) -> Window:
    """What to show of some values: all, unless a few values are so far off that nothing else would show."""
    low, quarter, three, high = np.quantile(found, [0, 0.25, 0.75, 1])
    reach = 4 * (three - quarter)
    if reach > 0 and len(found) >= 6:
        inside = found[(found >= quarter - reach) & (found <= three + reach)]
        low, high = inside.min(), inside.max()
    # Never so narrow that rounding looks like a difference.
    margin = max(0.06 * (high - low), 1e-6 * abs(high), 1e-12)
    return Window(float(low - margin), float(high + margin))


def apart(places: ArrayLike, gap: float) -> np.ndarray:
    """Places on a line moved as little as can be (least squares) so that each two are at least a gap apart.

    Their order stays. By pooling neighbors that would overlap: Ayer et al. 1955, "An Empirical Distribution
    Function for Sampling with Incomplete Information".

    Args:
        places: (n,)
    """
    given = np.asarray(places, dtype=np.float64)
    order, steps = np.argsort(given, kind="stable"), gap * np.arange(len(given))
    pools: list[list[float]] = []
    for place in (given[order] - steps).tolist():
        pools.append([place])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    moved = np.empty_like(given)
    moved[order] = steps + [float(np.mean(pool)) for pool in pools for _ in pool]
    return moved
