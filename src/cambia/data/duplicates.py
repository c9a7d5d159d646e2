"""Near-duplicate lines across splits, found without holding the corpus in memory.

A line is compared in its normal form: lower case, every number as 0, punctuation and white space as
single spaces; short lines say nothing and are left alone. The training split's lines go to disk as
8-byte hashes; the hashes of the held-out lines, which are few, are then looked for among them.

    >>> normal_form("  Copyright (c) 2024, The  Authors. ")
    'copyright c 0 the authors'
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import IO

import numpy as np

LEAST_CHARS = 20
"""Lines whose normal form is shorter are never counted as duplicates."""

_MARKS = re.compile(r"(?:[^\w\n]|_)+")
_NUMBERS = re.compile(r"\d+")
_CHUNK = 1 << 20


def normal_form(text: str) -> str:
    """What is compared of a line; line breaks are kept, so a whole text may be given at once."""
    marked = _NUMBERS.sub("0", _MARKS.sub(" ", text.lower()))
    return "\n".join(line.strip() for line in marked.split("\n"))


def line_hashes(text: str) -> list[int | None]:
    """For each line of a text its 64-bit hash, or None where the line is too short to be compared."""
    return [_hash(line) if len(line) >= LEAST_CHARS else None for line in normal_form(text).split("\n")]


def text_hash(text: str) -> int | None:
    """The 64-bit hash of a whole document, exact but for white space around it; None if it is short."""
    text = text.strip()
    return _hash("whole\n" + text) if len(text) >= LEAST_CHARS else None


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest())


class HashFile:
    """Hashes of everything in the training split, on disk.

    Args:
        file: open for writing and reading.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._waiting = array("Q")

    def add(self, text: str) -> None:
        self._waiting.extend(_all_hashes(text))
        if len(self._waiting) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        # Sorting is for `np.unique` alone: many lines of code stand there a thousand times.
        self._file.write(np.unique(np.array(self._waiting, dtype=np.uint64)).tobytes())
        self._waiting = array("Q")

    def common(self, hashes: np.ndarray) -> np.ndarray:
        """Those of `hashes` (sorted, unique, uint64) that are in the file."""
        self._flush()
        self._file.seek(0)
        found = np.zeros(len(hashes), dtype=bool)
        while block := self._file.read(8 * _CHUNK):
            found |= np.isin(hashes, np.frombuffer(block, dtype=np.uint64))
        return hashes[found]


def _all_hashes(text: str) -> Iterator[int]:
    yield from (value for value in line_hashes(text) if value is not None)
    whole = text_hash(text)
    if whole is not None:
        yield whole


class HeldOutHashes:
    """Hashes of a held-out split, which is small enough to be kept in memory."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def add(self, text: str) -> None:
        self._hashes.update(_all_hashes(text))

    def array(self) -> np.ndarray:
        """Sorted, unique, uint64."""
        return np.array(sorted(self._hashes), dtype=np.uint64)


def without_lines(text: str, start: int, known: set[int]) -> tuple[str, int]:
    """A text without its known lines, and how many there were; text before `start` is left as it is.

    A document that is known as a whole comes back with nothing after `start`.
    """
    head, tail = text[:start], text[start:]
    hashes = line_hashes(tail)
    if text_hash(text) in known:
        return head, len(hashes)
    lines = [line for line, value in zip(tail.split("\n"), hashes, strict=True) if value not in known]
    dropped = len(hashes) - len(lines)
    return (head + "\n".join(lines), dropped) if dropped else (text, 0)
