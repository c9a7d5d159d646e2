"""Launching: every cell gets one result, equal to that of the same run alone, whatever fails or is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cambia import rundir
from cambia.errors import ConfigError, SweepError
from cambia.experiment.build import train_in
from cambia.sweepdir import ERRORS, RESULTS, TABLE, SweepReader, SweepWriter
from cambia.sweeps import Limits, cells_of, read_grid, run_grid
from cambia.sweeps.on_ray import RayWorkers
from tests.sweeps.grids import BASE, METHODS, cache, grid, written

__all__ = ["cache"]  # a fixture

BROKEN = {"broken": {"growth.rules": METHODS["grown"]["growth.rules"], "growth.approve": "no_such_module:f"}}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """A folder for runs."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMBIA_RUNS", str(folder / "runs"))
        patch.setenv("CAMBIA_CACHE", str(cache))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def swept(place: Path) -> Path:
    """A finished sweep of two methods and a broken one, two seeds each."""
    tree = grid(axes={"method": {**METHODS, **BROKEN}}, seeds=2, workers=2)
    return run_grid(tree, name="swept", console=QUIET)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_every_cell_has_one_result(swept: Path) -> None:
    reader = SweepReader(swept)
    assert len(reader.cells()) == len(reader.results()) == len(lines(swept)) == 6
    states = Counter((result.choice["method"], result.status) for result in reader.results().values())
    assert states == {("fixed", "finished"): 2, ("grown", "finished"): 2, ("broken", "failed"): 2}
    for result in reader.results().values():
        if result.status == "failed":
            assert "there is no module 'no_such_module'" in (result.error or "")
            assert "Traceback" in (swept / ERRORS / f"{result.cell}.txt").read_text()
        else:
            assert result.results["test_bits_per_byte"] and result.seconds > 0 and result.finished
            assert result.results["growth_events"] == (result.choice["method"] == "grown")
    assert len((swept / TABLE).read_text().splitlines()) == 7
    progress = reader.progress()
    assert progress is not None and progress.pop("elapsed") > 0
    assert progress == {"total": 6, "done": 4, "skipped": 0, "failed": 2, "current": []}


def assert_as_alone(folder: Path, alone: Path, *, but: str = "") -> None:
    """Every cell is, byte for byte, what the same run is without a sweep."""
    for cell in cells_of(read_grid(folder / "grid.yaml")):
        if cell.record.choice["method"] == but:
            continue
        assert train_in(alone / cell.name, cell.experiment())
        for name in (rundir.METRICS, rundir.EVAL, rundir.GROWTH):
            mine, other = alone / cell.name / name, folder / cell.name / name
            assert mine.exists() == other.exists()
            assert not mine.exists() or mine.read_bytes() == other.read_bytes(), name


def test_a_cell_is_what_the_run_is_alone(swept: Path, tmp_path: Path) -> None:
    assert_as_alone(swept, tmp_path, but="broken")


def test_the_same_call_again_has_nothing_to_do(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (swept / RESULTS).read_bytes()
    monkeypatch.setattr(subprocess, "Popen", None)  # no worker is started
    assert run_grid(swept / "grid.yaml", name="swept", console=QUIET) == swept
    assert (swept / RESULTS).read_bytes() == before
    progress = SweepReader(swept).progress()
    assert progress is not None and (progress["done"], progress["skipped"], progress["failed"]) == (4, 6, 2)


def test_failures_are_tried_again_when_asked(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (swept.parents[1] / "no_such_module.py").write_text("def f(plan, reason):\n    return False\n")
    run_grid(swept / "grid.yaml", name="swept", limits=Limits(retry=True, most=1), workers=1, console=QUIET)
    states = Counter(result.status for result in SweepReader(swept).results().values())
    assert states == {"finished": 5, "failed": 1} and len(lines(swept)) == 7


@pytest.mark.slow
def test_only_some_and_at_most_so_many(place: Path) -> None:
    tree = grid(seeds=3)
    limits = Limits(only=["method=fixed", "seed=1", "seed=2"], most=1)
    folder = run_grid(tree, name="some", limits=limits, workers=1, console=QUIET)
    (result,) = SweepReader(folder).results().values()
    assert dict(result.choice) == {"method": "fixed", "seed": 1}
    assert len(SweepReader(folder).cells()) == 6


@pytest.mark.slow
def test_a_base_that_fails_at_once_stops_the_sweep(place: Path) -> None:
    tree = grid(axes={"method": BROKEN}, seeds=50, settings={"growth.approve": "nor_this_one:f"}, workers=1)
    tree["axes"] = {"training.steps": [3]}
    tree["settings"] |= {"growth.rules": METHODS["grown"]["growth.rules"]}
    with pytest.raises(SweepError, match=r"first 3 cells failed alike: .*no module 'nor_this_one'"):
        run_grid(tree, name="failing", console=QUIET)
    assert len(lines(place / "runs" / "failing")) == 3


@pytest.mark.slow
def test_a_hanging_cell_costs_only_itself(place: Path) -> None:
    (place / "sleeping.py").write_text("import time\n\n\ndef f(plan, reason):\n    time.sleep(600)\n")
    methods = {"hangs": {**BROKEN["broken"], "growth.approve": "sleeping:f"}, "fixed": METHODS["fixed"]}
    tree = grid(axes={"method": methods}, cell_seconds=20, workers=1)
    results = SweepReader(run_grid(tree, name="hanging", console=QUIET)).results().values()
    found = {result.choice["method"]: result for result in results}
    assert found["fixed"].status == "finished"
    assert found["hangs"].status == "failed" and "longer than cell_seconds: 20" in (
        found["hangs"].error or ""
    )


@pytest.mark.slow
def test_a_dying_cell_is_tried_again_and_then_has_failed(place: Path) -> None:
    (place / "dying.py").write_text("import os\n\n\ndef f(plan, reason):\n    os.kill(os.getpid(), 9)\n")
    methods = {"dies": {**BROKEN["broken"], "growth.approve": "dying:f"}}
    tree = grid(axes={"method": methods}, attempts=2, workers=1)
    (result,) = SweepReader(run_grid(tree, name="dying", console=QUIET)).results().values()
    assert result.status == "failed" and "its worker died (SIGKILL) 2 times" in (result.error or "")


def test_a_folder_that_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    original = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if closed in self.parents:
            raise PermissionError(13, "Permission denied", str(self))  # root may write anywhere
        original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("CAMBIA_RUNS", str(closed))
    with pytest.raises(ConfigError, match="cannot be written: set CAMBIA_RUNS"):
        run_grid(grid(), console=QUIET)


# ---- killed at any time --------------------------------------------------------------------------


def launcher(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cambia", "sweep", "tiny.yaml", "--workers", "2", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def workers_of(folder: Path) -> list[int]:
    """Processes that work on a sweep."""
    found = subprocess.run(["pgrep", "-f", f"cambia.sweeps.worker {folder}"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def assert_whole(folder: Path, count: int) -> None:
    """Exactly one result for each cell."""
    finished = Counter(line["hash"] for line in lines(folder) if line["status"] == "finished")
    assert set(finished) == {cell.hash for cell in SweepReader(folder).cells()}
    assert set(finished.values()) == {1} and len(finished) == count


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds workers by their command")
def test_launcher_and_workers_are_killed(place: Path, tmp_path: Path) -> None:
    written(place, grid(seeds=3, settings={"training.steps": 12, "checkpoint.every_steps": 4}))
    folder = place / "runs" / "tiny"
    first = launcher(place)
    wait_for(lambda: (folder / RESULTS).exists() and lines(folder))
    first.kill()
    first.wait()
    second = launcher(place)
    other = launcher(place)  # both work on what is left
    wait_for(lambda: len(lines(folder)) > 2)
    for worker in workers_of(Path("runs/tiny"))[:1]:
        os.kill(worker, signal.SIGKILL)
    assert second.wait(120) == other.wait(120) == 0
    assert_whole(folder, 6)
    assert_as_alone(folder, tmp_path)
    progress = SweepReader(folder).progress()
    assert progress is not None and (progress["total"], progress["done"], progress["current"]) == (6, 6, [])


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(place: Path) -> None:
    steps = {"training.steps": 4000, "checkpoint.every_steps": 4000}
    written(place, {"base": BASE, "name": "long", "settings": steps})
    folder = place / "runs" / "long"
    process = launcher(place)
    wait_for(lambda: list(folder.glob("*/metrics.csv")))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (cell,) = cells_of(read_grid(place / "tiny.yaml"))
    saved = json.loads((folder / cell.name / rundir.SUMMARY).read_text())
    assert saved["status"] == "interrupted" and 0 < saved["steps"] < 4000
    assert not SweepWriter(folder).results()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds workers by their command")
def test_two_hundred_cells_and_ten_kills(place: Path) -> None:
    import random

    chance = random.Random(0)
    settings = {"training.steps": 12, "checkpoint.every_steps": 4}
    written(place, {**grid(seeds=100, settings=settings), "name": "many"})
    folder = place / "runs" / "many"
    process = launcher(place)
    for kill in range(10):
        before = len(lines(folder)) if (folder / RESULTS).exists() else 0
        wait_for(lambda before=before: (folder / RESULTS).exists() and len(lines(folder)) > before)
        time.sleep(chance.uniform(0, 2))
        assert len(lines(folder)) < 200, "it is over before it was killed often enough"
        if kill % 2:
            process.kill()
            process.wait()
            process = launcher(place)
        else:
            for worker in workers_of(Path("runs/many"))[:1]:
                os.kill(worker, signal.SIGKILL)
    assert process.wait(900) == 0
    assert_whole(folder, 200)


def test_a_cluster_that_is_not_there_is_told_with_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, is_initialized=lambda: False))
    with pytest.raises(ConfigError, match=r"--ray-address '10\.0\.0\.1:1': there is no Ray cluster"):
        RayWorkers(tmp_path, 1, threads=1, address="10.0.0.1:1")
