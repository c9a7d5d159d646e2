"""A sweep read back: its cells with what became of them, as tables over its axes.

Everything comes from the sweep directory, so a sweep that is still going can be read as well. Only cells of
the grid as it was last asked for are shown; results of earlier grids are counted.

    >>> sweep = load_sweep("learning_rates")
    >>> sweep.table("test_bits_per_byte").rows[0].values
    (2.31, 2.29, 2.30)
    >>> sweep.paired("test_bits_per_byte", "rate").rows[0].p_holm
    0.0254
"""

from __future__ import annotations

import shlex
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cambia import rundir
from cambia.config import did_you_mean
from cambia.errors import ConfigError, RunError
from cambia.reporting.run import Run, handle_of, load_run
from cambia.reporting.sweeps.cells import (
    Cell,
    Paired,
    Row,
    Status,
    Table,
    direction,
    grouped,
    key,
    label,
    left,
    paired_rows,
    values,
)
from cambia.sweepdir import GRID, Result, SweepReader, is_sweep, nearest_sweep

SEED = "seed"
"""The axis whose values are repetitions of the same."""
MAIN_METRICS = ("test_bits_per_byte", "validation_bits_per_byte")
"""What a sweep is about, where it was measured: the first of these."""
_FIRST: Any = object()  # stands for an axis's first value; None may be a value


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep directory's content; read-only."""

    name: str
    folder: Path
    grid: str
    """The text of grid.yaml; empty where it is missing."""
    axes: Mapping[str, tuple[Any, ...]]
    """Axis -> the values that occur, in the order of the grid; `seed` is an axis."""
    cells: tuple[Cell, ...]
    """Of the grid as it was last asked for."""
    earlier: int
    """Results of cells that only earlier grids had."""
    progress: Mapping[str, Any] | None
    """grid_progress.json as it was last written, None where it was not."""

    @classmethod
    def of(cls, name: str, cells: Sequence[Cell], **more: Any) -> Sweep:
        """A sweep of these cells, wherever they are from; `more` are its other fields."""
        found: dict[str, dict[Hashable, Any]] = {axis: {} for cell in cells for axis in cell.choice}
        for cell in cells:
            for axis, known in found.items():  # a cell that says nothing of an axis has none there
                known.setdefault(key(cell.choice.get(axis)), cell.choice.get(axis))
        axes = {axis: tuple(values.values()) for axis, values in found.items()}
        fields = {"folder": Path(name), "grid": "", "earlier": 0, "progress": None, **more}
        return cls(name=name, axes=axes, cells=tuple(cells), **fields)

    @property
    def results(self) -> tuple[Result, ...]:
        """What there is of the grid's cells, in its order."""
        return tuple(cell.result for cell in self.cells if cell.result is not None)

    def having(self, status: Status) -> tuple[Cell, ...]:
        """The cells that finished, failed, or are missing."""
        return tuple(cell for cell in self.cells if cell.status == status)

    @property
    def varied(self) -> list[str]:
        """Axes other than `seed` with more than one value."""
        return [axis for axis, values in self.axes.items() if axis != SEED and len(values) > 1]

    @property
    def metrics(self) -> list[str]:
        """Metrics for which some cell has a number."""
        every = dict.fromkeys(name for result in self.results for name in result.results)
        return [name for name in every if any(cell.value(name) is not None for cell in self.cells)]

    @property
    def main_metric(self) -> str | None:
        """Bits per byte on test or validation text where measured, else the first; None without results."""
        known = self.metrics
        return next((name for name in (*MAIN_METRICS, *known) if name in known), None)

    @property
    def report(self) -> Path:
        """Where report.html is, or will be."""
        return self.folder / rundir.REPORT

    @property
    def handle(self) -> str:
        """What to call the sweep on the command line."""
        return handle_of(self.name, self.folder)

    @property
    def command(self) -> str:
        """The command that runs what is missing."""
        return f"cambia sweep {shlex.quote(str(self.folder / GRID))}"

    def baseline(self, words: str | None = None) -> tuple[str, Any] | None:
        """An axis and one of its values, to compare the others with.

        Args:
            words: ``"AXIS=VALUE"`` as on the command line. By default the first axis that varies, and its
                first value; None is returned where only the seed varies.

        Raises:
            ConfigError: there is no such axis or value.
        """
        if words is None:
            return next(((axis, self.axes[axis][0]) for axis in self.varied), None)
        axis, equals, said = words.partition("=")
        if not equals:
            raise ConfigError(f"--baseline {words!r}: expected AXIS=VALUE; axes are {', '.join(self.axes)}")
        axis = self._axis(axis)
        known = self.axes[axis]
        for value in known:
            if said in (label(value), str(value)):
                return axis, value
        raise ConfigError(
            f"--baseline {words}: {axis} has no value {said!r}{did_you_mean(said, map(label, known))}"
        )

    def metric(self, name: str | None) -> str:
        """A metric that exists: the one of that name, the main one for None.

        Raises:
            RunError: no cell has any.
            ConfigError: no cell has this one; the message names the nearest.
        """
        if self.main_metric is None:
            failed, missing = len(self.having("failed")), len(self.having("missing"))
            raise RunError(
                f"the sweep {self.name!r} has no results to read yet: of {len(self.cells)} cells "
                f"{failed} failed and {missing} are missing"
            )
        if name is None:
            return self.main_metric
        if name not in self.metrics:
            hint = did_you_mean(name, self.metrics)
            raise ConfigError(f"--metric {name!r} is no metric of the sweep {self.name!r}{hint}")
        return name

    def table(self, metric: str | None = None, *, over: Iterable[str] = ()) -> Table:
        """Mean, spread and number of values for each combination of axes.

        Args:
            metric: the main one by default.
            over: axes to average over, beside `seed`.

        Raises:
            ConfigError, RunError: there is no such metric or axis, or no results.
        """
        metric = self.metric(metric)
        together = [self._axis(axis) for axis in over]
        axes = tuple(axis for axis in self.axes if axis not in (SEED, *together))
        groups = grouped(self.cells, axes)
        rows = [
            Row(
                {axis: cells[0].choice.get(axis) for axis in axes}, values(cells, metric), left(cells, metric)
            )
            for cells in groups.values()
        ]
        rest = tuple(axis for axis in self.axes if axis not in axes)
        return Table(metric, axes, rest, tuple(rows), left(self.cells, metric))

    def paired(self, metric: str | None, axis: str, baseline: Any = _FIRST) -> Paired:
        """How the values of an axis differ from one of them, where all else, the seed too, is equal.

        Args:
            metric: the main one for None.
            axis: any but `seed`.
            baseline: one of its values; the first by default.

        Raises:
            ConfigError, RunError: there is no such metric, axis or value, or no results.
        """
        metric, axis = self.metric(metric), self._axis(axis)
        known = self.axes[axis]
        if axis == SEED:
            raise ConfigError(f"no baseline among values of {SEED}: pairs agree on it; name another axis")
        if baseline is _FIRST:
            baseline = known[0]
        if key(baseline) not in map(key, known):
            listed = ", ".join(map(label, known))
            raise ConfigError(f"baseline {label(baseline)!r}: no such value; {axis} has {listed}")
        rest = tuple(name for name in self.axes if name != axis)
        by_value = grouped(self.cells, (axis,))
        reference = by_value[key(baseline),]
        others = [(value, by_value[key(value),], reference) for value in known if key(value) != key(baseline)]
        return Paired(metric, axis, baseline, rest, paired_rows(others, metric, rest))

    def ranked(self, metric: str | None = None) -> list[Cell]:
        """The cells that have the metric, best first; lowest first where neither end is better."""
        name = self.metric(metric)
        measured = [(value, cell) for cell in self.cells if (value := cell.value(name)) is not None]
        return [
            cell
            for _, cell in sorted(measured, key=lambda pair: pair[0], reverse=direction(name) == "higher")
        ]

    def best(self, metric: str | None = None) -> Cell:
        """The first of `ranked`."""
        return self.ranked(metric)[0]

    def worst(self, metric: str | None = None) -> Cell:
        """The last of `ranked`."""
        return self.ranked(metric)[-1]

    def short(self, axis: str) -> str:
        """The last part of an axis's dotted name, where no other axis ends alike."""
        last = axis.rpartition(".")[2]
        return last if sum(name.rpartition(".")[2] == last for name in self.axes) == 1 else axis

    def _axis(self, name: str) -> str:
        found = next((axis for axis in self.axes if name in (axis, self.short(axis))), None)
        if found is None:
            raise ConfigError(
                f"{name!r} is no axis of the sweep {self.name!r}{did_you_mean(name, self.axes)}"
            )
        return found


def load_sweep(name: str | Path) -> Sweep:
    """Read a sweep, finished or not.

    Args:
        name: of a sweep under `cambia.rundir.runs_root`, or its folder.

    Raises:
        RunError: there is no such sweep; the message names the nearest.
        CheckpointError: a file in it is broken.
    """
    reader = SweepReader(name)
    results = reader.results()
    cells = tuple(Cell(cell.name, cell.hash, cell.choice, results.get(cell.hash)) for cell in reader.cells())
    return Sweep.of(
        reader.name,
        cells,
        folder=reader.folder,
        grid=reader.grid() if (reader.folder / GRID).exists() else "",
        earlier=len(results.keys() - {cell.hash for cell in cells}),
        progress=reader.progress(),
    )


def load(name: str | Path) -> Run | Sweep:
    """Read a run or a sweep, whichever has that name.

    Raises:
        RunError: there is neither; the message names the nearest.
    """
    if is_sweep(name):
        return load_sweep(name)
    try:
        return load_run(name)
    except RunError:
        near = nearest_sweep(str(name))
        if near is None:
            raise
        raise RunError(f"there is no run {str(name)!r}; did you mean the sweep {near!r}?") from None
