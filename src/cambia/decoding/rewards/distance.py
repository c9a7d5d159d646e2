"""How far two sets of texts are apart in what they are made of, measured without bias from however few.

Texts are histograms over kinds: runs of bytes, clusters of features. With P the mean of N texts' histograms
and Q that of the texts compared with,

    D = sum over kinds g of (P_g - Q_g)^2 / (m_g + rare)

where m is what is usual, so that rare kinds count as frequent ones do: near P = Q a divergence of entropies
is this, up to a factor. Of few texts P_g^2 is too large, by the variance of a text over N, and the more so
the more varied the texts are: a divergence that is estimated so prefers dull text. Here P_g^2 is
taken from pairs of different texts, which is exact on average for any N > 1 (the U-statistic of the squared
maximum mean discrepancy, Gretton et al. 2012, A Kernel Two-Sample Test, Journal of Machine Learning Research
13).
"""

# N texts, M texts compared with, G different kinds of each text together, K kinds of all texts

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cambia.decoding.rewards.calibration import Measure, Ruler

Texts = TypeVar("Texts", bound=Sized)
_Texts = TypeVar("_Texts", contravariant=True)


class Distance(Protocol[_Texts]):
    """How far texts are from others."""

    def of(self, texts: _Texts, /) -> Measure:
        """Of some, as a function of how much each of them counts: (N,) -> ()."""
        ...


@dataclass(frozen=True, eq=False)
class Histograms:
    """How each text is distributed over kinds; a long text counts no more than a short one."""

    num_texts: int
    """N."""
    kinds: np.ndarray
    """(G,): which kind, by any number that names it."""
    texts: Tensor
    """(G,) int64: in which text."""
    shares: Tensor
    """(G,) float64: of the text; they add up to 1 in each."""

    def __len__(self) -> int:
        return self.num_texts

    @classmethod
    def of_labels(cls, labels: Tensor) -> Histograms:
        """Of texts that are of one kind each, (N,) int64."""
        number = len(labels)
        return cls(number, labels.numpy(), torch.arange(number), torch.ones(number, dtype=torch.float64))

    @cached_property
    def known(self) -> tuple[np.ndarray, Tensor]:
        """The different kinds, (K,) ascending, and which of them each entry is, (G,)."""
        kinds, places = np.unique(self.kinds, return_inverse=True)
        return kinds, torch.from_numpy(places)

    def mean(self, weights: Tensor) -> Tensor:
        """(N,) weights of the texts, which add up to 1 -> (K,): the share of each kind."""
        kinds, places = self.known
        return weights.new_zeros(len(kinds)).index_add(0, places, self.shares * weights[self.texts])

    def by_text(self, values: Tensor) -> Tensor:
        """(G,) values of the entries -> (N,): their sum in each text."""
        return values.new_zeros(self.num_texts).index_add(0, self.texts, values)


class HistogramDistance:
    """The squared distance D, above, from some texts.

    Args:
        compared: M texts.
        usual: others that say, together with them, how frequent a kind is.
        rare: the share of a kind below which rarer ones count no more.
    """

    def __init__(self, compared: Histograms, usual: Histograms, *, rare: float):
        self._rare = rare
        self._kinds = np.union1d(compared.kinds, usual.kinds)
        self._theirs, others = (self._spread(each) for each in (compared, usual))
        frequent = (self._theirs + others) / 2
        self._scale = 1 / (frequent + rare)
        self._size = _pairs(compared, self._scale_of(compared))(_equal(len(compared))).item()

    def of(self, histograms: Histograms) -> Measure:
        """Of other texts. One alone has no pairs: its square is left out, and its value says little."""
        scale, theirs = self._scale_of(histograms), self._at(histograms, self._theirs, 0.0)
        _, places = histograms.known
        both = histograms.by_text(histograms.shares * (scale * theirs)[places])
        pairs = _pairs(histograms, scale)

        def distance(weights: Tensor) -> Tensor:
            weights = weights / weights.sum()
            return pairs(weights) - 2 * (weights * both).sum() + self._size

        return distance

    def _spread(self, histograms: Histograms) -> Tensor:
        """The share of each kind that is known here."""
        kinds, _ = histograms.known
        found = torch.zeros(len(self._kinds), dtype=torch.float64)
        found[torch.from_numpy(np.searchsorted(self._kinds, kinds))] = histograms.mean(
            _equal(len(histograms))
        )
        return found

    def _scale_of(self, histograms: Histograms) -> Tensor:
        return self._at(histograms, self._scale, 1 / self._rare)

    def _at(self, histograms: Histograms, values: Tensor, otherwise: float) -> Tensor:
        """(K,): a value of each of the texts' kinds."""
        kinds, _ = histograms.known
        there = np.minimum(np.searchsorted(self._kinds, kinds), len(self._kinds) - 1)
        same = torch.from_numpy(self._kinds[there] == kinds)
        return torch.where(same, values[torch.from_numpy(there)], otherwise)


class LineDistance:
    """The energy distance of numbers: twice the integral of the squared difference of their cumulative
    distributions, as mean distances of pairs say it (Szekely and Rizzo 2013, Energy statistics: a class of
    statistics based on distances, Journal of Statistical Planning and Inference 143); without bias, as above.

    Args:
        compared: (M,).
    """

    def __init__(self, compared: Tensor):
        self._compared = compared
        self._spread = _apart(compared)(_equal(len(compared)))

    def of(self, numbers: Tensor) -> Measure:
        """Of others, (N,)."""
        far, pairs = (numbers[:, None] - self._compared).abs().mean(1), _apart(numbers)

        def distance(weights: Tensor) -> Tensor:
            weights = weights / weights.sum()
            return 2 * (weights * far).sum() - pairs(weights) - self._spread

        return distance


def _equal(number: int) -> Tensor:
    return torch.full((number,), 1 / number, dtype=torch.float64)


def _pairs(histograms: Histograms, scale: Tensor) -> Measure:
    """The mean over pairs of different texts of the sum over kinds of scale times both shares.

    Args:
        scale: (K,).
    """
    _, places = histograms.known
    own = histograms.by_text(histograms.shares.square() * scale[places])

    def mean(weights: Tensor) -> Tensor:
        both = (scale * histograms.mean(weights).square()).sum() - (weights.square() * own).sum()
        return _mean_of_pairs(both, weights)

    return mean


def _apart(numbers: Tensor) -> Measure:
    """The mean distance of pairs of different numbers."""
    far = (numbers[:, None] - numbers).abs()
    return lambda weights: _mean_of_pairs(weights @ far @ weights, weights)


def _mean_of_pairs(total: Tensor, weights: Tensor) -> Tensor:
    """Of what pairs of different texts add up to; 0 of one text alone, which has none."""
    pairs = 1 - weights.square().sum()
    return total / pairs if pairs > 1e-9 else 0 * total


STEEP = -4.0
"""Of likeness: far below plain texts."""


class Likeness(Generic[Texts]):
    """How like people's texts: 1 as other texts of theirs are, 0 as plain ones are. Below `STEEP` it falls
    only by the logarithm, since the distance of what nobody writes has hardly a bound.

    Args:
        distance: from people's texts.
        human: other texts of theirs.
        plain: what the model writes with temperature 1.
    """

    def __init__(self, distance: Distance[Texts], human: Texts, plain: Texts):
        self._distance = distance
        self.ends = Ruler(distance.of(human), distance.of(plain), len(human)).at(len(human))

    def of(self, texts: Texts) -> Measure:
        """Of some texts."""
        far = self._distance.of(texts)
        return lambda weights: _flattened(self.ends.nearness(far(weights)))


def _flattened(value: Tensor) -> Tensor:
    beyond = (STEEP - value).clamp_min(0)
    return value.clamp_min(STEEP) - beyond.log1p()
