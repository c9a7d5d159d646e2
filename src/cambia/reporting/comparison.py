"""Runs side by side: at equal tokens, at equal operations, at equal parameters, and around growth.

    >>> comparison = compare([load_run("arbor_growth"), load_run("arbor_fixed_large")])
    >>> comparison.rows[0].at_equal_flops
    1.913

A loss in the middle of a run whose learning rate has not come down yet is higher than that of a run that
is over, whatever the models; such a figure is marked, and should not be compared with one that is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cambia import files
from cambia.errors import RunError
from cambia.models.saved import STATE_JSON
from cambia.reporting.run import Run, load_run
from cambia.rundir import RunReader, runs_root

_DECAYED = 0.5
"""A learning rate below this share of the run's highest has come down."""


@dataclass(frozen=True)
class Reading:
    """A run's validation loss at one place."""

    bits_per_byte: float
    """nan where the run was not measured that early."""
    decayed: bool
    """Whether the learning rate had come down there."""


@dataclass(frozen=True)
class Stability:
    """What one growth did to the steps around it."""

    step: int
    jump: float | None
    """Loss on the check batch after minus before, nats per token."""
    loss_change: float
    """Mean training loss of the `WINDOW` steps after minus that of those before, nats per token."""
    norm_ratio: float
    """Largest gradient norm of those after, as a multiple of the median before."""


WINDOW = 30


@dataclass(frozen=True, eq=False)
class Row:
    """One run in a comparison."""

    run: Run
    parameters: int
    tokens: int
    flops: float
    end: Reading
    at_equal_tokens: Reading
    at_equal_flops: Reading
    by_parameters: dict[int, tuple[Reading, int]]
    """For each size that the run had: its last reading at that size, and the tokens spent until then."""
    stability: tuple[Stability, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several runs, and up to where they compare."""

    rows: tuple[Row, ...]
    tokens: int
    """The tokens of the shortest run."""
    flops: float
    """The operations of the cheapest run."""

    @property
    def sizes(self) -> list[int]:
        """Sizes that at least two of the runs had."""
        every = [size for row in self.rows for size in row.by_parameters]
        return sorted({size for size in every if every.count(size) > 1})


def load_for_comparison(name: str | Path) -> Run:
    """A run, or as much of one as was done at one of its checkpoints: "RUN" or "RUN/ckpt_step200".

    Raises:
        RunError: there is no such run or checkpoint.
    """
    path = Path(name)
    is_checkpoint = any((root / path / STATE_JSON).is_file() for root in (Path(), runs_root()))
    if not is_checkpoint:
        try:
            return load_run(name)
        except RunError:
            if len(path.parts) < 2:
                raise
    run = load_run(path.parent)
    state = run.folder / path.name / STATE_JSON
    if not state.is_file():
        saved = ", ".join(folder.name for folder in RunReader(run.folder).checkpoints()) or "none"
        raise RunError(f"the run {run.name!r} has no checkpoint {path.name!r}; it has {saved}")
    step = files.read_json(state)["progress"]["step"]
    rows = int(np.searchsorted(run.metrics["step"], step, side="right"))
    return dataclasses.replace(
        run,
        name=f"{run.name}/{path.name}",
        summary={},
        metrics={column: values[:rows] for column, values in run.metrics.items()},
        growth=tuple(event for event in run.growth if event.step <= step),
        scores=tuple(row for row in run.scores if row["step"] <= step),
    )


def compare(runs: Sequence[Run]) -> Comparison:
    """Read runs side by side.

    Raises:
        RunError: fewer than two, or one of them has no validation loss.
    """
    if len(runs) < 2:
        raise RunError("a comparison needs at least two runs: cambia compare RUN RUN")
    for run in runs:
        if not np.isfinite(run.metrics["validation_bits_per_byte"]).any():
            raise RunError(f"the run {run.name!r} measured no validation loss: set --evaluation.every_steps")
    tokens = min(int(run.metrics["tokens"][-1]) for run in runs)
    flops = min(float(run.metrics["flops"][-1]) for run in runs)
    return Comparison(tuple(_row(run, tokens, flops) for run in runs), tokens, flops)


def _row(run: Run, tokens: int, flops: float) -> Row:
    metrics = run.metrics
    sizes: dict[int, tuple[Reading, int]] = {}
    for size in dict.fromkeys(metrics["parameters"].tolist()):
        last = int(np.flatnonzero(metrics["parameters"] == size)[-1])
        sizes[int(size)] = (_reading(run, "step", metrics["step"][last]), int(metrics["tokens"][last]))
    return Row(
        run=run,
        parameters=int(metrics["parameters"][-1]),
        tokens=int(metrics["tokens"][-1]),
        flops=float(metrics["flops"][-1]),
        end=_reading(run, "step", metrics["step"][-1]),
        at_equal_tokens=_reading(run, "tokens", tokens),
        at_equal_flops=_reading(run, "flops", flops),
        by_parameters=sizes,
        stability=_stability(run),
    )


def _reading(run: Run, axis: str, place: float) -> Reading:
    """The validation loss at a place of an axis, on a straight line between the measurements around it."""
    along, bits = run.metrics[axis], run.metrics["validation_bits_per_byte"]
    known = np.isfinite(bits)
    x, y = along[known].astype(float), bits[known]
    value = math.nan if place < x[0] else float(np.interp(place, x, y))
    rate = run.metrics["learning_rate"]
    here = rate[min(int(np.searchsorted(along, place)), len(rate) - 1)]
    return Reading(value, bool(here < _DECAYED * np.nanmax(rate)))


def _stability(run: Run) -> tuple[Stability, ...]:
    step, loss, norm = run.metrics["step"], run.metrics["loss"], run.metrics["grad_norm"]
    found = []
    for event in run.growth:
        before = (step > event.step - WINDOW) & (step <= event.step)
        after = (step > event.step) & (step <= event.step + WINDOW)
        jump = None
        if event.loss_before is not None and event.loss_after is not None:
            jump = event.loss_after - event.loss_before
        found.append(
            Stability(
                step=event.step,
                jump=jump,
                loss_change=_of(np.mean, loss[after]) - _of(np.mean, loss[before]),
                norm_ratio=_of(np.max, norm[after]) / _of(np.median, norm[before]),
            )
        )
    return tuple(found)


def _of(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(function(kept)) if len(kept) else math.nan
