"""The run directory: one writer, whole rows, and logs that can be cut back."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia import files, rundir
from cambia.errors import CheckpointError, ConfigError, RunError, StorageFullError
from cambia.rundir import RunReader, RunWriter, columns, find_run, free_folder, list_runs


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def started(folder: Path) -> RunWriter:
    run = RunWriter(folder)
    run.write_config({"name": folder.name}, f"name: {folder.name}\n")
    return run


def finished(folder: Path, **logs: list[dict[str, Any]]) -> RunReader:
    run = started(folder)
    for name, rows in logs.items():
        for row in rows:
            run.append_row(f"{name}.csv", row)
    run.close()
    return RunReader(folder)


# ---- one writer, one name ------------------------------------------------------------------------


def test_a_taken_name_is_refused_unless_it_is_resumed(runs: Path) -> None:
    started(runs / "first").close()
    with pytest.raises(
        RunError, match=r"'first' exists already.*--resume first.*another --name.*cambia runs delete"
    ):
        RunWriter(runs / "first")
    RunWriter(runs / "first", resume=True).close()


def test_a_checkpoint_without_its_configuration_is_not_taken_for_a_fresh_run(runs: Path) -> None:
    (runs / "first" / "latest").mkdir(parents=True)
    with pytest.raises(RunError, match=r"a checkpoint but no config\.json.*another --name"):
        RunWriter(runs / "first")


@pytest.mark.parametrize("name", [".hidden", "-x", "two words", "a:b", "ü", "..", "_"])
def test_names_that_make_no_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run: use letters, digits"):
        rundir.run_folder(name)


@pytest.mark.parametrize("name", ["a", "7", "gpt-2_x.v1", "A..b"])
def test_ordinary_names_are_fine(runs: Path, name: str) -> None:
    started(rundir.run_folder(name)).close()
    assert find_run(name) == runs / name


HOLDER = """
import sys
from cambia.rundir import RunWriter
run = RunWriter(sys.argv[1], resume=True)
run.append_row("metrics.csv", {"step": 1})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_writes_is_left_alone(runs: Path) -> None:
    started(runs / "busy").close()
    reader = RunReader("busy")
    assert not reader.is_going()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(runs / "busy")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert reader.is_going()
        with pytest.raises(RunError, match="still going in another process"):
            RunWriter(runs / "busy", resume=True)
        assert reader.rows(rundir.METRICS) == [{"step": 1}], "reading is always possible"
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert not reader.is_going(), "a killed process holds nothing"
    RunWriter(runs / "busy", resume=True).close()


def test_asking_whether_a_run_is_going_does_not_stop_it(runs: Path) -> None:
    run = started(runs / "busy")
    assert RunReader("busy").is_going()
    assert RunReader("busy").is_going()
    run.append_row(rundir.METRICS, {"step": 1})
    run.close()
    assert not RunReader("busy").is_going()


# ---- finding runs --------------------------------------------------------------------------------


def test_runs_are_found_by_name_and_by_path(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(runs / "first").close()
    assert find_run("first") == find_run(runs / "first") == runs / "first"
    monkeypatch.chdir(runs.parent)
    monkeypatch.delenv("CAMBIA_RUNS")
    assert find_run("first") == Path("runs/first")
    assert RunReader("first").name == "first"


def test_a_models_folder_is_no_run_and_a_name_is_one_under_the_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "one", runs / "exported"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")  # as every Hugging Face model has it
    with pytest.raises(RunError, match="there is no run 'exported'"):
        find_run("exported")
    assert [path.name for path in list_runs()] == []
    for folder in (tmp_path / "one", runs / "one"):
        shutil.rmtree(folder, ignore_errors=True)
        started(folder).close()
    assert find_run("one") == runs / "one" and find_run("./one") == Path("one")


def test_a_sweeps_folder_is_taken(runs: Path) -> None:
    (runs / "grid").mkdir(parents=True)
    (runs / "grid" / rundir.CELLS).write_text("[]")
    assert free_folder("grid").name == "grid-2"
    with pytest.raises(RunError, match="is a sweep"):
        RunWriter(runs / "grid")


def test_what_somebody_put_beside_checkpoints_is_left_alone(runs: Path) -> None:
    writer = started(runs / "one")
    for name in ("ckpt_step1", "ckpt_step20", "ckpt_step20_copy"):
        (runs / "one" / name).mkdir()
    writer.keep_only(1)
    writer.close()
    assert sorted(p.name for p in (runs / "one").glob("ckpt*")) == ["ckpt_step20", "ckpt_step20_copy"]


def test_an_altered_log_is_named(runs: Path) -> None:
    started(runs / "one").close()
    (runs / "one" / "growth.jsonl").write_text("{nothing}\n")
    (runs / "one" / "metrics.csv").write_bytes(b"step\n\xff\n")
    with pytest.raises(CheckpointError, match=r"growth.jsonl was altered"):
        RunReader(runs / "one").growth()
    with pytest.raises(CheckpointError, match=r"metrics.csv was altered"):
        RunReader(runs / "one").rows("metrics.csv")


def test_a_run_that_is_not_there_is_answered_with_the_nearest(runs: Path) -> None:
    with pytest.raises(RunError, match=r"no run 'frist'.*`cambia runs list` shows"):
        find_run("frist")
    started(runs / "first").close()
    with pytest.raises(RunError, match=r"no run 'frist'.*did you mean 'first'"):
        find_run("frist")
    with pytest.raises(RunError, match="no run"):
        RunReader("quite another")


def test_runs_are_listed_newest_last(runs: Path) -> None:
    assert list_runs() == []
    for i, name in enumerate(["b", "c", "a"]):
        started(runs / name).close()
        os.utime(runs / name / rundir.CONFIG_JSON, (i, i))
    (runs / "no run").mkdir()
    assert [path.name for path in list_runs()] == ["b", "c", "a"]


# ---- rows ----------------------------------------------------------------------------------------

CELLS = (
    st.none()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.sampled_from(["english", "two, words", 'a "quote"', "grün", "a;b", "-", "e5x"])
)


@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=6))
def test_rows_come_back_to_the_last_bit(rows: list[tuple[Any, Any]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("runs") / "x"
    # A row that is empty but for None would be an empty line; every log has a step.
    written = [{"step": i, "one": one, "two": two} for i, (one, two) in enumerate(rows)]
    read = finished(folder, metrics=written).rows(rundir.METRICS)
    assert read == written
    assert [[type(v) for v in row.values()] for row in read] == [
        [type(v) for v in row.values()] for row in written
    ]


def test_what_is_not_a_number_is_read_as_such(runs: Path) -> None:
    (row,) = finished(runs / "x", metrics=[{"a": math.nan, "b": -math.inf, "c": -0.0}]).rows(rundir.METRICS)
    assert math.isnan(row["a"]) and row["b"] == -math.inf and str(row["c"]) == "-0.0"


def test_numbers_of_other_libraries_are_numbers(runs: Path) -> None:
    row = {"loss": np.float64(0.1), "steps": np.int64(3)}
    assert finished(runs / "x", metrics=[row]).rows(rundir.METRICS) == [{"loss": 0.1, "steps": 3}]


def test_a_header_is_written_once_also_after_resuming(runs: Path) -> None:
    finished(runs / "x", metrics=[{"step": 1, "loss": 2.0}])
    run = RunWriter(runs / "x", resume=True)
    run.append_row(rundir.METRICS, {"step": 2, "loss": None})
    run.close()
    assert (runs / "x" / rundir.METRICS).read_text() == "step,loss\n1,2.0\n2,\n"


def test_a_row_that_was_cut_short_is_left_out(runs: Path) -> None:
    """Wherever the cut is, inside a number or inside a letter of several bytes."""
    rows = [{"step": i, "task": "grün", "loss": i / 7} for i in range(3)]
    reader = finished(runs / "x", metrics=rows)
    path = runs / "x" / rundir.METRICS
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert reader.rows(rundir.METRICS) == rows[: max(0, lines - 1)]


def test_growth_events_are_lines_and_a_cut_one_is_left_out(runs: Path) -> None:
    run = started(runs / "x")
    events = [{"step": 3, "reason": "grün"}, {"step": 5, "reason": "a\nb\u2028c"}]
    for event in events:
        run.append_json(rundir.GROWTH, event)
    run.close()
    reader, path = RunReader("x"), runs / "x" / rundir.GROWTH
    assert reader.growth() == events
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert reader.growth() == events[: whole[:length].count(b"\n")]


def test_logs_that_are_not_there_are_empty(runs: Path) -> None:
    reader = finished(runs / "x")
    assert reader.rows(rundir.METRICS) == reader.growth() == reader.checkpoints() == []
    assert reader.summary() is None
    assert reader.config() == {"name": "x"}


def test_a_running_run_can_be_read(runs: Path) -> None:
    run = started(runs / "x")
    for step in range(3):
        run.append_row(rundir.METRICS, {"step": step})
        assert len(RunReader("x").rows(rundir.METRICS)) == step + 1
    run.write_summary({"done": True})
    assert RunReader("x").summary() == {"done": True}
    run.close()


def test_columns_are_what_a_plot_wants() -> None:
    assert columns([{"a": 1, "b": 2}, {"a": 3}], "a", "b") == [[1, 3], [2, None]]


# ---- cutting back --------------------------------------------------------------------------------


def log(run: RunWriter, first: int, last: int) -> None:
    for step in range(first, last):
        run.append_row(rundir.METRICS, {"step": step, "loss": 1 / (step + 1)})
        if step % 2:
            run.append_json(rundir.GROWTH, {"step": step})


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_resumed_run_writes_the_log_of_an_uninterrupted_one(runs: Path, kept: int) -> None:
    whole = started(runs / "whole")
    log(whole, 0, 8)
    whole.close()

    run = started(runs / "killed")
    log(run, 0, kept)
    lengths = json.loads(json.dumps(run.log_lengths()))
    log(run, kept, kept + 3)
    run.close()
    with open(runs / "killed" / rundir.METRICS, "ab") as torn:
        torn.write(b"7,0.1")

    run = RunWriter(runs / "killed", resume=True)
    run.cut_logs(lengths)
    assert run.log_lengths() == lengths
    log(run, kept, 8)
    run.close()
    for name in (rundir.METRICS, rundir.GROWTH):
        assert (runs / "killed" / name).read_bytes() == (runs / "whole" / name).read_bytes()


def test_a_log_that_is_too_short_or_gone_is_refused(runs: Path) -> None:
    run = started(runs / "x")
    log(run, 0, 4)
    lengths = run.log_lengths()
    path = runs / "x" / rundir.METRICS
    os.truncate(path, lengths[rundir.METRICS] - 1)
    with pytest.raises(RunError, match=r"metrics\.csv has \d+ bytes and had \d+"):
        run.cut_logs(lengths)
    assert path.stat().st_size == lengths[rundir.METRICS] - 1, "no zeros are put behind it"
    path.unlink()
    with pytest.raises(RunError, match=r"metrics\.csv has 0 bytes"):
        run.cut_logs(lengths)
    run.close()


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(run: RunWriter, name: str, text: str = "") -> None:
    with files.atomic_folder(run.checkpoint(name)) as temporary:
        (temporary / "state.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(("count", "expected"), [(0, []), (2, [10, 100]), (9, [2, 9, 10, 100])])
def test_the_newest_checkpoints_stay_by_number_not_by_letter(
    runs: Path, count: int, expected: list[int]
) -> None:
    run = started(runs / "x")
    for step in (9, 100, 2, 10):
        checkpoint(run, rundir.checkpoint_step_name(step))
    checkpoint(run, rundir.checkpoint_task_name(0))
    checkpoint(run, rundir.LATEST)
    run.keep_only(count)
    run.close()
    assert names(runs / "x") == sorted([*(f"ckpt_step{step}" for step in expected), "ckpt_task0", "latest"])
    found = [path.name for path in RunReader("x").checkpoints()]
    assert found == ["latest", *(f"ckpt_step{step}" for step in expected), "ckpt_task0"]


def test_a_checkpoint_without_a_manifest_is_none(runs: Path) -> None:
    run = started(runs / "x")
    checkpoint(run, rundir.BEST)
    (runs / "x" / "ckpt_step3").mkdir()
    run.close()
    assert [path.name for path in RunReader("x").checkpoints()] == ["best"]


@pytest.mark.parametrize("name", ["latest", "best", "ckpt_step7", "ckpt_task0"])
def test_what_a_crash_left_behind_is_put_right(runs: Path, name: str) -> None:
    """Killed between the two renames, the checkpoint is there under its hidden name alone."""
    run = started(runs / "x")
    checkpoint(run, name, "old")
    os.rename(runs / "x" / name, runs / "x" / f".{name}.old")
    (runs / "x" / f".{name}.0123abcd.tmp").mkdir()
    run.close()
    run = RunWriter(runs / "x", resume=True)
    run.recover()
    run.close()
    assert names(runs / "x") == [name]
    assert (files.verified(runs / "x" / name) / "state.json").read_text() == "old"


def test_half_a_first_checkpoint_is_swept_away(runs: Path) -> None:
    run = started(runs / "x")
    (runs / "x" / ".ckpt_step7.0123abcd.tmp").mkdir()
    run.recover()
    run.close()
    assert names(runs / "x") == []


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", [rundir.METRICS, rundir.GROWTH])
def test_a_full_disk_is_one_line(runs: Path, name: str) -> None:
    run = started(runs / "x")
    (runs / "x" / name).symlink_to("/dev/full")
    with pytest.raises(StorageFullError, match=r"no space left on the disk.*--resume"):
        run.append_row(name, {"a": 1}) if name == rundir.METRICS else run.append_json(name, {"a": 1})
    with pytest.raises(StorageFullError):
        run.close()  # what could not be written is tried once more
    assert not RunReader("x").is_going(), "the lock is given back all the same"
