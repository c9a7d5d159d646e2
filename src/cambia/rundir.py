"""The run directory: the border between what trains and what reads.

Training writes a run through `RunWriter`; report, compare, sweep and everything else read it through
`RunReader`. No other file knows the names in it.

    runs/NAME/
      config.yaml config.json    the complete configuration; config.yaml runs again
      metrics.csv                a row per logged step        } equal, byte for byte, for equal runs,
      eval.csv growth.jsonl      task matrix; growth events   } interrupted or not
      decayed.csv                scores as if the run had ended earlier
      stream.jsonl               whose the rows of the stream were, and what was decided about them
      promises.jsonl probes/     what a method promised not to change, task by task; for `verify`
      timing.csv                 clocks, throughput, memory: what may differ between equal runs
      summary.json report.html   at the end
      latest/ best/ ckpt_step{n}/ ckpt_task{k}/    checkpoints

A run that is killed may have logged rows after its last checkpoint. Each checkpoint therefore keeps
the length of every log, and a resumed run first cuts the logs back to it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cambia import files
from cambia.errors import CheckpointError, ConfigError, RunError

CONFIG_YAML, CONFIG_JSON = "config.yaml", "config.json"
METRICS, TIMING, EVAL, GROWTH = "metrics.csv", "timing.csv", "eval.csv", "growth.jsonl"
STREAM, DECODING = "stream.jsonl", "decoding.jsonl"
DECAYED = "decayed.csv"
PROMISES, PROBES = "promises.jsonl", "probes"
SUMMARY, REPORT = "summary.json", "report.html"
LATEST, BEST = "latest", "best"
CELLS = "grid_cells.json"
"""In the folder of a sweep, which is no run's (`cambia.sweepdir`)."""
LOGS = (METRICS, EVAL, DECAYED, GROWTH, STREAM, DECODING, PROMISES, TIMING)
_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def runs_root() -> Path:
    """Where runs live: `$CAMBIA_RUNS`, else ``runs/`` in the current folder."""
    return Path(os.environ.get("CAMBIA_RUNS", "runs"))


def run_folder(name: str) -> Path:
    """The folder of the run of that name, which need not exist.

    Raises:
        ConfigError: the name cannot be a folder's name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r} cannot name a run: use letters, digits, '.', '_' and '-'")
    return runs_root() / name


def places(name: str | Path) -> tuple[Path, Path]:
    """Where a run or a sweep of that name may be, the likelier place first.

    A bare word is a name under `runs_root`, before it is a folder that lies here.
    """
    here, there = Path(name), runs_root() / name
    return (there, here) if isinstance(name, str) and "/" not in name else (here, there)


def _is_run(folder: Path) -> bool:
    # A model's folder has a config.json too.
    return (folder / CONFIG_JSON).is_file() and (folder / CONFIG_YAML).is_file()


def free_folder(name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3... that is no run and no sweep yet."""
    number = 1
    folder = run_folder(name)
    while (folder / CONFIG_JSON).exists() or (folder / CELLS).exists():
        number += 1
        folder = run_folder(f"{name}-{number}")
    return folder


def find_run(name: str | Path) -> Path:
    """The folder of a run, by its name under `runs_root` or by its path.

    Raises:
        RunError: there is none; the message names the nearest.
    """
    for folder in places(name):
        if _is_run(folder):
            return folder
    known = [path.name for path in list_runs()]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`cambia runs list` shows the runs there are"
    raise RunError(f"there is no run {str(name)!r} under {runs_root()}; {hint}")


def list_runs() -> list[Path]:
    """Every run's folder under `runs_root`, newest last."""
    root = runs_root()
    found = [path for path in root.iterdir() if _is_run(path)] if root.is_dir() else []
    return sorted(found, key=lambda path: ((path / CONFIG_JSON).stat().st_mtime, path.name))


def checkpoint_step_name(step: int) -> str:
    """Folder of the checkpoint at an optimizer step."""
    return f"ckpt_step{step}"


def checkpoint_task_name(stage: int) -> str:
    """Folder of the checkpoint at the end of a task, counted from 0."""
    return f"ckpt_task{stage}"


class RunWriter:
    """Owns a run directory while a run is going; a second owner is refused.

    Args:
        folder: the run directory.
        resume: go on in an existing one. Otherwise a taken name is refused.

    Raises:
        RunError: the name is taken, or another process is writing the run.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False):
        self.folder = Path(folder)
        if (self.folder / CELLS).exists():
            raise RunError(f"{self.folder} is a sweep: choose another --name")
        taken = (self.folder / CONFIG_JSON).exists()
        if taken and not resume:
            raise RunError(
                f"the run {self.folder.name!r} exists already in {self.folder.parent}: go on with "
                f"--resume {self.folder.name}, choose another --name, or `cambia runs delete`"
            )
        if not taken and (self.folder / LATEST).exists():
            raise RunError(
                f"{self.folder} holds a checkpoint but no {CONFIG_JSON}, so it can neither begin nor go on: "
                "put the file back, move the folder away, or choose another --name"
            )
        with files.one_line_when_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "w")  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunError(
                f"the run {self.folder.name!r} is still going in another process: wait for it or stop it "
                "(Ctrl-C there finishes the step and saves), then --resume"
            ) from None
        self._logs: dict[str, io.TextIOWrapper] = {}

    def close(self) -> None:
        # Closing a log writes what is left of it, and everything is closed even where the disk is full.
        with files.one_line_when_full(self.folder), contextlib.ExitStack() as everything:
            everything.callback(self._lock.close)
            for log in self._logs.values():
                everything.callback(log.close)
            self._logs = {}
            if not (self.folder / CONFIG_JSON).exists():
                # It ended before it began, over bad input for example: leave no folder behind.
                (self.folder / _LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def write_config(self, tree: Mapping[str, Any], yaml_text: str) -> None:
        files.write_text(self.folder / CONFIG_YAML, yaml_text)
        files.write_json(self.folder / CONFIG_JSON, tree)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        files.write_json(self.folder / SUMMARY, summary)

    def append_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a CSV log; the first row's keys are the header of the whole file."""
        log = self._log(name)
        with files.one_line_when_full(self.folder / name):
            writer = csv.writer(log, lineterminator="\n")
            if log.tell() == 0:
                writer.writerow(row.keys())
            writer.writerow([_plain(value) for value in row.values()])
            log.flush()

    def append_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Append one line of JSON."""
        with files.one_line_when_full(self.folder / name):
            log = self._log(name)
            log.write(json.dumps(value, sort_keys=True) + "\n")
            log.flush()

    def _log(self, name: str) -> io.TextIOWrapper:
        if name not in self._logs:
            self._logs[name] = open(self.folder / name, "a", encoding="utf-8", newline="")  # noqa: SIM115
        return self._logs[name]

    def log_lengths(self) -> dict[str, int]:
        """Bytes in each log, all of it flushed to the disk: what a checkpoint keeps."""
        lengths = {}
        for name in LOGS:
            if name in self._logs:
                os.fsync(self._logs[name].fileno())
            path = self.folder / name
            lengths[name] = path.stat().st_size if path.exists() else 0
        return lengths

    def cut_logs(self, lengths: Mapping[str, int]) -> None:
        """Drop every row that was logged after the checkpoint that kept `lengths`."""
        for name, length in lengths.items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise RunError(
                    f"{path} has {size} bytes and had {length} when the checkpoint was written: without its "
                    "log the run cannot be resumed, start it again under another --name"
                )
            if size > length:
                os.truncate(path, length)

    def checkpoint(self, name: str) -> Path:
        return self.folder / name

    def probe(self, stage: int) -> Path:
        """Where the probes of a stage are kept."""
        return self.folder / PROBES / f"stage{stage}.safetensors"

    def keep_only(self, count: int) -> None:
        """Delete the oldest ``ckpt_step*`` beyond the newest `count`."""
        found = _numbered(self.folder, "ckpt_step")
        for path in found[: max(0, len(found) - count)]:
            shutil.rmtree(path)

    def recover(self) -> None:
        """Put right what a crash during a checkpoint left behind."""
        # A checkpoint that was being replaced is there under its hidden name alone.
        hidden = {path.name[1:].partition(".")[0] for path in self.folder.glob(".ckpt_*")}
        for name in {*hidden, LATEST, BEST, *(path.name for path in self.folder.glob("ckpt_*"))}:
            files.recover(self.folder / name)


def _plain(value: Any) -> Any:
    # repr keeps every bit of a float and reads back as the same number.
    return repr(float(value)) if isinstance(value, float) else ("" if value is None else value)


class RunReader:
    """Reads a run directory, also while the run is still going."""

    def __init__(self, folder: str | Path):
        self.folder = find_run(folder)
        self.name = self.folder.resolve().name

    def config(self) -> dict[str, Any]:
        return _mapping(self.folder / CONFIG_JSON)

    def summary(self) -> dict[str, Any] | None:
        path = self.folder / SUMMARY
        return _mapping(path) if path.exists() else None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A CSV log's rows; numbers as numbers, empty cells as None. A row cut short is left out."""
        table = csv.DictReader(io.StringIO(_complete_lines(self.folder / name)))
        return [{key: _parse(cell) for key, cell in row.items()} for row in table]

    def growth(self) -> list[dict[str, Any]]:
        return self._lines(GROWTH)

    def stream(self) -> list[dict[str, Any]]:
        """Of a run with Parts: whose the rows of each logged batch were, and what was decided."""
        return self._lines(STREAM)

    def decoding(self) -> list[dict[str, Any]]:
        """Of a run whose decoding learns: a line for each of its steps."""
        return self._lines(DECODING)

    def promises(self) -> list[dict[str, Any]]:
        """A line for each stage that ended: which tensors were promised, with their hashes."""
        return self._lines(PROMISES)

    def probes(self) -> list[Path]:
        """The files of probes, one for each stage that ended, in order."""
        return _numbered(self.folder / PROBES, "stage", ".safetensors")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in _complete_lines(self.folder / name).splitlines()]
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{self.folder / name} was altered: a line is no JSON ({error})") from None

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders: latest first, then best, tasks and steps."""
        named = [self.folder / LATEST, self.folder / BEST]
        numbered = sorted(self.folder.glob("ckpt_*"), key=_checkpoint_order)
        return [path for path in [*named, *numbered] if (path / files.MANIFEST).exists()]

    def is_going(self) -> bool:
        """Whether a process is writing this run right now."""
        if not (self.folder / _LOCK).exists():
            return False
        with open(self.folder / _LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _mapping(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} was altered: expected names with values, got {found!r:.40}")
    return found


def _numbered(folder: Path, before: str, after: str = "") -> list[Path]:
    """What is named so with a number between, by that number; a copy that somebody put there is not."""
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _complete_lines(path: Path) -> str:
    """The text of a log without a last line that was cut short, perhaps inside a character."""
    if not path.exists():
        return ""
    content = path.read_bytes()
    try:
        return content[: content.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} was altered: it is no text ({error})") from None


def _checkpoint_order(path: Path) -> tuple[str, int]:
    kind = path.name.rstrip("0123456789")
    return kind, int(path.name[len(kind) :] or 0)


def _parse(cell: str | None) -> int | float | str | None:
    if cell in ("", None):
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def columns(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Any]]:
    """The named columns of rows, each as a list: what a plot wants."""
    return [[row.get(name) for row in rows] for name in names]
