"""A replay buffer: a fair sample of every row seen so far, within a limit of rows or of bytes.

Every offered row draws a random key, and the rows with the smallest keys stay: bottom-k sampling (Cohen and
Kaplan 2007, Summarizing data using bottom-k sketches), the reservoir of Vitter 1985 with a random sort in
place of random places. What stays is a uniform sample without replacement of all that was offered, and the
same rule serves a limit of rows, of bytes and of either for each task: keys decide who goes, limits how many.

    >>> buffer = ReplayBuffer(capacity=1000, seed=0)
    >>> buffer.add(batch, tag=0)
    >>> old = buffer.sample(4, exclude_tag=1)            # None while there is nothing to replay
    >>> small = ReplayBuffer(None, budget_bytes=1_000_000, quota=True, logits=16, seed=0)
    >>> small.check(sequence_length=128, vocab_size=50_257)
    >>> small.add(batch, tag=0, logits=teacher(batch.input_ids))
    >>> small.draw(4).logits.values.shape                # (4, 128, 16)
"""

# B batch (rows), T time, V vocabulary, k logits kept of a position, N rows in the buffer, n rows drawn

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cambia.data.batches import IGNORED, Batch
from cambia.errors import ConfigError, DataError

_NOTES = 20  # bytes of a row's key (8), tag (4), bytes of text (4) and size (4) in a saved state
_WIDTHS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32))
_SHIFTED, _DEFLATED = 4, 8  # what a row's first byte says, beside the index of its width


@dataclass(frozen=True, eq=False)
class StoredLogits:
    """What a teacher said of rows when they were stored."""

    values: Tensor
    """(n, T, k), float32: the largest logits of each position, as float16 kept them."""
    ids: Tensor | None
    """(n, T, k), int64: the tokens that they belong to; None where the whole vocabulary is kept, in order."""


@dataclass(frozen=True, eq=False)
class Replayed:
    """Rows drawn from a buffer."""

    batch: Batch
    tags: Tensor
    """(n,), int64: the tag of each row."""
    logits: StoredLogits | None
    """None where the buffer keeps none."""


@dataclass(frozen=True, eq=False)
class Offer:
    """The rows of a batch that `ReplayBuffer.keep` would store."""

    batch: Batch
    tag: int
    rows: np.ndarray
    """(n,), int64: which rows of the batch, those with the smallest keys first."""
    keys: np.ndarray
    """(n,), float64."""

    @property
    def input_ids(self) -> Tensor:
        """(n, T): what a teacher has to read."""
        return self.batch.input_ids[torch.from_numpy(self.rows)]


class _Row(NamedTuple):
    """A stored row. Rows compare by their first field, so that a heap's first has the largest key."""

    order: float
    """The key times -1."""
    tag: int
    text_bytes: float
    tokens: bytes
    logits: bytes

    @property
    def size(self) -> int:
        return _NOTES + len(self.tokens) + len(self.logits)


class ReplayBuffer:
    """Keeps rows of earlier batches, each with a whole-number tag (a stage's index).

    What is kept depends on the seed and on what was offered, not on how often was drawn.

    Args:
        capacity: how many rows it holds at most; None leaves it to the bytes.
        seed: of its own random generators, which `state_dict` keeps.
        budget_bytes: how many bytes its rows take at most, stored logits and notes included (see
            `num_bytes`). Which rows stay is then fair up to the last one: a row that takes more bytes
            than others is left out a little more often, by about its share of the budget.
        quota: share the room evenly among the tags: what goes is of the tag that holds most (as
            Chrysakis and Moens 2020 balance classes). Otherwise each row seen has the same chance.
        logits: keep the teacher's largest so many logits of each position (dark experience replay, Buzzega
            et al. 2020, https://arxiv.org/abs/2004.07211), or all of a vocabulary that is not larger.

    Raises:
        ConfigError: there is no limit, or one is below 1.
    """

    def __init__(
        self,
        capacity: int | None = 2000,
        *,
        seed: int,
        budget_bytes: int | None = None,
        quota: bool = False,
        logits: int | None = None,
    ):
        if capacity is None and budget_bytes is None:
            raise ConfigError("a replay buffer needs a limit: capacity (rows), budget_bytes or both")
        given = {"capacity": capacity, "budget_bytes": budget_bytes, "logits": logits}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ConfigError(f"a replay buffer's {name} is {value}; expected at least 1, or none")
        self.capacity, self.budget_bytes, self.quota, self.logits = capacity, budget_bytes, quota, logits
        self._key_rng = np.random.default_rng((seed, 0))
        self._draw_rng = np.random.default_rng((seed, 1))
        self._empty()

    def _empty(self) -> None:
        self._length: int | None = None  # T of all rows
        self._layout: tuple[int, int] | None = None  # k of all logits, bytes of an id (0: all in order)
        self._held: dict[int, list[_Row]] = {}  # by tag; each list is a heap with the largest key first
        self._sizes: dict[int, int] = {}  # bytes, by tag
        # Once a row with some key had to go, none with a larger key may come in: not even a shorter one that
        # would fit, or late and short rows would stay more often. By tag under a quota, else all under 0.
        self._bars: dict[int, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes that the rows take now: packed tokens and logits, and 20 bytes of notes for each."""
        return sum(self._sizes.values())

    @property
    def tags(self) -> dict[int, int]:
        """How many rows each tag holds."""
        return {tag: len(self._held[tag]) for tag in sorted(self._held) if self._held[tag]}

    def clear(self) -> None:
        """Forget every row; the generators go on from where they are."""
        self._empty()

    def check(self, sequence_length: int, vocab_size: int) -> None:
        """Refuse a budget that would not hold every row of such a model.

        Raises:
            ConfigError: one row can take more bytes than `budget_bytes`.
        """
        size = _NOTES + 1 + 2 * sequence_length * _width(vocab_size).itemsize
        if self.logits is not None:
            kept, of_id = _logits_layout(self.logits, vocab_size)
            size += sequence_length * kept * (2 + of_id)
        self._check_size(size, f"{sequence_length} tokens of a vocabulary of {vocab_size}")

    def _check_size(self, size: int, what: str) -> None:
        if self.budget_bytes is not None and size > self.budget_bytes:
            less = " or fewer logits" if self.logits is not None else ""
            raise ConfigError(
                f"budget_bytes is {self.budget_bytes}, and one row of {what} can take {size} bytes: give the "
                f"replay buffer at least that many, or shorter rows{less}"
            )

    # ---- what stays ------------------------------------------------------------------------------

    def add(self, batch: Batch, tag: int, logits: Tensor | None = None) -> None:
        """Offer every row of a batch; which of them stay is up to chance.

        Args:
            logits: (B, T, V), the teacher's, where the buffer keeps them. Where they are dear, take
                `offer` and `keep` instead.

        Raises:
            DataError: the rows are of another length than those in the buffer, or logits are missing.
        """
        offer = self.offer(batch, tag)
        if offer is not None:
            self.keep(offer, None if logits is None else logits[torch.from_numpy(offer.rows)])

    def offer(self, batch: Batch, tag: int) -> Offer | None:
        """Draw the keys of a batch's rows: what is to be kept of it, or None if nothing is.

        Raises:
            DataError: the rows are of another length than those in the buffer.
        """
        rows, length = batch.input_ids.shape
        if self._length not in (None, length):
            raise DataError(
                f"the replay buffer holds rows of {self._length} tokens and was given rows of "
                f"{length}: keep one --training.sequence_length"
            )
        self._length = length
        keys = self._key_rng.random(rows)
        staying = np.flatnonzero(keys < self._bar(tag))
        if not len(staying):
            return None
        staying = staying[np.argsort(keys[staying])]
        return Offer(batch, tag, staying, keys[staying])

    def keep(self, offer: Offer, logits: Tensor | None = None) -> None:
        """Store the rows of an offer; others make room for them.

        Args:
            logits: (n, T, V), the teacher's of `offer.input_ids`, where the buffer keeps them.

        Raises:
            DataError: logits are missing, not wanted, or of a vocabulary that needs another layout.
            ConfigError: a row takes more bytes than the whole budget.
        """
        if (logits is None) != (self.logits is None):
            raise DataError(
                "the replay buffer keeps logits (logits=) and was given rows without"
                if logits is None
                else "the replay buffer was given logits and keeps none: set logits="
            )
        packed = [b""] * len(offer.rows) if logits is None else self._pack_logits(logits)
        input_ids = offer.input_ids.cpu().numpy()
        targets = offer.batch.targets[torch.from_numpy(offer.rows)].cpu().numpy()
        text_bytes = row_bytes(offer.batch)[offer.rows].astype(np.float32)
        for i, key in enumerate(offer.keys.tolist()):
            if key < self._bar(offer.tag):  # keys rise, and an earlier row may have lowered the bar
                tokens = _pack_tokens(input_ids[i], targets[i])
                self._store(_Row(-key, offer.tag, float(text_bytes[i]), tokens, packed[i]))

    def _store(self, row: _Row) -> None:
        self._check_size(row.size, f"{self._length} tokens")
        heapq.heappush(self._held.setdefault(row.tag, []), row)
        self._sizes[row.tag] = self._sizes.get(row.tag, 0) + row.size
        while self.capacity is not None and len(self) > self.capacity:
            self._drop_one({tag: len(rows) for tag, rows in self._held.items()})
        while self.budget_bytes is not None and self.num_bytes > self.budget_bytes:
            self._drop_one(self._sizes)

    def _drop_one(self, holdings: dict[int, int]) -> None:
        """Take out the largest key of all, or of the tag that holds most (of two such the larger key)."""
        held = {tag: rows for tag, rows in self._held.items() if rows}
        _, key, tag = max((holdings[tag] * self.quota, -rows[0].order, tag) for tag, rows in held.items())
        self._sizes[tag] -= heapq.heappop(self._held[tag]).size
        self._bars[self._pool(tag)] = key

    def _pool(self, tag: int) -> int:
        return tag if self.quota else 0

    def _bar(self, tag: int) -> float:
        """The key that a new row must stay below."""
        return self._bars.get(self._pool(tag), math.inf)

    # ---- drawing ---------------------------------------------------------------------------------

    def holds_other_than(self, tag: int | None) -> bool:
        """Whether there is a row with another tag; of None: whether there is any."""
        return any(rows and other != tag for other, rows in self._held.items())

    def sample(self, n: int, exclude_tag: int | None = None, *, only_tag: int | None = None) -> Batch | None:
        """`n` rows, without those of one tag or of one tag alone; None if there are none.

        They are different rows as long as there are enough; otherwise rows repeat.
        """
        drawn = self.draw(n, exclude_tag, only_tag=only_tag)
        return None if drawn is None else drawn.batch

    def draw(self, n: int, exclude_tag: int | None = None, *, only_tag: int | None = None) -> Replayed | None:
        """The rows that `sample` would give, with their tags and the logits kept with them."""
        wanted = [tag for tag in sorted(self._held) if tag != exclude_tag and only_tag in (None, tag)]
        ends = np.cumsum([0, *(len(self._held[tag]) for tag in wanted)])
        if n < 1 or not ends[-1]:
            return None
        places = self._draw_rng.choice(ends[-1], size=n, replace=bool(ends[-1] < n))
        heaps = np.searchsorted(ends, places, side="right") - 1
        return self._unpacked(
            [self._held[wanted[heap]][place - ends[heap]] for heap, place in zip(heaps, places, strict=True)]
        )

    def _unpacked(self, rows: list[_Row]) -> Replayed:
        pairs = [_unpack_tokens(row.tokens) for row in rows]
        batch = Batch(
            torch.from_numpy(np.stack([input_ids for input_ids, _ in pairs])),
            torch.from_numpy(np.stack([targets for _, targets in pairs])),
            num_bytes=round(sum(row.text_bytes for row in rows)),
            source="replay",
        )
        logits = None if self.logits is None else self._unpack_logits(row.logits for row in rows)
        return Replayed(batch, torch.tensor([row.tag for row in rows]), logits)

    # ---- logits ----------------------------------------------------------------------------------

    def _pack_logits(self, logits: Tensor) -> list[bytes]:
        """Each row's float16 values, (T, k), and behind them their ids where not all are kept."""
        assert self.logits is not None
        layout = _logits_layout(self.logits, logits.shape[-1])
        if self._layout not in (None, layout):
            raise DataError(
                f"the replay buffer holds logits of a vocabulary of another size than {logits.shape[-1]}: "
                "clear() it when the vocabulary grows so far"
            )
        self._layout = layout
        kept, of_id = layout
        if not of_id:
            return [row.tobytes() for row in logits.detach().to("cpu", torch.float16).numpy()]
        top = logits.detach().topk(kept, dim=-1)
        values = top.values.to("cpu", torch.float16).numpy()
        ids = top.indices.cpu().numpy().astype(f"u{of_id}")
        return [value.tobytes() + which.tobytes() for value, which in zip(values, ids, strict=True)]

    def _unpack_logits(self, packed: Iterable[bytes]) -> StoredLogits:
        assert self._layout is not None and self._length is not None
        kept, of_id = self._layout
        raw = np.stack([np.frombuffer(row, dtype=np.uint8) for row in packed])
        shape, border = (len(raw), self._length, kept), self._length * kept * 2
        values = raw[:, :border].copy().view(np.float16).reshape(shape).astype(np.float32)
        if not of_id:
            return StoredLogits(torch.from_numpy(values), None)
        ids = raw[:, border:].copy().view(f"u{of_id}").reshape(shape).astype(np.int64)
        return StoredLogits(torch.from_numpy(values), torch.from_numpy(ids))

    # ---- state -----------------------------------------------------------------------------------

    def _limits(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "budget_bytes": self.budget_bytes,
            "quota": self.quota,
            "logits": self.logits,
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: the packed rows, their keys and tags, and the generators' states."""
        rows = [row for tag in sorted(self._held) for row in self._held[tag]]  # each heap in its own order
        packed = b"".join(row.tokens + row.logits for row in rows)
        return {
            "limits": self._limits(),
            "length": self._length,
            "layout": list(self._layout) if self._layout else None,
            "generators": [self._key_rng.bit_generator.state, self._draw_rng.bit_generator.state],
            "bars": [[pool, bar] for pool, bar in self._bars.items()],
            "packed": torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy()),
            "sizes": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),  # (N,)
            "orders": torch.tensor([row.order for row in rows], dtype=torch.float64),
            "tags": torch.tensor([row.tag for row in rows], dtype=torch.int32),
            "text_bytes": torch.tensor([row.text_bytes for row in rows], dtype=torch.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state is of a buffer with other limits.
        """
        for name, value in self._limits().items():
            if state["limits"][name] != value:
                raise ConfigError(
                    f"the saved replay buffer has {name} {state['limits'][name]}, this one {value}: resume "
                    f"with the {name} that the run began with"
                )
        self._key_rng.bit_generator.state, self._draw_rng.bit_generator.state = state["generators"]
        self._empty()
        self._length = state["length"]
        self._layout = tuple(state["layout"]) if state["layout"] else None
        self._bars = {pool: bar for pool, bar in state["bars"]}
        packed = state["packed"].numpy().tobytes()
        sizes = state["sizes"].tolist()
        # Every row's logits take the same number of bytes.
        of_logits = (len(packed) - sum(sizes)) // max(1, len(sizes))
        notes = (state[name].tolist() for name in ("orders", "tags", "text_bytes"))
        start = 0
        for order, tag, text_bytes, size in zip(*notes, sizes, strict=True):
            middle, end = start + size, start + size + of_logits
            row = _Row(order, tag, text_bytes, packed[start:middle], packed[middle:end])
            self._held.setdefault(tag, []).append(row)
            self._sizes[tag] = self._sizes.get(tag, 0) + row.size
            start = end


# ---- a row as bytes ------------------------------------------------------------------------------


def _width(largest: int) -> np.dtype[Any]:
    """The narrowest of uint8, uint16 and uint32 that holds a number."""
    return next(width for width in _WIDTHS if largest < 1 << 8 * width.itemsize)


def _logits_layout(most: int, vocab_size: int) -> tuple[int, int]:
    """How many logits of a position are kept, and the bytes of each one's id (0: all, in order)."""
    if vocab_size <= most:
        return vocab_size, 0
    return most, _width(vocab_size - 1).itemsize


def _pack_tokens(input_ids: np.ndarray, targets: np.ndarray) -> bytes:
    """A byte that says how, and the tokens in the narrowest whole numbers, deflated where that is shorter.

    Usually targets are the inputs one place on: then one array of T + 1 holds both. Otherwise the targets
    follow the inputs, each one higher, with 0 for those that are not trained on.
    """
    shifted = bool((input_ids[1:] == targets[:-1]).all()) and targets[-1] != IGNORED
    second = targets[-1:] if shifted else np.where(targets == IGNORED, 0, targets + 1)
    both = np.concatenate([input_ids, second])
    width = _width(int(both.max()))
    raw = both.astype(width).tobytes()
    deflated = zlib.compress(raw, 1)
    how = _WIDTHS.index(width) | _SHIFTED * shifted
    if len(deflated) < len(raw):
        return bytes([how | _DEFLATED]) + deflated
    return bytes([how]) + raw


def _unpack_tokens(packed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (T,) each, int64."""
    how, raw = packed[0], packed[1:]
    if how & _DEFLATED:
        raw = zlib.decompress(raw)
    both = np.frombuffer(raw, dtype=_WIDTHS[how & 3]).astype(np.int64)
    if how & _SHIFTED:
        return both[:-1], both[1:]
    input_ids, above = np.split(both, 2)
    return input_ids, np.where(above == 0, IGNORED, above - 1)


def row_bytes(batch: Batch) -> np.ndarray:
    """A batch's bytes shared among its rows by how many targets each has."""
    trained = (batch.targets != IGNORED).sum(dim=1).double().cpu().numpy()  # (B,)
    total = trained.sum()
    return batch.num_bytes * trained / total if total else trained
