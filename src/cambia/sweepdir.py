"""The sweep directory: what a grid of runs leaves behind, and how several launchers share it.

Sweeps write it, reports read it, and no other file knows the names in it.

    runs/NAME/
      grid.yaml             the grid as it was asked for; it runs again
      grid_cells.json       every cell: name, hash, choice on each axis
      grid_results.jsonl    a line per result, only ever appended; the last line of a cell counts
      grid_results.csv      the same as a table, a row per cell
      grid_progress.json    a snapshot: total, done, skipped, failed, elapsed, current
      report.html           written by `cambia report NAME`
      CELL/                 the run directory of a cell
      errors/CELL.txt       why a cell failed, in full
      logs/                 what workers printed

A result belongs to a configuration, by its hash, and not to whoever computed it. Whoever works on a cell
holds its claim, which the system takes back when that process dies, however it dies; results are appended
under one lock, and a configuration that has finished gets no second result. So launchers and workers may be
killed at any time and started again, several at once.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import fcntl
import io
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cambia import files, rundir
from cambia.errors import CheckpointError, RunError

GRID, CELLS = "grid.yaml", rundir.CELLS
RESULTS, TABLE, PROGRESS = "grid_results.jsonl", "grid_results.csv", "grid_progress.json"
ERRORS, LOGS = "errors", "logs"
_LOCK, _CLAIMS = ".results.lock", ".claims"

Status = Literal["finished", "failed"]


@dataclass(frozen=True)
class CellRecord:
    """A cell of a grid, as reports know it."""

    name: str
    """Of its run directory inside the sweep's."""
    hash: str
    """Of its configuration."""
    choice: Mapping[str, Any]
    """Axis -> value, or the name of the group; `seed` is an axis."""


@dataclass(frozen=True)
class Result:
    """What became of a cell."""

    cell: str
    hash: str
    choice: Mapping[str, Any]
    status: Status
    results: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers of the run, equal for equal configurations, None where one is not finite; empty where it
    failed."""
    error: str | None = None
    """In one line, where it failed."""
    seconds: float = 0.0
    """Wall time of the run, all its sessions together."""
    attempts: int = 1
    """Workers that tried."""
    finished: str = ""
    """When, UTC, ISO 8601."""


def is_settled(result: Result | None, retry: bool) -> bool:
    """Whether a cell need not be run: it has finished, or has failed and nobody asks for another try."""
    return result is not None and (result.status == "finished" or not retry)


def sweep_folder(name: str) -> Path:
    """The folder of the sweep of that name, which need not exist; sweeps live beside runs."""
    return rundir.run_folder(name)


def is_sweep(name: str | Path) -> bool:
    """Whether a name under `cambia.rundir.runs_root`, or a path, is a sweep's."""
    return _found(name) is not None


def find_sweep(name: str | Path) -> Path:
    """The folder of a sweep, by its name under `cambia.rundir.runs_root` or by its path.

    Raises:
        RunError: there is none.
    """
    folder = _found(name)
    if folder is not None:
        return folder
    near = nearest_sweep(str(name))
    hint = f"did you mean {near!r}?" if near else "`cambia sweep GRID.yaml` makes one"
    raise RunError(f"there is no sweep {str(name)!r} under {rundir.runs_root()}; {hint}")


def _found(name: str | Path) -> Path | None:
    return next((folder for folder in rundir.places(name) if (folder / CELLS).is_file()), None)


def nearest_sweep(name: str) -> str | None:
    """The name under `cambia.rundir.runs_root` that is spelled most like it, if any is."""
    known = [folder.name for folder in list_sweeps()]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def list_sweeps() -> list[Path]:
    """Every sweep's folder under `cambia.rundir.runs_root`, by name."""
    root = rundir.runs_root()
    return sorted(path.parent for path in root.glob(f"*/{CELLS}"))


class SweepReader:
    """Reads a sweep directory, also while the sweep is going."""

    def __init__(self, name: str | Path):
        self.folder = find_sweep(name)
        self.name = self.folder.resolve().name

    def grid(self) -> str:
        """The text of grid.yaml."""
        return (self.folder / GRID).read_text(encoding="utf-8")

    def cells(self) -> list[CellRecord]:
        """Every cell of the grid as it was last asked for."""
        return _read_cells(self.folder)

    def results(self) -> dict[str, Result]:
        """Hash of a configuration -> its result, the last one that was written."""
        path = self.folder / RESULTS
        return {result.hash: result for result in _parsed(path.read_bytes() if path.exists() else b"")}

    def progress(self) -> dict[str, Any] | None:
        path = self.folder / PROGRESS
        return files.read_json(path) if path.exists() else None

    def is_going(self) -> bool:
        """Whether a process works on one of its cells right now."""
        claims = [Claim.taken(path) for path in (self.folder / _CLAIMS).glob("*")]
        for claim in claims:
            if claim is not None:
                claim.release()
        return None in claims


class SweepWriter:
    """Writes a sweep directory, beside other processes that do the same.

    Raises:
        RunError: the folder is a run's.
        StorageFullError, OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if (self.folder / rundir.CONFIG_JSON).exists():
            raise RunError(f"{self.folder} is a run and no sweep: choose another --name")
        with files.one_line_when_full(self.folder):
            for inner in (_CLAIMS, ERRORS, LOGS):
                (self.folder / inner).mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Result] = {}
        self._read_to = 0

    def write_grid(self, yaml_text: str, cells: Iterable[CellRecord] | None) -> None:
        """Say what the sweep consists of; results of other cells stay and are not shown.

        Args:
            yaml_text: of the grid.
            cells: of the grid; None where a search adds them one by one.
        """
        with self._locked():
            files.write_text(self.folder / GRID, yaml_text)
            if cells is not None or not (self.folder / CELLS).exists():
                self._write_cells(cells or ())

    def cells(self) -> list[CellRecord]:
        """Every cell of the grid so far."""
        return _read_cells(self.folder)

    def add_cells(self, cells: Iterable[CellRecord]) -> None:
        """Add cells that a search has thought of."""
        with self._locked():
            self._write_cells({cell.hash: cell for cell in [*self.cells(), *cells]}.values())

    def claim(self, hash: str) -> Claim | None:
        """The right to work on a configuration; None while another process has it."""
        return Claim.taken(self.folder / _CLAIMS / hash)

    def results(self) -> Mapping[str, Result]:
        """Hash of a configuration -> its result so far, those of other launchers too."""
        with self._locked():
            self._read()
        return self._known

    def record(self, result: Result) -> bool:
        """Append a result, unless its configuration has finished already; says whether it was appended."""
        with self._locked():
            self._read()
            known = self._known.get(result.hash)
            if known is not None and known.status == "finished":
                return False
            with files.one_line_when_full(self.folder / RESULTS), open(self.folder / RESULTS, "ab") as log:
                log.truncate(self._read_to)  # the beginning of a line whose writer was killed
                log.write(json.dumps(asdict(result), allow_nan=False).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
            self._read()
        return True

    def write_table(self, cells: Sequence[CellRecord]) -> None:
        """Write grid_results.csv: a row per cell that has a result, in the order of the grid."""
        known = self.results()
        done = [known[cell.hash] for cell in cells if cell.hash in known]
        axes = list(dict.fromkeys(axis for result in done for axis in result.choice))
        names = list(dict.fromkeys(name for result in done for name in result.results))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["cell", "hash", "status", *axes, *names, "seconds", "attempts", "error"])
        for result in done:
            chosen = [_cell(result.choice.get(axis)) for axis in axes]
            numbers = [_cell(result.results.get(name)) for name in names]
            last = [_cell(result.seconds), result.attempts, result.error or ""]
            writer.writerow([result.cell, result.hash, result.status, *chosen, *numbers, *last])
        files.write_text(self.folder / TABLE, text.getvalue())

    def write_progress(self, snapshot: Mapping[str, Any]) -> None:
        """Replace grid_progress.json in one step."""
        files.write_json(self.folder / PROGRESS, snapshot)

    def write_error(self, cell: str, text: str) -> None:
        files.write_text(self.folder / ERRORS / f"{cell}.txt", text)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        with open(self.folder / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write_cells(self, cells: Iterable[CellRecord]) -> None:
        # The order of the axes is the grid's: no sorted keys here.
        text = json.dumps([asdict(cell) for cell in cells], indent=1, allow_nan=False)
        files.write_text(self.folder / CELLS, text + "\n")

    def _read(self) -> None:
        """Take in the whole lines that were appended since the last time."""
        path = self.folder / RESULTS
        if not path.exists():
            return
        with open(path, "rb") as log:
            if log.seek(0, os.SEEK_END) < self._read_to:  # somebody has taken lines out
                self._known, self._read_to = {}, 0
            log.seek(self._read_to)
            new = log.read()
        self._known |= {result.hash: result for result in _parsed(new)}
        self._read_to += new.rfind(b"\n") + 1


class Claim:
    """A lock on one configuration, held until `release` or the end of the process."""

    def __init__(self, file: io.TextIOWrapper):
        self._file = file

    @classmethod
    def taken(cls, path: Path) -> Claim | None:
        """Take it, or None where somebody has it."""
        file = open(path, "w")  # noqa: SIM115 (held until `release`)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(file)

    def release(self) -> None:
        self._file.close()


def _read_cells(folder: Path) -> list[CellRecord]:
    try:
        return [CellRecord(**cell) for cell in files.read_json(folder / CELLS)]
    except TypeError as error:
        raise CheckpointError(
            f"{folder / CELLS} does not list cells; it was altered or is of another version ({error})"
        ) from None


def _parsed(content: bytes) -> Iterator[Result]:
    """The results in whole lines. A line that is damaged is none: its cell will get another one."""
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError, TypeError):  # no JSON, or not the fields of a result
            yield Result(**json.loads(line))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
