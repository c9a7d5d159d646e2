"""Which cell comes next: from a list, or from a search that learns from the results so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cambia.config import did_you_mean
from cambia.errors import ConfigError
from cambia.sweepdir import CellRecord, Result, SweepWriter, is_settled
from cambia.sweeps.grid import Cell, Grid, make_cell
from cambia.sweeps.search import Running, Studies, said


class Supply(Protocol):
    """Where cells come from."""

    total: int
    """Cells in all, with those that have a result already."""

    refused: list[str]
    """Why values that a search thought of were no experiment."""

    def next(self) -> Cell | None:
        """A cell to run; None where there is none, now or ever."""
        ...

    def done(self, cell: Cell, result: Result) -> None:
        """A cell has a result, of which a search learns."""
        ...

    def records(self) -> Sequence[CellRecord]:
        """Every cell so far."""
        ...


class Listed:
    """The cells of a grid that have no result yet, in their order.

    Args:
        cells: of the grid.
        results: by hash.
        retry: take those that have failed, too.
    """

    def __init__(self, cells: Sequence[Cell], results: Mapping[str, Result], *, retry: bool):
        self.total = len(cells)
        self.refused: list[str] = []
        self._records = [cell.record for cell in cells]
        self._waiting = deque(cell for cell in cells if not is_settled(results.get(cell.hash), retry))

    def next(self) -> Cell | None:
        return self._waiting.popleft() if self._waiting else None

    def done(self, cell: Cell, result: Result) -> None:
        pass

    def records(self) -> Sequence[CellRecord]:
        return self._records


class Searched:
    """Cells that searches think of, one study for each combination of the axes.

    Args:
        grid: with a search.
        cells: of its axes and seeds; the values that are searched for are not in them yet.
        sweep: where results are, and where cells are listed.
        retry: take those that have failed, too.
    """

    def __init__(self, grid: Grid, cells: Sequence[Cell], sweep: SweepWriter, *, retry: bool):
        assert grid.search is not None
        self.grid, self.search, self.sweep, self.retry = grid, grid.search, sweep, retry
        self._choices: dict[str, list[Mapping[str, Any]]] = {}
        for cell in cells:
            self._choices.setdefault(said(cell.choice), []).append(cell.choice)
        self.total = self.search.trials * len(cells)
        self._studies = Studies(self.search, sweep.folder, list(self._choices))
        self._running: list[tuple[str, Running]] = []
        self.refused: list[str] = []
        """Why trials were no experiments."""
        self._waiting: deque[Cell] = deque()
        self._left = {name: max(0, self.search.trials - self._studies.begun(name)) for name in self._choices}
        for name in self._choices:
            for trial in self._studies.unfinished(name):
                self._begin(name, trial)

    def next(self) -> Cell | None:
        while not self._waiting and any(self._left.values()):
            # Arms take turns: the one with most left is behind.
            name = max(self._left, key=lambda name: self._left[name])
            self._left[name] -= 1
            self._begin(name, self._studies.ask(name))
        return self._waiting.popleft() if self._waiting else None

    def records(self) -> Sequence[CellRecord]:
        return self.sweep.cells()

    def done(self, cell: Cell, result: Result) -> None:
        for name, running in list(self._running):
            if cell.hash in running.waiting:
                self._take(name, running, result)

    def _begin(self, name: str, trial: Any) -> None:
        """Make a trial's cells; those whose configuration has a result already count at once."""
        values = self._studies.values(trial)
        try:
            cells = [make_cell(self.grid, choice, values) for choice in self._choices[name]]
        except ConfigError as error:  # values that are no experiment together: the search learns that
            self.refused.append(str(error))
            self._studies.tell(name, trial, [])
            return
        running = Running(trial, {cell.hash for cell in cells})
        self._running.append((name, running))
        self.sweep.add_cells([cell.record for cell in cells])
        results = self.sweep.results()
        for cell in cells:
            known = results.get(cell.hash)
            if known is not None and is_settled(known, self.retry):
                self._take(name, running, known)
            else:
                self._waiting.append(cell)

    def _take(self, name: str, running: Running, result: Result) -> None:
        metric = self.search.metric
        if result.status == "finished" and metric not in result.results:
            raise ConfigError(f"search.metric: {metric!r} is no result{did_you_mean(metric, result.results)}")
        running.waiting.discard(result.hash)
        value = result.results.get(metric)
        if value is not None:
            running.values.append(value)
        if not running.waiting:
            self._running.remove((name, running))
            self._studies.tell(name, running.trial, running.values)
