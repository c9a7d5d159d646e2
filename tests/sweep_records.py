"""Synthetic sweeps, written through `SweepWriter` as launchers write them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cambia.sweepdir import CellRecord, Result, SweepWriter

Choice = Mapping[str, Any]
Outcome = Mapping[str, float | None] | str | None
"""Metrics of a cell that finished, the error of one that failed, None for one that is missing."""


def cell(choice: Choice, name: str | None = None) -> CellRecord:
    """A cell whose hash depends on its choice alone."""
    text = json.dumps(choice, sort_keys=True)
    words = "-".join(f"{axis}{value}" for axis, value in choice.items()).replace("/", "_")
    return CellRecord(name or words[:80], hashlib.sha256(text.encode()).hexdigest()[:12], dict(choice))


def write_sweep(
    folder: Path,
    axes: Mapping[str, Sequence[Any]],
    outcome: Callable[[Choice], Outcome],
    *,
    progress: bool = True,
) -> SweepWriter:
    """A grid over axes, each cell with what `outcome` says of its choice."""
    choices = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return write_cells(
        folder, [(cell(choice), outcome(choice)) for choice in choices], axes, progress=progress
    )


def write_cells(
    folder: Path,
    cells: Sequence[tuple[CellRecord, Outcome]],
    axes: Mapping[str, Sequence[Any]],
    *,
    progress: bool = True,
) -> SweepWriter:
    """A sweep of these very cells."""
    writer = SweepWriter(folder)
    writer.write_grid(
        yaml.safe_dump({"base": "smoke", "grid": dict(axes)}, sort_keys=False), [c for c, _ in cells]
    )
    for record, what in cells:
        record_outcome(writer, record, what)
    if progress:
        done = sum(what is not None for _, what in cells)
        writer.write_progress(
            {
                "total": len(cells),
                "done": done,
                "skipped": 0,
                "failed": sum(isinstance(what, str) for _, what in cells),
                "elapsed": 61.5,
                "current": [record.name for record, what in cells if what is None][:1],
            }
        )
    return writer


def record_outcome(writer: SweepWriter, record: CellRecord, what: Outcome) -> None:
    """Append the result of a cell, if it has one."""
    if what is None:
        return
    failed = isinstance(what, str)
    writer.record(
        Result(
            cell=record.name,
            hash=record.hash,
            choice=record.choice,
            status="failed" if failed else "finished",
            results={} if isinstance(what, str) else what,
            error=what if isinstance(what, str) else None,
            seconds=12.5,
            finished="2026-11-21T10:00:00+00:00",
        )
    )
