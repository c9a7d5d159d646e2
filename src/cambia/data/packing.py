"""Which stretches of a token file become rows.

Plain text is cut anywhere: a row is a window over documents that follow each other, and attends over all
of them. Where only part of a text is trained on (answers, not instructions) a cut would take an answer away
from its instruction, so there rows hold whole documents, as many as fit one after another; they, too,
attend over all that stands before them in the row. A document that is longer than a row is read in parts
that meet, counted from its end, so that no answer loses its last words; parts without anything to train on
are left out.

    >>> windows = whole_documents(file, sequence_length=256)
    >>> len(windows.starts), windows.cut
    (812, 3)
"""

# N windows, T time (sequence_length)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cambia.data.corpus import TokenFile


@dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of at most T + 1 tokens: a row's inputs and, one further, its targets."""

    starts: np.ndarray
    """First token of each, (N,), int64."""
    stops: np.ndarray
    """Just after the last token of each, (N,), int64."""
    cut: int = 0
    """Documents that did not fit into one."""


def whole_documents(file: TokenFile, sequence_length: int) -> Windows:
    """Windows of whole documents, in the order of the file; each trained token is a target once."""
    begins = file.starts - 1  # the end-of-text token that stands before the document
    ends = np.append(begins[1:], file.num_tokens - 1)  # and the one that closes it
    found: list[tuple[int, int]] = []
    cut = index = 0
    while index < len(begins):
        # As many as end within T tokens after the first one's begin.
        after = int(np.searchsorted(ends, begins[index] + sequence_length, side="right"))
        if after > index:
            found.append((int(begins[index]), int(ends[after - 1]) + 1))
            index = after
        else:
            found += _parts(file, int(begins[index]), int(ends[index]) + 1, sequence_length)
            cut += 1
            index += 1
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    return Windows(table[:, 0], table[:, 1], cut)


def _parts(file: TokenFile, begin: int, stop: int, sequence_length: int) -> list[tuple[int, int]]:
    """Windows over one long document, first to last, each ending where the next one's targets begin."""
    parts = []
    while stop - begin > 1:
        start = max(begin, stop - 1 - sequence_length)
        if file.mask is None or file.mask[start + 1 : stop].any():
            parts.append((start, stop))
        stop = start + 1
    return parts[::-1]
