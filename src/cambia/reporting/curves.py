"""Arithmetic on curves before they are drawn: smoothing, and leaving out points that nobody could see."""

from __future__ import annotations

import numpy as np

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
