"""Workers on this machine: processes that live as long as there are cells, and are replaced when they die.

They are started as programs of their own and not forked, so that a sweep can be launched from a script, a
notebook or a test alike, and nothing that the launcher has done is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from cambia.sweepdir import LOGS
from cambia.sweeps.worker import Outcome, Task

_PATIENCE = 5.0
"""Seconds that an idle worker has to leave."""


class Workers(Protocol):
    """Whoever runs tasks."""

    @property
    def free(self) -> int:
        """How many more tasks can be started now."""
        ...

    def start(self, task: Task) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """What has become of tasks since, waiting for something to happen."""
        ...

    def kill(self, hash: str) -> None:
        """Stop a task at once, without its saving anything."""
        ...

    def interrupt(self) -> None:
        """Ask every task to save and stop."""
        ...

    def close(self) -> None: ...


def environment_of(threads: int) -> dict[str, str]:
    """What a worker finds in its environment: where modules are, and how many threads are its own."""
    return {
        "PYTHONPATH": os.pathsep.join(path for path in [*sys.path, os.getcwd()] if path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that wait for one another must not keep a core from another worker.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Pool:
    """Worker processes of this machine.

    Args:
        folder: the sweep's.
        count: of processes at a time.
        threads: CPU threads of each.
        gpus: each worker sees one of so many.
    """

    def __init__(self, folder: Path, count: int, *, threads: int, gpus: int = 0):
        self.folder, self.count, self.threads, self.gpus = folder, count, threads, gpus
        self._idle: list[_Process] = []
        self._busy: dict[str, _Process] = {}
        self._selector = selectors.DefaultSelector()
        self._places = list(range(count))

    @property
    def free(self) -> int:
        return self.count - len(self._busy)

    def start(self, task: Task) -> None:
        while True:
            process = self._idle.pop() if self._idle else self._new()
            try:
                process.tell(task)
            except BrokenPipeError:  # it died while it was idle
                self._gone(process)
                continue
            self._busy[task.cell.hash] = process
            return

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes = []
        for key, _ in self._selector.select(seconds):
            process: _Process = key.data
            answers = process.answers()
            for answer in answers or []:
                self._busy.pop(answer.hash)
                self._idle.append(process)
                outcomes.append(answer)
            if answers is None:
                outcomes += self._gone(process)
        return outcomes

    def kill(self, hash: str) -> None:
        self._busy[hash].popen.kill()

    def interrupt(self) -> None:
        for process in self._busy.values():
            with contextlib.suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGTERM)

    def close(self) -> None:
        everyone = [*self._idle, *self._busy.values()]
        for process in self._busy.values():
            process.popen.kill()
        for process in everyone:
            process.close()
        deadline = time.monotonic() + _PATIENCE
        for process in everyone:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            process.stdout.close()
        self._idle, self._busy = [], {}
        self._selector.close()

    def _new(self) -> _Process:
        place = self._places.pop(0)
        process = _Process(self.folder, place, self._environment(place))
        self._selector.register(process.stdout, selectors.EVENT_READ, process)
        return process

    def _environment(self, place: int) -> dict[str, str]:
        environment = {**os.environ, **environment_of(self.threads)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % self.gpus)
        return environment

    def _gone(self, process: _Process) -> list[Outcome]:
        """Take leave of a process that has ended; its task, if it had one, has died with it."""
        self._selector.unregister(process.stdout)
        process.close()
        code = process.popen.wait()
        process.stdout.close()
        self._places.append(process.place)
        if process in self._idle:
            self._idle.remove(process)
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        died = [hash for hash, worker in self._busy.items() if worker is process]
        for hash in died:
            del self._busy[hash]
        return [Outcome(hash, "died", said) for hash in died]


class _Process:
    """One worker."""

    def __init__(self, folder: Path, place: int, environment: dict[str, str]):
        self.place = place
        command = [sys.executable, "-m", "cambia.sweeps.worker", str(folder)]
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which asks for an end.
        with open(folder / LOGS / f"worker-{os.getpid()}-{place}.log", "a") as log:
            self.popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout
        self._begun = b""

    def tell(self, task: Task) -> None:
        self.stdin.write(task.to_json().encode() + b"\n")
        self.stdin.flush()

    def answers(self) -> list[Outcome] | None:
        """The whole lines that have come; None where the process has ended."""
        new = os.read(self.stdout.fileno(), 65_536)
        if not new:
            return None
        *whole, self._begun = (self._begun + new).split(b"\n")
        return [Outcome(**json.loads(line)) for line in whole]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
