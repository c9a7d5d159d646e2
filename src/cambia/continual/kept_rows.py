"""Rows of a stream that are kept for a while: strange ones, and those that a Part is taught from."""

# N rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cambia.continual.domains import ReadRows


class Quarantine:
    """Strange rows, until it is certain that something new has come, or that nothing has."""

    def __init__(self) -> None:
        self.rows = ReadRows.none(1, 1)
        self.nearest: list[str | None] = []
        """The domain that each row is least strange to."""
        self.sources: list[str] = []

    def add(self, rows: ReadRows, nearest: Sequence[str | None], source: str) -> None:
        """Rows that came together."""
        self.rows = joined(self.rows, rows)
        self.nearest += nearest
        self.sources += [source] * len(rows)

    def of(self, domain: str | None) -> ReadRows:
        """The rows that are nearest to a domain."""
        return self.rows.take(
            [i for i, name in enumerate(self.nearest) if name is not None and name == domain]
        )

    def clear(self) -> None:
        self.rows, self.nearest, self.sources = self.rows.take([]), [], []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "nearest": self.nearest, "sources": self.sources}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = ReadRows(**state["rows"])
        self.nearest, self.sources = list(state["nearest"]), list(state["sources"])


class Material:
    """What the open Part is taught from, and the rows that are held back from it."""

    def __init__(self) -> None:
        self.arrived = 0
        """Rows that came since it was opened, its first ones not counted."""
        self.due = ReadRows.none(1, 1)
        """To be read as soon as there is time."""
        self.memory = ReadRows.none(1, 1)
        """A sample of all that it has read, each row as likely as any other."""
        self._keys = torch.zeros(0, dtype=torch.float64)  # of the rows in memory: those of the largest stay
        self.yardstick = ReadRows.none(1, 1)
        """Held back for good."""
        self.waiting = ReadRows.none(1, 1)
        """Held back for a while."""

    def begin(self, rows: ReadRows, held: int) -> None:
        """A Part is opened on its first rows, the last `held` of which it never reads."""
        kept = len(rows) - held
        self.arrived = 0
        self.due, self.yardstick = rows.take(range(kept)), rows.take(range(kept, len(rows)))
        self.memory = self.waiting = rows.take([])
        self._keys = self._keys[:0]

    def end(self) -> None:
        """The Part is sealed: nothing is kept."""
        self.memory = self.due = self.yardstick = self.waiting = self.memory.take([])
        self._keys = self._keys[:0]

    @property
    def held_out(self) -> ReadRows:
        """What the Part has not read."""
        return joined(self.yardstick, self.waiting)

    def hold(self, rows: ReadRows, most: int, *, at_once: int) -> tuple[list[int], ReadRows]:
        """Keep one in `_HELD` of new rows back for a while.

        Args:
            most: that wait at one time.
            at_once: so many more have to be there before the oldest are let go: no step is made for a few.

        Returns:
            Which of the rows are left, and those that have waited long enough; they are due now.
        """
        places = range(self.arrived, self.arrived + len(rows))
        self.arrived += len(rows)
        if not most:
            return list(range(len(rows))), rows.take([])
        left = [i for i, place in enumerate(places) if place % _HELD != _HELD - 1]
        waiting = joined(self.waiting, rows.take([i for i in range(len(rows)) if i not in left]))
        over = len(waiting) - most
        over = 0 if over < at_once else over
        freed, self.waiting = waiting.take(range(over)), waiting.take(range(over, len(waiting)))
        self.due = joined(self.due, freed)
        return left, freed

    def remember(self, rows: ReadRows, most: int, generator: torch.Generator) -> None:
        """Rows that the Part has read; of more than `most` a random sample stays."""
        memory = joined(self.memory, rows)
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=generator, dtype=torch.float64)])
        kept = keys.topk(min(most, len(keys))).indices.sort().values
        self.memory, self._keys = memory.take(kept.tolist()), keys[kept]

    def first_due(self, count: int) -> ReadRows:
        """The rows that are read next."""
        return self.due.take(range(min(count, len(self.due))))

    def read_due(self, count: int, most: int, generator: torch.Generator) -> None:
        """So many of the rows that were due have been read; of all that were read `most` stay in memory."""
        self.remember(self.first_due(count), most, generator)
        self.due = self.due.take(range(min(count, len(self.due)), len(self.due)))

    def state_dict(self) -> dict[str, Any]:
        rows = {name: getattr(self, name).state_dict() for name in _KINDS}
        return {"arrived": self.arrived, "keys": self._keys, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.arrived, self._keys = state["arrived"], state["keys"]
        for name in _KINDS:
            setattr(self, name, ReadRows(**state["rows"][name]))


_KINDS = ("due", "memory", "yardstick", "waiting")
_HELD = 8
"""One in so many rows of the open domain waits."""


def joined(rows: ReadRows, more: ReadRows) -> ReadRows:
    """Both, one behind the other."""
    if not len(rows):
        return more
    return rows.and_then(more) if len(more) else rows
