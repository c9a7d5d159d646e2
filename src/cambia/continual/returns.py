"""Text that a sealed Part answers, come again: when a new version of the Part is to learn from it."""

# N rows

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cambia.continual.domains import ReadRows
from cambia.continual.kept_rows import joined

Reopen = Literal["never", "drifted", "always"]


@dataclass(frozen=True)
class Returned:
    """What has come of a sealed Part's text."""

    rows: ReadRows
    """The latest ones."""
    sources: Sequence[str]
    """Of each of them."""
    arrived: int
    """Rows that have come since it was sealed or asked about."""

    def latest(self, most: int, *, arrived: int) -> Returned:
        """The latest rows alone."""
        first = max(0, len(self.rows) - most)
        return Returned(self.rows.take(range(first, len(self.rows))), self.sources[first:], arrived)


class Returns:
    """The latest rows of each sealed Part's text, and when they are enough for a new version of it.

    Args:
        reopen: `never`; `always`, as soon as there are enough rows; or `drifted`, if the Part foretells them
            clearly worse than the held-out rows of its own time.
        least_rows: that are enough. After each version that was not worth it twice as many.
    """

    def __init__(self, reopen: Reopen, least_rows: int):
        self.reopen, self.least_rows = reopen, least_rows
        self.returned: dict[str, Returned] = {}
        """By Part."""
        self.failed: dict[str, int] = {}
        """For each Part, versions that came to nothing."""
        self.ordinary: dict[str, list[float]] = {}
        """For each Part, mean and squared standard error of what it gave held-out rows when it was sealed."""

    def enough(self, part: str) -> int:
        """Rows of its text that a new version of it needs."""
        return self.least_rows * 2 ** self.failed.get(part, 0)

    def add(self, part: str, rows: ReadRows, source: str) -> None:
        """Rows that a sealed Part answers."""
        if self.reopen == "never" or not len(rows):
            return
        had = self.returned.get(part, Returned(rows.take([]), [], 0))
        every = Returned(joined(had.rows, rows), [*had.sources, *[source] * len(rows)], had.arrived)
        self.returned[part] = every.latest(_KEPT * self.least_rows, arrived=had.arrived + len(rows))

    def failed_once_more(self, part: str) -> None:
        """A new version of a Part came to nothing: the next one has to wait for twice as many rows."""
        self.failed[part] = self.failed.get(part, 0) + 1
        self.returned.pop(part, None)

    def sealed(self, part: str, losses: Tensor) -> None:
        """A Part has been sealed that gave held-out rows these losses, (N,) nats per token."""
        if len(losses) > 1:
            self.ordinary[part] = [float(losses.mean()), float(losses.var()) / len(losses)]

    def asks(self, losses_of: Callable[[str, ReadRows], Tensor]) -> str | None:
        """The Part that a new version is wanted of; None: of none.

        Args:
            losses_of: (N,) nats per token that a Part gives rows.
        """
        # By name: that order a restart keeps.
        for part in sorted(self.returned):
            had = self.returned[part]
            if had.arrived < self.enough(part):
                continue
            if self.reopen == "always" or self._has_drifted(part, losses_of(part, had.rows)):
                return part
            # They were as ever: half as many have to come anew before it is asked again.
            self.returned[part] = had.latest((len(had.rows) + 1) // 2, arrived=had.arrived // 2)
        return None

    def _has_drifted(self, part: str, losses: Tensor) -> bool:
        """Whether a Part foretells rows, (N,) losses, clearly worse than those that were held out for it."""
        if part not in self.ordinary or len(losses) < 2:
            return False
        mean, error = self.ordinary[part]
        return float(losses.mean()) - mean > _CLEARLY * math.sqrt(error + float(losses.var()) / len(losses))

    def take(self, part: str) -> Returned:
        """What has come of a Part's text; it is kept no more."""
        return self.returned.pop(part)

    def state_dict(self) -> dict[str, Any]:
        returned = {
            part: {"rows": had.rows.state_dict(), "sources": list(had.sources), "arrived": had.arrived}
            for part, had in self.returned.items()
        }
        return {"returned": returned, "failed": dict(self.failed), "ordinary": dict(self.ordinary)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.returned = {
            part: Returned(ReadRows(**had["rows"]), list(had["sources"]), had["arrived"])
            for part, had in state["returned"].items()
        }
        self.failed, self.ordinary = dict(state["failed"]), dict(state["ordinary"])


_KEPT = 4
"""Times as many rows as are enough at first are kept of each Part's text, at most."""
_CLEARLY = 3.0
"""Standard errors. Rows of running text hang together, so this is no promised rate of false alarms."""
