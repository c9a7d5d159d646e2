"""A folder that is watched: `cambia learn MODEL --watch FOLDER`. Each file that arrives is learned from.

    runs/NAME/
      watch.json          which model, which folder, which settings
      arrivals.jsonl      the files in the order in which they arrived, and those that were refused
      arrived/0001-...    a copy of each, so that the folder may be emptied meanwhile
      0001/ 0002/ ...     a run for each, which goes on from the experts of the one before
      newest              the latest finished one

A file has arrived when it stays the same from one look to the next. It is copied, then written down, and
then learned from; whatever is killed on the way is found again by the same command and goes on, bit by bit,
since each is a run like any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cambia import files, rundir
from cambia.data.textfiles import ROW_SUFFIXES, TEXT_SUFFIXES
from cambia.errors import ConfigError, DataError, RunError
from cambia.experiment.build import is_finished, train_in
from cambia.experiment.learn import learning
from cambia.rundir import RunReader

WATCH, ARRIVALS, ARRIVED, NEWEST = "watch.json", "arrivals.jsonl", "arrived", "newest"
_Look = dict[str, tuple[int, int]]
"""Size and time of the files of a folder, by name."""


@dataclass
class Watcher:
    """Learns from the files of a folder in the order in which they arrive.

    Args:
        model: see `learning`.
        inbox: the folder that is watched.
        home: where everything is kept.
        steps, flags: see `learning`.
        seconds: between two looks at the folder.
    """

    model: str
    inbox: Path
    home: Path
    steps: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 2.0
    say: Callable[[str], None] = print

    def watch(self, *, idle_seconds: float | None = None) -> bool:
        """Learn from what is there and from what arrives.

        Args:
            idle_seconds: stop when nothing has arrived for so long; by default never.

        Returns:
            False if it was interrupted.

        Raises:
            ConfigError, RunError: the folder is not there, or was begun with other settings, or is watched.
        """
        with self._alone():
            self._begin()
            before: _Look = {}
            idle = 0.0
            while True:
                if not self._learn_all():
                    return False
                now = self._look()
                ready = sorted((now[name][1], name) for name in now if now[name] == before.get(name))
                for _, name in ready:
                    self._take(name, now[name])
                before = now
                if ready:
                    idle = 0.0
                elif idle_seconds is not None and idle >= idle_seconds and not now:
                    return True
                else:
                    time.sleep(self.seconds)
                    idle += self.seconds

    # ---- where everything is kept ------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        if not self.inbox.is_dir():
            raise ConfigError(f"--watch {self.inbox}: there is no such folder")
        if (self.home / rundir.CONFIG_JSON).exists():
            raise RunError(f"{self.home} is a run already: choose another --name")
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.home} is being watched by another process: stop that first") from None
            yield

    def _begin(self) -> None:
        settings = {
            "model": self.model,
            "watched": str(self.inbox.resolve()),
            "steps": self.steps,
            "flags": json.loads(json.dumps(dict(self.flags))),
        }
        path = self.home / WATCH
        if not path.exists():
            files.write_json(path, settings)
        begun = files.read_json(path)
        other = [name for name in settings if begun.get(name) != settings[name]]
        if other:
            raise ConfigError(
                f"{self.home} was begun with {other[0]} {begun.get(other[0])!r}, not {settings[other[0]]!r}: "
                "give the same again, or another --name"
            )
        (self.home / ARRIVED).mkdir(exist_ok=True)

    def arrivals(self) -> list[dict[str, Any]]:
        """The files that have arrived, in order; `refused` says why one is not learned from."""
        path = self.home / ARRIVALS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found: dict[int, dict[str, Any]] = {}
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # else it was cut short
                told = json.loads(line)
                found[told["number"]] = found.get(told["number"], {}) | told
        return [found[number] for number in sorted(found)]

    def _write_down(self, line: Mapping[str, Any]) -> None:
        path = self.home / ARRIVALS
        whole = path.read_bytes() if path.exists() else b""
        with open(path, "r+b" if whole else "wb") as log:
            log.truncate(whole.rfind(b"\n") + 1)
            log.seek(0, os.SEEK_END)
            log.write(json.dumps(dict(line), sort_keys=True).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    # ---- what arrives ------------------------------------------------------------------------------

    def _look(self) -> _Look:
        """The files that were not taken yet."""
        taken = {(line["file"], line["bytes"], line["time"]) for line in self.arrivals()}
        found: _Look = {}
        for path in self.inbox.rglob("*"):
            name = path.relative_to(self.inbox)
            plain = path.name.removesuffix(".gz").lower()
            hidden = any(part.startswith(".") for part in name.parts)
            if hidden or not plain.endswith((*TEXT_SUFFIXES, *ROW_SUFFIXES)) or not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # it may just have gone
                told = path.stat()
                if (str(name), told.st_size, told.st_mtime_ns) not in taken:
                    found[str(name)] = (told.st_size, told.st_mtime_ns)
        return found

    def _take(self, name: str, told: tuple[int, int]) -> None:
        """Copy a file that has arrived, and then write it down."""
        number = len(self.arrivals()) + 1
        copied = self.home / ARRIVED / f"{number:04d}-{Path(name).name}"
        part = copied.with_name(f".{copied.name}.part")
        try:
            shutil.copyfile(self.inbox / name, part)
        except FileNotFoundError:
            return  # it has gone since it was seen
        files.fsync_path(part)
        part.replace(copied)
        self._write_down(
            {"number": number, "file": name, "bytes": told[0], "time": told[1], "copy": copied.name}
        )
        self.say(f"{number:04d} {name} has arrived")

    # ---- what is learned ---------------------------------------------------------------------------

    def _learn_all(self) -> bool:
        """Learn from every arrival that was not learned from; False if it was interrupted."""
        newest: Path | None = None
        for line in self.arrivals():
            if "refused" in line:
                continue
            folder = self.home / f"{line['number']:04d}"
            if not _is_done(folder):
                try:
                    if not self._learn(folder, line, newest):
                        return False
                except DataError as error:
                    if (folder / rundir.CONFIG_JSON).exists():
                        raise  # it had begun
                    self._write_down({"number": line["number"], "refused": str(error)})
                    self.say(f"{folder.name} {line['file']} is not learned from: {error}")
                    continue
            newest = folder
            self._point_at(newest)
        return True

    def _learn(self, folder: Path, line: Mapping[str, Any], before: Path | None) -> bool:
        copied = self.home / ARRIVED / line["copy"]
        start = self.model if before is None else str(before)
        experiment = learning(start, [copied], steps=self.steps, flags=self.flags)
        if not train_in(folder, experiment):
            return False
        known = (RunReader(folder).summary() or {})["texts"][0]["expert"]
        self.say(f"{folder.name} {line['file']}: answered by {known or 'the model alone'}")
        return True

    def _point_at(self, folder: Path) -> None:
        link, new = self.home / NEWEST, self.home / f".{NEWEST}"
        if link.is_symlink() and os.readlink(link) == folder.name:
            return
        new.unlink(missing_ok=True)
        new.symlink_to(folder.name)
        new.replace(link)


def _is_done(folder: Path) -> bool:
    return (folder / rundir.CONFIG_JSON).exists() and is_finished(RunReader(folder))
