"""Batches of token windows: endless for training, shuffled or not; in order and exact for evaluation.

How text is cut into rows, and what attends to what, is told in `cambia.data.packing`.

>>> batches = TrainBatches(corpus.splits["train"], batch_size=8, sequence_length=256, seed=0)
>>> batch = next(batches)
>>> scored = evaluation_batches(file, batch_size=8, sequence_length=256)
>>> bits_per_byte = sum(nats(model, batch) for batch in scored) / math.log(2) / file.num_bytes
"""

# B batch (rows), T time (sequence_length)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cambia.data.corpus import TokenFile
from cambia.data.packing import Windows, whole_documents
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
    fresh: bool = True
    """Whether the stream has just given it, and not somebody's memory."""

    def rows(self, chosen: Sequence[int]) -> Batch:
        """Some of its rows; `num_bytes` is their share of the tokens."""
        ids, targets = self.input_ids[list(chosen)], self.targets[list(chosen)]
        share = int((targets != IGNORED).sum()) / max(1, int((self.targets != IGNORED).sum()))
        return replace(self, input_ids=ids, targets=targets, num_bytes=round(share * self.num_bytes))


class TrainBatches:
    """An endless stream of windows, shuffled unless they shall come in the order of the text.

    Each epoch cuts the tokens into windows of T + 1 at a random offset (neighbors share one token, the
    last partial window is dropped) and visits them in a random order, both drawn from (seed, epoch).
    Where part of the tokens is not trained on, windows hold whole documents and are the same every epoch.

    Args:
        token_file: the split to read.
        batch_size: rows of a batch.
        sequence_length: tokens of a row.
        seed: another seed gives another order.
        source: the name that batches carry.
        shuffle: visit the windows in a random order; False: one after another, as the text has them.

    Raises:
        DataError: the text is too short for one window.
    """

    def __init__(
        self,
        token_file: TokenFile,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        source: str = "",
        shuffle: bool = True,
    ):
        _check_geometry(batch_size, sequence_length)
        self.packed = None if token_file.mask is None else whole_documents(token_file, sequence_length)
        """The windows of whole documents, where part of the text is not trained on."""
        if self.packed is None and token_file.num_tokens < sequence_length + 1:
            raise DataError(
                f"the text{f' of {source!r}' if source else ''} is {token_file.num_tokens} tokens long, too "
                f"short for a window of {sequence_length + 1}: give more text or a smaller "
                "--training.sequence_length"
            )
        self.token_file, self.source, self.shuffle = token_file, source, shuffle
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.epoch = 0
        self.index = 0
        self._begin_epoch()

    @property
    def windows_per_epoch(self) -> int:
        """The same for every epoch, whatever its offset."""
        if self.packed is not None:
            return len(self.packed.starts)
        return max(1, (self.token_file.num_tokens - self.sequence_length) // self.sequence_length)

    def _begin_epoch(self) -> None:
        """Cut the windows of an epoch, and lay down in which order they come."""
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.packed is not None:
            self._windows = self.packed
        else:
            spare = self.token_file.num_tokens - 1 - self.windows_per_epoch * self.sequence_length
            offset = int(rng.integers(min(spare, self.sequence_length - 1) + 1))
            starts = offset + np.arange(self.windows_per_epoch, dtype=np.int64) * self.sequence_length
            self._windows = Windows(starts, starts + self.sequence_length + 1)
        order = np.arange(self.windows_per_epoch)
        self._order = rng.permutation(order) if self.shuffle else order

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self, rows: int | None = None) -> Batch:
        """The next batch, of `rows` rows in place of batch_size where that is given."""
        starts: list[int] = []
        stops: list[int] = []
        wanted = self.batch_size if rows is None else rows
        while len(starts) < wanted:
            if self.index == self.windows_per_epoch:
                self.epoch, self.index = self.epoch + 1, 0
                self._begin_epoch()
            taken = self._order[self.index : self.index + wanted - len(starts)]
            starts += self._windows.starts[taken].tolist()
            stops += self._windows.stops[taken].tolist()
            self.index += len(taken)
        windows = Windows(np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64))
        return _read(self.token_file, windows, self.sequence_length, self.source)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: epoch and windows done in it."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        self._begin_epoch()


def evaluation_batches(
    token_file: TokenFile,
    *,
    batch_size: int,
    sequence_length: int,
    source: str = "",
    context: int = 0,
) -> Iterator[Batch]:
    """Windows in order in which each token that counts is a target exactly once.

    These are all tokens after the first, or those that are trained on. What a row lacks is filled up with
    end-of-text tokens and targets of -100; the last batch may have fewer rows. The batches' `num_bytes`
    add up to the bytes of all targets, without context to the file's.

    Args:
        context: tokens with which each row begins that are not scored: the row before has scored them. So
            every scored token has at least as many before it, and the first ones of the text are left out.
            Where only part of the text is trained on, a row has its context already, and this is not used.

    Raises:
        DataError: there is no text, or too little for the context.
    """
    _check_geometry(batch_size, sequence_length)
    if not 0 <= context < sequence_length:
        raise ConfigError(
            f"a context of {context} tokens leaves nothing to score in rows of {sequence_length}: it must be "
            "smaller (--evaluation.context_tokens)"
        )
    if not token_file.num_documents:
        raise DataError("there is no text to evaluate on: the split is empty (its fraction is 0)")
    refuse_short(token_file, context, source)
    if token_file.mask is None:
        starts = np.arange(0, token_file.num_tokens - 1 - context, sequence_length - context)
        windows = Windows(starts, np.minimum(starts + sequence_length + 1, token_file.num_tokens))
    else:
        windows, context = whole_documents(token_file, sequence_length), 0
    for first in range(0, len(windows.starts), batch_size):
        rows = slice(first, first + batch_size)
        some = Windows(windows.starts[rows], windows.stops[rows])
        yield _read(token_file, some, sequence_length, source, context)


def refuse_short(token_file: TokenFile, context: int, name: str = "") -> None:
    """Refuse text of which nothing is left to be scored behind a context.

    Raises:
        DataError: with what repairs it.
    """
    if token_file.mask is None and token_file.num_documents and token_file.num_tokens <= context + 1:
        raise DataError(
            f"the text to evaluate on{f', {name},' if name else ''} has {token_file.num_tokens} tokens, too "
            f"few for a context of {context}: give more text, or lower --evaluation.context_tokens"
        )


def _check_geometry(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ConfigError(
            f"batch_size {batch_size} and sequence_length {sequence_length} must both be at least 1 "
            "(--training.batch_size, --training.sequence_length)"
        )


def _read(token_file: TokenFile, windows: Windows, length: int, source: str, context: int = 0) -> Batch:
    """The tokens of some windows; what lies beyond their ends is filled up, what is context no target."""
    starts, stops = windows.starts, windows.stops
    last = token_file.num_tokens - 1
    place = starts[:, None] + np.arange(length + 1)  # (B, T + 1)
    beyond = place >= stops[:, None]
    tokens = token_file.ids(np.minimum(place, last))
    tokens[beyond] = token_file.eos_id
    targets = tokens[:, 1:].copy()  # (B, T)
    targets[beyond[:, 1:]] = IGNORED
    targets[:, :context] = IGNORED
    if token_file.mask is not None:
        targets[token_file.mask[np.minimum(place[:, 1:], last)] == 0] = IGNORED
    num_bytes = token_file.bytes_before(stops) - token_file.bytes_before(starts + 1 + context)
    return Batch(
        torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), int(num_bytes.sum()), source
    )
