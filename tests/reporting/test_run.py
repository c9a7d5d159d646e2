from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cambia import rundir
from cambia.errors import RunError
from cambia.records import GrowthEvent
from cambia.reporting import load_run

Make = Callable[..., Path]


def test_a_finished_run_is_read_whole(make_run: Make) -> None:
    run = load_run(make_run(steps=50, growth_steps=(30, 80)).name)
    assert (run.name, run.status, run.tasks) == ("rings", "finished", ["english", "python", "legal"])
    assert run.config["training"]["steps"] == 50
    assert run.config_yaml.startswith("name: rings")
    assert run.steps == 150
    assert run.tokens == 150 * 16 * 256 == run.metrics["tokens"][-1]
    assert run.flops == run.metrics["flops"][-1]
    assert run.wall_seconds == 192.4
    assert all(isinstance(event, GrowthEvent) for event in run.growth)
    assert run.growth[1].config_changes == {"num_hidden_layers": [4, 6]}
    assert (run.parameters_start, run.parameters_end) == (1_049_216, run.growth[1].parameters_after)


def test_what_was_not_measured_is_nan_and_numbers_keep_their_kind(make_run: Make) -> None:
    metrics = load_run(make_run(steps=50, validation_every=25)).metrics
    validation = metrics["validation_loss"]
    assert np.flatnonzero(np.isfinite(validation)).tolist() == [24, 49, 74, 99, 124, 149]
    assert metrics["step"].dtype == np.int64
    assert metrics["loss"].dtype == np.float64
    assert metrics["task"][0] == "english"
    with pytest.raises(ValueError, match="read-only"):
        metrics["loss"][0] = 0.0


def test_the_matrix_and_its_metrics(make_run: Make) -> None:
    run = load_run(make_run(steps=10))
    matrix = run.task_matrix()
    assert matrix.tasks == ("english", "python", "legal") and matrix.trained == ((0,), (1,), (2,))
    assert matrix.rows[0] == (8.02, 8.01, 8.0)
    assert [matrix.rows[j + 1][j] for j in range(3)] == [2.21, 1.52, 1.87]
    metrics = run.transfer_metrics()
    assert metrics is not None
    assert metrics.learned == pytest.approx((5.81, 6.49, 6.13))
    assert metrics.forgotten == pytest.approx((0.2, 0.1, 0.0))
    assert run.task_matrix("valid").rows[0][0] == pytest.approx(8.03)


def test_a_going_run_is_read_as_far_as_it_is(make_run: Make) -> None:
    run = load_run(make_run(going=True, summary=None, steps=50, stop_at=70, growth_steps=(60,)))
    assert run.status == "going"
    assert run.summary == {}
    assert (run.steps, run.tokens) == (70, 70 * 4096)
    assert len(run.task_matrix().rows) == 2
    assert run.transfer_metrics() is None
    assert run.parameters_end == run.growth[0].parameters_after
    assert run.wall_seconds == pytest.approx(run.timing["seconds"].sum())


def test_a_killed_run_loses_only_what_was_cut_short(make_run: Make) -> None:
    folder = make_run(summary=None, steps=20, stop_at=45)
    for name, cut in (
        (rundir.METRICS, "46,legal,18"),
        (rundir.EVAL, "python,engl"),
        (rundir.GROWTH, '{"step'),
    ):
        with open(folder / name, "a") as log:
            log.write(cut)
    run = load_run(folder)
    assert run.status == "interrupted"
    assert run.steps == 45
    assert len(run.metrics["loss"]) == 45
    assert len(run.task_matrix().rows) == 3
    assert run.growth == ()


def test_a_stage_that_was_scored_in_part_is_left_out(make_run: Make) -> None:
    folder = make_run(summary=None, steps=20, stop_at=40)
    lines = (folder / rundir.EVAL).read_text().splitlines()
    (folder / rundir.EVAL).write_text(
        "\n".join(lines[:-2]) + "\n"
    )  # of the last stage, one test score is left
    run = load_run(folder)
    assert len(run.task_matrix("test").rows) == 2
    assert len(run.task_matrix("valid").rows) == 3


def test_a_summary_older_than_the_logs_does_not_hide_them(make_run: Make) -> None:
    old = {"status": "interrupted", "steps": 5, "tokens": 5 * 4096, "flops": 1.0, "wall_seconds": 0.001}
    run = load_run(make_run(summary=old, steps=20, stop_at=30, growth_steps=()))
    assert run.status == "interrupted"
    assert (run.steps, run.tokens) == (30, 30 * 4096)
    assert run.wall_seconds > 1.0


def test_stretches_follow_the_tasks(make_run: Make) -> None:
    stretches = load_run(make_run(steps=10)).stretches()
    assert [(s.task, s.first_token, s.last_token) for s in stretches] == [
        ("english", 0, 40_960),
        ("python", 40_960, 81_920),
        ("legal", 81_920, 122_880),
    ]


def test_a_run_that_logged_nothing_yet(runs: Path) -> None:
    writer = rundir.RunWriter(runs / "bare")
    writer.write_config({}, "{}\n")
    writer.close()
    run = load_run("bare")
    assert (run.steps, run.tokens, run.flops, run.skipped_steps) == (0, 0, 0.0, 0)
    assert run.parameters_start is None
    assert run.wall_seconds is None
    assert run.tasks == run.stretches() == []
    assert run.task_matrix().rows == run.task_matrix().tasks == ()
    assert run.transfer_metrics() is None


def test_a_task_called_like_a_number_stays_text(make_run: Make) -> None:
    run = load_run(make_run(tasks=["2024", "2025"], steps=5))
    assert run.tasks == ["2024", "2025"]
    assert run.stretches()[0].task == "2024"
    assert len(run.task_matrix().rows) == 3


def test_the_handle_is_the_name_only_where_it_is_enough(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(steps=2)
    assert load_run(folder).handle == "rings"
    elsewhere = tmp_path / "else where" / "rings"
    elsewhere.parent.mkdir()
    folder.rename(elsewhere)
    assert load_run(elsewhere).handle == f"'{elsewhere}'"


def test_an_unknown_run_names_the_nearest(make_run: Make) -> None:
    make_run(steps=2)
    with pytest.raises(RunError, match="did you mean 'rings'"):
        load_run("ring")


def test_numbers_in_config_and_summary_are_not_confused_with_the_logs(make_run: Make) -> None:
    folder = make_run(steps=10)
    summary = json.loads((folder / rundir.SUMMARY).read_text())
    assert load_run(folder).steps == summary["steps"] == 30
