"""How likely a text is by the short runs of tokens in it: counts, hashed, within a limit of memory.

A language model that costs next to nothing, needs no training and tells far domains apart within a few
bytes (a classic: Cavnar and Trenkle 1994, N-gram-based text categorization). Longer n-grams are mixed with
shorter ones as Witten and Bell (1991, method C) do it: where h was followed by u different tokens,

    p(w | h) = c(h w) / (c(h) + u(h)) + g(h) p(w | h without its first token)

with the g(h) that makes the sum over all tokens 1. Below single tokens lies the uniform distribution.
(Absolute discounting by 0.5 to 0.9 and fixed pseudo-counts told domains apart no better, and are one more
number to choose.)

    >>> grams = TokenGrams(vocab_size=264)
    >>> grams.observe(input_ids)
    >>> grams.seal()
    >>> grams.token_losses(GramKeys.of(input_ids, order=grams.order))     # (B, T), nats

Of a text it keeps hashes of n-grams and how often they came, or, once sealed, two tables of numbers.
"""

# B batch (rows), T time, N longest n-gram, G n-grams kept, H contexts (what n-grams begin with) kept

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cambia.errors import ConfigError

_ROOT = np.uint64(0x9E3779B97F4A7C15)
"""The key of the empty context."""
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_UNCUT = 1 << 20
"""n-grams that come before the rarest may be left out: a limit of memory while a text is read."""


@dataclass(frozen=True, eq=False)
class GramKeys:
    """The hashes of all n-grams of some rows: made once, and looked up in the counts of every Part."""

    keys: np.ndarray
    """(N, B, T) uint64: of the n-gram that ends at a token, n = 1..N."""
    contexts: np.ndarray
    """(N, B, T) uint64: of that n-gram without its last token."""
    inside: np.ndarray
    """(N, B, T) bool: whether the n-gram lies in the row, which begins at its first token."""

    @classmethod
    def of(cls, input_ids: Tensor, lengths: Tensor | None = None, *, order: int) -> GramKeys:
        """Of rows (B, T) of which the first `lengths` tokens (B,) count, or all."""
        ids = input_ids.cpu().numpy().astype(np.uint64)
        rows, width = ids.shape
        ends = np.full(rows, width) if lengths is None else lengths.cpu().numpy()
        place = np.arange(width)
        keys = np.empty((order, rows, width), dtype=np.uint64)
        contexts = np.empty_like(keys)
        for n in range(order):
            contexts[n] = _ROOT
            if n:
                contexts[n, :, 1:] = keys[n - 1, :, :-1]
            keys[n] = _hashed(contexts[n], ids)
        inside = (place >= np.arange(order)[:, None, None]) & (place < ends[:, None])
        return cls(keys, contexts, inside)


def _hashed(context: np.ndarray, token: np.ndarray) -> np.ndarray:
    """A context and the token behind it as one number (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (context ^ (token + np.uint64(1))) * _ROOT
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * factor
    return x ^ (x >> np.uint64(31))


class TokenGrams:
    """Counts of the runs of up to N tokens of one text, and the likelihood that follows from them.

    Args:
        vocab_size: how many tokens there are.
        order: N, tokens of the longest run.
        max_grams: how many runs are kept when it is sealed, the most frequent ones. Four times as many are
            held before; where even that is too few, the rarest go early (Manku and Motwani 2002).
    """

    def __init__(self, vocab_size: int, *, order: int = 5, max_grams: int = 1 << 16):
        if order < 1 or max_grams < 1:
            raise ConfigError(
                f"n-grams of order {order}, at most {max_grams} of them: expected at least 1 of each"
            )
        self.vocab_size, self.order, self.max_grams = vocab_size, order, max_grams
        self._counts = _Counts.none()
        self._waiting: list[_Counts] = []
        self._uncut = 0  # n-grams that came since the rarest were left out
        self._tables: _Tables | None = None

    @property
    def is_sealed(self) -> bool:
        return self._tables is not None

    @property
    def num_bytes(self) -> int:
        """Of the tables, once sealed."""
        return 0 if self._tables is None else sum(table.nbytes for table in vars(self._tables).values())

    def observe(self, input_ids: Tensor, lengths: Tensor | None = None) -> None:
        """Count the n-grams of rows (B, T), each a text of its own: of the first `lengths` tokens, or all."""
        if self.is_sealed:
            raise ConfigError("these n-grams are sealed: what is observed now belongs to another Part")
        self._waiting.append(_Counts.of(GramKeys.of(input_ids, lengths, order=self.order)))
        self._uncut += len(self._waiting[-1])
        if self._uncut >= _UNCUT:
            self._counts = self._counted().most_frequent(4 * self.max_grams)
            self._waiting, self._uncut = [], 0

    def _counted(self) -> _Counts:
        return _Counts.together([self._counts, *self._waiting])

    def seal(self) -> None:
        """Work out the likelihood; nothing changes afterwards."""
        if not self.is_sealed:
            if not len(self._counted()):
                raise ConfigError("no n-gram was counted: observe() some text before seal()")
            self._tables = _Tables.of(self._counted().most_frequent(self.max_grams))
            self._counts, self._waiting = _Counts.none(), []

    def token_losses(self, found: GramKeys) -> np.ndarray:
        """(B, T) float64, nats: each token's, given those before it in its row; 0 behind a row's end.

        Args:
            found: of the rows, of this order at least.
        """
        if self._tables is None:
            raise ConfigError("these n-grams are still being counted: seal() them first")
        probability = np.full(found.keys.shape[1:], 1 / self.vocab_size)
        for n in range(self.order):
            longer = self._tables.longer(found.keys[n], found.contexts[n], probability)
            probability = np.where(found.inside[n], longer, probability)
        return np.where(found.inside[0], -np.log(probability), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """All that it knows: counts while they are taken, afterwards the tables."""
        held = self._tables if self._tables is not None else self._counted()
        arrays = {name: torch.from_numpy(array.copy()) for name, array in vars(held).items()}
        return {"sealed": self.is_sealed, "uncut": self._uncut, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items() if isinstance(value, Tensor)}
        self._waiting, self._uncut = [], state["uncut"]
        self._counts = _Counts.none() if state["sealed"] else _Counts(**arrays)
        self._tables = _Tables(**arrays) if state["sealed"] else None


@dataclass(frozen=True, eq=False)
class _Counts:
    """How often n-grams came: ascending by key. Keys lie as signed numbers, since files know no others."""

    keys: np.ndarray
    """(G,) int64."""
    contexts: np.ndarray
    """(G,) int64: of the n-gram without its last token."""
    orders: np.ndarray
    """(G,) int8: n - 1."""
    counts: np.ndarray
    """(G,) int64."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def none(cls) -> _Counts:
        return cls(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.int8, np.int64)))

    @classmethod
    def of(cls, found: GramKeys) -> _Counts:
        """Each n-gram once for every time that it comes."""
        inside = found.inside
        orders = np.broadcast_to(np.arange(len(inside), dtype=np.int8)[:, None, None], inside.shape)
        ones = np.ones(int(inside.sum()), dtype=np.int64)
        keys, contexts = found.keys[inside].view(np.int64), found.contexts[inside].view(np.int64)
        return cls(keys, contexts, orders[inside], ones)

    @classmethod
    def together(cls, parts: Sequence[_Counts]) -> _Counts:
        """Each n-gram once."""
        keys, contexts, orders, counts = (
            np.concatenate(arrays) for arrays in zip(*map(_fields, parts), strict=True)
        )
        keys, first, place = np.unique(keys, return_index=True, return_inverse=True)
        summed = np.zeros(len(keys), dtype=np.int64)
        np.add.at(summed, place, counts)
        return cls(keys, contexts[first], orders[first], summed)

    def most_frequent(self, most: int) -> _Counts:
        """At most so many n-grams: of equal counts the shorter ones, and then by key.

        An n-gram comes no less often than a longer one that begins with it: what is kept has its contexts.
        """
        if len(self) <= most:
            return self
        kept = np.sort(np.lexsort((self.keys, self.orders, -self.counts))[:most])
        return _Counts(*(array[kept] for array in _fields(self)))


@dataclass(frozen=True, eq=False)
class _Tables:
    """What a likelihood is worked out from. Of the 64 bits of a key 32 are kept: of 2^16 n-grams that are
    not there, one is taken for one that is."""

    keys: np.ndarray
    """(G,) int32, ascending."""
    shares: np.ndarray
    """(G,) float32: c(h w) / (c(h) + u(h))."""
    contexts: np.ndarray
    """(H,) int32, ascending."""
    left: np.ndarray
    """(H,) float32: g(h), what a context leaves to the shorter one."""

    @classmethod
    def of(cls, found: _Counts) -> _Tables:
        contexts, place = np.unique(found.contexts, return_inverse=True)
        kept = np.bincount(place, weights=found.counts, minlength=len(contexts))
        # A context came as often as the n-gram that it is, or at a row's end once more. Where some of what
        # followed it was too rare to be kept, the sum of the rest is smaller, and the shorter context gets
        # the difference.
        total = np.maximum(kept, _looked_up(found.keys, found.counts, contexts, 0)) + np.bincount(place)
        shares = found.counts / total[place]
        left = 1 - np.bincount(place, weights=shares, minlength=len(contexts))
        return cls(*_table(found.keys, shares), *_table(contexts, left))

    def longer(self, keys: np.ndarray, contexts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """The likelihood by n-grams, from that by n-grams shorter by one."""
        share = _looked_up(self.keys, self.shares, _short(keys), 0)
        return share + _looked_up(self.contexts, self.left, _short(contexts), 1) * shorter


def _fields(counts: _Counts) -> tuple[np.ndarray, ...]:
    return counts.keys, counts.contexts, counts.orders, counts.counts


def _short(keys: np.ndarray) -> np.ndarray:
    """The upper half of 64-bit keys."""
    return (keys.view(np.int64) >> 32).astype(np.int32)


def _table(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Short keys, ascending, and their values; of two n-grams with one short key the first stays."""
    short, first = np.unique(_short(keys), return_index=True)
    return short, values[first].astype(np.float32)


def _looked_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray, missing: float) -> np.ndarray:
    """The values of keys, float64; `missing` for those that are not there."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], missing).astype(np.float64)
