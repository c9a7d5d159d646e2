"""Batches of token windows: shuffled and endless for training, in order and exact for evaluation.

>>> batches = TrainBatches(corpus.splits["train"], batch_size=8, sequence_length=256, seed=0)
>>> batch = next(batches)
>>> scored = evaluation_batches(file, batch_size=8, sequence_length=256)
>>> bits_per_byte = sum(nats(model, batch) for batch in scored) / math.log(2) / file.num_bytes
"""

# B batch (rows), T time (sequence_length)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cambia.data.corpus import TokenFile
from cambia.errors import ConfigError, DataError

IGNORED = -100
"""The target of a position that is not trained on (what torch's cross entropy ignores)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens and what comes next in each."""

    input_ids: Tensor
    """(B, T), int64."""
    targets: Tensor
    """(B, T), int64: the token after each input, -100 where it is not trained on."""
    num_bytes: int
    """UTF-8 bytes of text that the targets stand for."""
    source: str = ""
    """What the rows are, by name."""


class TrainBatches:
    """An endless stream of shuffled windows.

    Each epoch cuts the tokens into windows of T + 1 at a random offset (neighbors share one token, the
    last partial window is dropped) and visits them in a random order, both drawn from (seed, epoch).

    Args:
        token_file: the split to read.
        batch_size: rows of a batch.
        sequence_length: tokens of a row.
        seed: another seed gives another order.
        source: the name that batches carry.

    Raises:
        DataError: the text is too short for one window.
    """

    def __init__(
        self, token_file: TokenFile, *, batch_size: int, sequence_length: int, seed: int, source: str = ""
    ):
        _check_geometry(batch_size, sequence_length)
        if token_file.num_tokens < sequence_length + 1:
            raise DataError(
                f"the text{f' of {source!r}' if source else ''} is {token_file.num_tokens} tokens long, too "
                f"short for a window of {sequence_length + 1}: give more text or a smaller "
                "--training.sequence_length"
            )
        self.token_file, self.source = token_file, source
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.epoch = 0
        self.index = 0
        self._shuffle()

    @property
    def windows_per_epoch(self) -> int:
        """The same for every epoch, whatever its offset."""
        return max(1, (self.token_file.num_tokens - self.sequence_length) // self.sequence_length)

    def _shuffle(self) -> None:
        rng = np.random.default_rng((self.seed, self.epoch))
        spare = self.token_file.num_tokens - 1 - self.windows_per_epoch * self.sequence_length
        self._offset = int(rng.integers(min(spare, self.sequence_length - 1) + 1))
        self._order = rng.permutation(self.windows_per_epoch)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self, rows: int | None = None) -> Batch:
        """The next batch, of `rows` rows in place of batch_size where that is given."""
        windows: list[int] = []
        wanted = self.batch_size if rows is None else rows
        while len(windows) < wanted:
            if self.index == self.windows_per_epoch:
                self.epoch, self.index = self.epoch + 1, 0
                self._shuffle()
            taken = self._order[self.index : self.index + wanted - len(windows)]
            windows += [self._offset + int(window) * self.sequence_length for window in taken]
            self.index += len(taken)
        return _read(self.token_file, np.array(windows, dtype=np.int64), self.sequence_length, self.source)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: epoch and windows done in it."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        self._shuffle()


def evaluation_batches(
    token_file: TokenFile, *, batch_size: int, sequence_length: int, source: str = ""
) -> Iterator[Batch]:
    """Windows in order in which each token after the first is a target exactly once.

    The last row is filled up with end-of-text tokens and targets of -100; the last batch may have
    fewer rows. The batches' `num_bytes` add up to the file's.

    Raises:
        DataError: there is no text.
    """
    _check_geometry(batch_size, sequence_length)
    if not token_file.num_documents:
        raise DataError("there is no text to evaluate on: the split is empty (its fraction is 0)")
    starts = np.arange(0, token_file.num_tokens - 1, sequence_length)
    for first in range(0, len(starts), batch_size):
        yield _read(token_file, starts[first : first + batch_size], sequence_length, source)


def _check_geometry(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ConfigError(
            f"batch_size {batch_size} and sequence_length {sequence_length} must both be at least 1 "
            "(--training.batch_size, --training.sequence_length)"
        )


def _read(token_file: TokenFile, starts: np.ndarray, length: int, source: str) -> Batch:
    """The windows that begin at `starts`; what lies beyond the end is filled up."""
    last = token_file.num_tokens - 1
    place = starts[:, None] + np.arange(length + 1)  # (B, T + 1)
    beyond = place > last
    tokens = token_file.tokens[np.minimum(place, last)].astype(np.int64)
    tokens[beyond] = token_file.eos_id
    targets = tokens[:, 1:].copy()  # (B, T)
    targets[beyond[:, 1:]] = IGNORED
    if token_file.mask is not None:
        targets[token_file.mask[np.minimum(place[:, 1:], last)] == 0] = IGNORED
    stops = np.minimum(starts + length + 1, token_file.num_tokens)
    num_bytes = token_file.bytes_before(stops) - token_file.bytes_before(starts + 1)
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), int(num_bytes.sum()), source
    )
