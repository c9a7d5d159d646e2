"""Text that a sealed Part answers, come again: when a new version of the Part is to learn from it."""

# N rows

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from cambia.continual.domains import ReadRows
from cambia.continual.kept_rows import joined

Reopen = Literal["never", "drifted", "always"]


class Returns:
    """The latest rows of each sealed Part's text, and when they are enough for a new version of it.

    Args:
        reopen: `never`; `always`, as soon as there are enough rows; or `drifted`, if the Part foretells them
            clearly worse than the held-out rows of its own time.
        least_rows: that are enough. After each version that was not worth it twice as many.
    """

    def __init__(self, reopen: Reopen, least_rows: int):
        self.reopen, self.least_rows = reopen, least_rows
        self.arrived: dict[str, int] = {}
        """For each Part, rows of its text that have come since it was sealed or asked about."""
        self.rows: dict[str, ReadRows] = {}
        """The latest of them."""
        self.sources: dict[str, list[str]] = {}
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
        self.arrived[part] = self.arrived.get(part, 0) + len(rows)
        kept = joined(self.rows[part], rows) if part in self.rows else rows
        sources = [*self.sources.get(part, []), *[source] * len(rows)]
        self._keep(part, kept, sources, most=_KEPT * self.least_rows)

    def _keep(self, part: str, rows: ReadRows, sources: list[str], *, most: int) -> None:
        """The latest rows alone."""
        self.rows[part] = rows.take(range(max(0, len(rows) - most), len(rows)))
        self.sources[part] = sources[-most:]

    def failed_once_more(self, part: str) -> None:
        """A new version of a Part came to nothing: the next one has to wait for twice as many rows."""
        self.failed[part] = self.failed.get(part, 0) + 1
        for kept in (self.arrived, self.rows, self.sources):
            kept.pop(part, None)

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
        for part in sorted(self.rows):
            rows = self.rows[part]
            if self.arrived[part] < self.enough(part):
                continue
            if self.reopen == "always" or self._has_drifted(part, losses_of(part, rows)):
                return part
            # They were as ever: half as many have to come anew before it is asked again.
            self.arrived[part] //= 2
            self._keep(part, rows, self.sources[part], most=(len(rows) + 1) // 2)
        return None

    def _has_drifted(self, part: str, losses: Tensor) -> bool:
        """Whether a Part foretells rows, (N,) losses, clearly worse than those that were held out for it."""
        if part not in self.ordinary or len(losses) < 2:
            return False
        mean, error = self.ordinary[part]
        return float(losses.mean()) - mean > _CLEARLY * math.sqrt(error + float(losses.var()) / len(losses))

    def take(self, part: str) -> tuple[ReadRows, list[str]]:
        """The rows of a Part's text, and of which source each is; they are kept no more."""
        del self.arrived[part]
        return self.rows.pop(part), self.sources.pop(part)

    def state_dict(self) -> dict[str, Any]:
        return {
            "arrived": self.arrived,
            "rows": {part: rows.state_dict() for part, rows in self.rows.items()},
            "sources": self.sources,
            "failed": self.failed,
            "ordinary": self.ordinary,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.arrived = dict(state["arrived"])
        self.rows = {part: ReadRows(**rows) for part, rows in state["rows"].items()}
        self.sources = {part: list(sources) for part, sources in state["sources"].items()}
        self.failed, self.ordinary = dict(state["failed"]), dict(state["ordinary"])


_KEPT = 4
"""Times as many rows as are enough at first are kept of each Part's text, at most."""
_CLEARLY = 3.0
"""Standard errors. Rows of running text hang together, so this is no promised rate of false alarms."""
