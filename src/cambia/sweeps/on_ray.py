"""Workers on a Ray cluster, or on a Ray of this machine's own.

Ray places the cells; what they come to is written by themselves into the sweep's folder, which all machines
must share, under the hash of their configuration. Nothing depends on which trial or process Ray made of them.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from cambia.errors import ConfigError, MissingExtraError
from cambia.sweeps.pool import environment_of
from cambia.sweeps.worker import Outcome, Task, work

_STORE_BYTES = 100_000_000
"""Ray's shared memory; what we pass through it is text."""


class RayWorkers:
    """Tasks on Ray.

    Args:
        folder: the sweep's, the same on all machines.
        count: tasks at a time; as many as the cluster's processors have room for where it is left out.
        threads: CPU threads of each.
        address: of a cluster; without it a Ray of this machine's own is started.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: there is no cluster at this address.
    """

    def __init__(self, folder: Path, count: int | None, *, threads: int, address: str | None):
        try:
            ray = import_module("ray")  # an extra: type checkers may not see it
        except ImportError:
            raise MissingExtraError.of("ray", "ray") from None
        self._ray = ray
        self.folder = folder.resolve()
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(ray, count, threads, address)
        self.count = count or int(ray.cluster_resources().get("CPU", 1)) // threads or 1
        environment = {"env_vars": environment_of(threads)}
        self._work = ray.remote(num_cpus=threads, max_retries=0, runtime_env=environment)(_work)
        self._busy: dict[Any, str] = {}
        self._killed: set[str] = set()

    @property
    def free(self) -> int:
        return self.count - len(self._busy)

    def start(self, task: Task) -> None:
        self._busy[self._work.remote(str(self.folder), task.to_json())] = task.cell.hash

    def wait(self, seconds: float) -> list[Outcome]:
        done, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=seconds)
        return [self._outcome(reference) for reference in done]

    def kill(self, hash: str) -> None:
        self._killed.add(hash)
        self._ray.cancel(self._reference(hash), force=True)

    def interrupt(self) -> None:
        # Ray passes this on as Ctrl-C, at which a run saves.
        for reference in self._busy:
            self._ray.cancel(reference)

    def close(self) -> None:
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        self._busy = {}
        if self._is_ours:
            self._ray.shutdown()

    def _reference(self, hash: str) -> Any:
        return next(reference for reference, one in self._busy.items() if one == hash)

    def _outcome(self, reference: Any) -> Outcome:
        exceptions = import_module("ray.exceptions")
        hash = self._busy.pop(reference)
        try:
            return Outcome(**self._ray.get(reference))
        except exceptions.TaskCancelledError:
            return Outcome(hash, "died" if hash in self._killed else "interrupted")
        except exceptions.RayError as error:
            return Outcome(hash, "died", type(error).__name__)


def _connect(ray: ModuleType, count: int | None, threads: int, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"--ray-address {address!r}: there is no Ray cluster ({error}); `ray status` says where"
            ) from None
        return
    cores = (count or 0) * threads or os.cpu_count()
    ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)


def _work(folder: str, task: str) -> dict[str, Any]:
    return asdict(work(Path(folder), Task.from_json(task)))
