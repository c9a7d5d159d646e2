"""Runs of n tokens, or bytes: which there are in texts, and how often."""

# N texts, T tokens of the longest of them, G different n-grams of each text together, K of all texts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cambia.decoding.rewards.distance import Histograms
from cambia.models.routing.token_grams import GramKeys

_NOTHING = np.uint64(0)
"""Stands in a text that is too short for any n-gram."""


def padded(rows: Sequence[Sequence[int] | bytes]) -> tuple[Tensor, Tensor]:
    """Tokens or bytes filled up on the right, (N, T), T at least 1, and how many there are in each row,
    (N,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), max(1, int(lengths.max())), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
    return ids, lengths


@dataclass(frozen=True, eq=False)
class Grams:
    """The n-grams of some texts, of one n."""

    num_texts: int
    """N."""
    texts: np.ndarray
    """(G,) int64: which text."""
    keys: np.ndarray
    """(G,) uint64: which n-gram, hashed."""
    counts: np.ndarray
    """(G,) int64: how often it comes in the text."""

    @classmethod
    def up_to(cls, rows: Sequence[Sequence[int] | bytes], order: int) -> list[Grams]:
        """Of texts as tokens or bytes, for n = 1..order."""
        ids, lengths = padded(rows)
        found = GramKeys.of(ids, lengths, order=order)
        return [cls._of(keys, inside) for keys, inside in zip(found.keys, found.inside, strict=True)]

    @classmethod
    def _of(cls, keys: np.ndarray, inside: np.ndarray) -> Grams:
        """From the key of the n-gram that ends at each token, (N, T), and where there is one."""
        texts = np.nonzero(inside)[0]
        keys = keys[inside]
        order = np.lexsort((keys, texts))
        texts, keys = texts[order], keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = (texts[1:] != texts[:-1]) | (keys[1:] != keys[:-1])
        counts = np.diff(np.append(np.nonzero(first)[0], len(keys)))
        return cls(len(inside), texts[first], keys[first], counts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int64: how many n-grams each text has."""
        return np.bincount(self.texts, self.counts, minlength=self.num_texts).astype(np.int64)

    @cached_property
    def repeated(self) -> Tensor:
        """(N,) float64: the share of each text's n-grams that came in it before (seq-rep-n of Welleck et al.
        2019, Neural Text Generation with Unlikelihood Training, arXiv:1908.04319); 0 where it has none."""
        different = np.bincount(self.texts, minlength=self.num_texts)
        return torch.from_numpy(1 - np.where(self.lengths, different / np.maximum(self.lengths, 1), 1.0))

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The different n-grams of all texts, (K,) ascending, and which of them each entry is, (G,)."""
        return np.unique(self.keys, return_inverse=True)

    def histograms(self) -> Histograms:
        """How they are distributed in each text; a text too short for any has one of its own, which is what
        people hardly ever write."""
        (none,) = np.nonzero(self.lengths == 0)
        return Histograms(
            self.num_texts,
            np.concatenate([self.keys, np.full(len(none), _NOTHING)]),
            torch.from_numpy(np.concatenate([self.texts, none])),
            torch.from_numpy(np.concatenate([self.counts / self.lengths[self.texts], np.ones(len(none))])),
        )
