"""A prepared corpus: per split one memory-mapped file of tokens and where its documents begin.

A split is ``eos d1 eos d2 eos ...``: every document stands between two end-of-text tokens, so each of
its tokens can be predicted and its end as well. Where the tokenizer begins a text with a token of its own
(Llama's), so does every document. Bytes are counted beside tokens, which is what makes
bits per byte exact for any tokenizer.

    >>> file = corpus.splits["valid"].head(100_000)      # whole documents, for a quick evaluation
    >>> file.num_documents, file.num_bytes
    >>> second_of_ten = corpus.splits["train"].chunk(1, 10)

These are views: whatever they leave out, no token is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cambia.data.sources import SPLITS
from cambia.data.tokenizers import Tokenizer
from cambia.errors import DataError
from cambia.files import read_json, verified

SUMMARY = "corpus.json"


def file_names(split: str) -> dict[str, str]:
    """The names of a split's files: tokens, starts, bytes and, where part of it is not trained on, mask."""
    return {
        "tokens": f"{split}.tokens.bin",
        "starts": f"{split}.starts.npy",
        "bytes": f"{split}.bytes.npy",
        "mask": f"{split}.mask.bin",
    }


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One split's tokens."""

    tokens: np.ndarray
    """All tokens, (N,), uint16 or uint32; the first is the end-of-text token."""
    starts: np.ndarray
    """Where each document begins, (documents,), int64, ascending."""
    document_bytes: np.ndarray
    """UTF-8 bytes of each document's text that is trained on, (documents,), int64."""
    mask: np.ndarray | None = None
    """1 where a token is trained on, (N,), uint8; None means everywhere."""
    permutation: np.ndarray | None = None
    """Which id is read in each id's place, (vocab_size,); None: the ids as they are stored."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all text that is trained on."""
        return int(self.document_bytes.sum())

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """All tokens, end-of-text tokens included."""
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        return int(self.ids(np.zeros(1, dtype=np.int64))[0])

    def head(self, max_bytes: int) -> TokenFile:
        """The first whole documents that together have at most `max_bytes`, and at least one."""
        fitting = int(np.searchsorted(np.cumsum(self.document_bytes), max_bytes, side="right"))
        count = max(1, fitting)
        return self if count >= self.num_documents else self._documents(0, count)

    def chunk(self, number: int, count: int) -> TokenFile:
        """One of `count` stretches that follow each other: whole documents, about as many bytes in each.

        Args:
            number: which, from 0.

        Raises:
            DataError: there are fewer documents than stretches.
        """
        if self.num_documents < count:
            raise DataError(f"{self.num_documents} documents cannot be shared out among {count}")
        shares = self.num_bytes * np.arange(1, count) / count
        cuts = np.searchsorted(np.cumsum(self.document_bytes), shares, side="left") + 1
        # At least one document in each: the cuts go up, and leave enough for those that come after.
        places = np.arange(1, count)
        cuts = np.maximum.accumulate(cuts - places) + places
        cuts = np.minimum(cuts, self.num_documents - count + places)
        edges = [0, *cuts.tolist(), self.num_documents]
        return self._documents(edges[number], edges[number + 1])

    def _documents(self, first: int, stop: int) -> TokenFile:
        """The documents from `first` to just before `stop`, with the end-of-text tokens around them."""
        begin = int(self.starts[first]) - 1
        end = int(self.starts[stop]) if stop < self.num_documents else self.num_tokens
        return TokenFile(
            self.tokens[begin:end],
            self.starts[first:stop] - begin,
            self.document_bytes[first:stop],
            None if self.mask is None else self.mask[begin:end],
            self.permutation,
        )

    def ids(self, places: np.ndarray) -> np.ndarray:
        """The token ids that are read at some places, int64, in the shape of `places`."""
        found = self.tokens[places]
        if self.permutation is not None:
            found = self.permutation[found]
        return found.astype(np.int64)

    @cached_property
    def _cumulative_bytes(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.document_bytes)])

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-text token left out."""
        return np.append(self.starts[1:], self.num_tokens) - 1 - self.starts

    def bytes_before(self, positions: np.ndarray) -> np.ndarray:
        """Bytes of text that the tokens before each position stand for, int64.

        Within a document its bytes are spread evenly over those of its tokens that are trained on, so a
        window's count is exact for bytes and near for others, while windows that meet add up to the whole
        exactly.
        """
        if not self.num_documents:
            return np.zeros(len(positions), dtype=np.int64)
        index = np.searchsorted(self.starts, positions, side="right") - 1
        inside = np.maximum(index, 0)
        length = self._lengths[inside]
        done = np.minimum(positions - self.starts[inside], length)
        if self.mask is not None:
            starts = self.starts[inside]
            done = self._trained(starts, starts + np.maximum(done, 0))
            length = self._trained(starts, starts + length)
        part = self._cumulative_bytes[inside] + self.document_bytes[inside] * done // length
        return np.where(index < 0, 0, part)

    def _trained(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """How many tokens of each stretch are trained on."""
        assert self.mask is not None
        return np.array([self.mask[i:j].sum(dtype=np.int64) for i, j in zip(starts, stops, strict=True)])

    @staticmethod
    def from_texts(texts: Iterable[str], tokenizer: Tokenizer) -> TokenFile:
        """A split in memory, for text at hand; empty texts are left out.

        Raises:
            DataError: there is no text.
        """
        eos = np.array([tokenizer.eos_id], dtype=np.int64)
        pieces, starts, sizes = [eos], [], []
        position = 1
        for text in texts:
            ids = tokenizer.encode(text)
            if len(ids):
                pieces += [tokenizer.opening, ids, eos]
                starts.append(position)
                sizes.append(len(text.encode("utf-8")))
                position += len(tokenizer.opening) + len(ids) + 1
        if not starts:
            raise DataError("there is no text to score; expected at least one text that is not empty")
        kind = token_dtype(tokenizer.vocab_size)
        return TokenFile(np.concatenate(pieces).astype(kind), np.array(starts), np.array(sizes))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that mean no text: end of text, what opens a document, padding, and all that is marked so."""
    marked = [number for number, token in tokenizer.hf.added_tokens_decoder.items() if token.special]
    known = {tokenizer.eos_id, *tokenizer.opening.tolist(), *tokenizer.hf.all_special_ids, *marked}
    return tuple(sorted(int(number) for number in known if number < tokenizer.vocab_size))


@dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """A folder that `prepare` wrote."""

    folder: Path
    splits: dict[str, TokenFile]
    """train, valid and test."""
    summary: dict[str, Any]
    """What corpus.json says: the configuration, and per split its counts and dropped duplicates."""

    @property
    def vocab_size(self) -> int:
        return self.summary["vocab_size"]

    @property
    def fingerprint(self) -> str:
        """The configuration's hash: equal fingerprints, equal tokens."""
        return self.summary["fingerprint"]

    @staticmethod
    def open(folder: str | Path) -> PreparedCorpus:
        """Open a prepared folder, every file checked against its SHA-256.

        Raises:
            CheckpointError: it is missing, altered or not whole.
        """
        folder = verified(folder)
        summary = read_json(folder / SUMMARY)
        kind = token_dtype(summary["vocab_size"])
        return PreparedCorpus(folder, {split: _open_split(folder, split, kind) for split in SPLITS}, summary)


def _open_split(folder: Path, split: str, kind: np.dtype[Any]) -> TokenFile:
    names = {what: folder / name for what, name in file_names(split).items()}
    mask = np.memmap(names["mask"], dtype=np.uint8, mode="r") if names["mask"].exists() else None
    tokens = np.memmap(names["tokens"], dtype=kind, mode="r")
    return TokenFile(tokens, np.load(names["starts"]), np.load(names["bytes"]), mask)
