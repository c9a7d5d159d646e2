"""Runs whose stages are not one per task: what is said of them, wherever it is said."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cambia import files
from cambia.evaluation import TaskMatrix
from cambia.experiment.results import results_of
from cambia.models.saved import STATE_JSON
from cambia.reporting import (
    check_health,
    compare,
    load_for_comparison,
    load_run,
    print_comparison,
    print_summary,
    write_comparison,
    write_report,
)
from cambia.reporting.run import stage_names
from cambia.rundir import RunReader
from tests.pages import Checked

Make = Callable[..., Path]
RECURRING: dict[str, Any] = {
    "stages": [["english"], ["python"], ["english"], ["legal", "python"], ["python"]],
    "steps": 10,
    "growth_steps": (),
}


def page(folder: Path) -> tuple[str, str]:
    """The report's markup and its words."""
    text = write_report(load_run(folder)).read_text()
    return text, " ".join(Checked(text).words)


def printed(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    print_summary(load_run(folder), console)
    return console.export_text()


# ---- stages --------------------------------------------------------------------------------------


def test_what_stages_are_called() -> None:
    trained = ((0,), (1,), (0,), (0, 2), (0, 1, 2), (), (0, 1, 2, 3), (0, 2))
    matrix = TaskMatrix(((0.0,) * 4,) * 9, ("a", "b", "c", "d"), trained, "own")
    assert stage_names(matrix) == [
        "a",
        "b",
        "a again",
        "a + c",
        "3 tasks",
        "stage 6",
        "all 4 tasks",
        "a + c again",
    ]


def test_a_run_with_recurring_tasks_is_read_whole(make_run: Make) -> None:
    run = load_run(make_run(**RECURRING))
    assert run.task_matrix().trained == ((0,), (1,), (0,), (1, 2), (1,))
    metrics = run.transfer_metrics()
    assert metrics is not None and metrics.earlier == ("english", "legal")
    assert metrics.forgotten == pytest.approx((0.2, 0.0, 0.1))
    assert metrics.learning_loss == pytest.approx((2.21 + 1.52 + 1.87) / 3)


def test_before_the_end_it_is_said_as_soon_as_every_task_was_trained(make_run: Make) -> None:
    early = load_run(make_run("early", summary=None, stop_at=35, **RECURRING))
    assert early.transfer_metrics() is None
    late = load_run(make_run("late", summary=None, stop_at=45, **RECURRING))
    assert late.status == "interrupted" and late.transfer_metrics() is not None
    for said in (printed(early.folder), page(early.folder)[1]):
        assert "2 of 3 tasks are done" in said


def test_the_page_frames_what_each_stage_trained(make_run: Make) -> None:
    folder = make_run(**RECURRING)
    text, words = page(folder)
    table = text.split('<table class="matrix">')[1].split("</table>")[0]
    rows = [
        [kind == "cell own" for kind in re.findall(r'class="(cell own|cell)"', row)]
        for row in table.split("<tr>")
        if 'class="cell' in row
    ]
    trained = [(), *load_run(folder).task_matrix().trained]
    assert rows == [[j in stage for j in range(3)] for stage in trained]
    assert "3 tasks in 5 stages, 50 steps" in words
    for label in ("after english again", "after python + legal", "after python again"):
        assert label in words
    assert "to the end of its own last training" in words
    assert "In numbers" in words and "backward transfer" in words and "lost by routes" not in words
    assert "Each task after its training" in text


def test_the_terminal_marks_what_each_stage_trained(make_run: Make) -> None:
    said = printed(make_run(**RECURRING))
    rows = [line for line in said.splitlines() if line.startswith(("untrained", "after"))]
    assert [len(re.findall(r"\[.*?\]", row)) for row in rows] == [0, 1, 1, 1, 2, 1]
    assert "after python + legal" in said


def test_names_that_do_not_fit_are_listed(make_run: Make) -> None:
    tasks = [f"a domain with a long name, number {i}" for i in range(1, 7)]
    said = printed(make_run(tasks=tasks, stages=[tasks[:2], tasks[2:5]], steps=3, growth_steps=()))
    assert "after 3 tasks" in said
    assert f"Other columns: 1 {tasks[0]}, 2 {tasks[1]}," in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


def test_a_task_that_is_never_trained_has_a_column_and_no_more(make_run: Make) -> None:
    folder = make_run(tasks=["english", "python", "held out"], stages=[["english"], ["python"]], steps=5)
    text, words = page(folder)
    metrics = load_run(folder).transfer_metrics()
    assert metrics is not None and metrics.tasks == ("english", "python")
    assert re.findall(r'class="said">([\d.-]+)<', text)[:6] == ["5.810", "6.490", "-", "0.100", "0.000", "-"]
    assert "held out" in words
    rows = re.findall(r"^(learned|forgotten) .* -$", printed(folder), re.MULTILINE)
    assert rows == ["learned", "forgotten"]
    start = sum(load_run(folder).task_matrix().rows[0][:2]) / 2
    assert f"bits per byte at the end (untrained {start:.3f})" in words


def test_a_single_stage_of_all_forgets_nothing(make_run: Make) -> None:
    folder = make_run(stages=[["english", "python", "legal"]], steps=20, growth_steps=())
    _, words = page(folder)
    assert "Every task was trained in the last stage" in words and "after all 3 tasks" in printed(folder)
    assert "Dots are stages" not in words


def test_health_counts_stages_that_recur(make_run: Make) -> None:
    run = load_run(make_run(**{**RECURRING, "steps": 40}))
    assert "in all 5 stages" in check_health(run)[0].sentence


# ---- routes and accuracy -------------------------------------------------------------------------


def test_both_routes_are_told_apart(make_run: Make) -> None:
    _, words = page(make_run(routes=("own", "oracle"), steps=5))
    assert "The same with the right route for every text" in words
    assert "lost by weights" in words and "lost by routes" in words and "regret" in words


def test_a_method_that_is_told_the_task_says_so(make_run: Make) -> None:
    folder = make_run(routes=("oracle",), steps=5)
    assert load_run(folder).task_matrix().route == "oracle"
    assert "was told which task each text is of" in page(folder)[1]
    assert "the task known" in printed(folder)
    assert "was told which task" not in page(make_run("own", steps=5))[1]


def test_exact_answers_are_shown_where_they_were_counted(make_run: Make) -> None:
    _, words = page(make_run(has_accuracy=True, steps=5))
    assert "Exact answers" in words and "accuracy" in words
    assert "Exact answers" not in page(make_run("plain", steps=5))[1]


# ---- results -------------------------------------------------------------------------------------


CONTINUAL = {"learning_loss", "forgetting", "backward_transfer", "forward_transfer", "incremental_mean"}
ORACLE = {"forgetting_by_weights", "forgetting_by_routes", "regret_to_oracle"}


def results(folder: Path) -> dict[str, float | None]:
    return results_of(RunReader(folder))


def test_the_results_of_a_run(make_run: Make) -> None:
    folder = make_run(steps=5)
    found, metrics = results(folder), load_run(folder).transfer_metrics()
    assert metrics is not None and found.keys() >= CONTINUAL and not found.keys() & ORACLE
    assert found["test_bits_per_byte"] == metrics.final_mean
    assert all(found[name] == getattr(metrics, name) for name in CONTINUAL)
    assert "test_accuracy" not in found
    assert not results(make_run("one", tasks=["english"], steps=5)).keys() & (CONTINUAL | ORACLE)


def test_results_with_both_routes(make_run: Make) -> None:
    found = results(make_run(routes=("own", "oracle"), steps=5))
    assert found["forgetting_by_weights"] == pytest.approx(0.075)
    assert found["forgetting_by_routes"] == pytest.approx(0.075)
    assert found["regret_to_oracle"] == pytest.approx(0.05)
    told = results(make_run("told", routes=("oracle",), steps=5))
    assert told["forgetting"] == pytest.approx(0.075) and not told.keys() & ORACLE


def test_results_with_accuracy(make_run: Make) -> None:
    found = results(make_run(has_accuracy=True, steps=5))
    assert found["test_accuracy"] == pytest.approx(1 - (2.41 + 1.62 + 1.87) / 30, abs=1e-3)
    assert found["accuracy_forgetting"] == pytest.approx(0.015, abs=1e-3)
    one = results(make_run("one", tasks=["english"], has_accuracy=True, steps=5))
    assert "test_accuracy" in one and "accuracy_forgetting" not in one


def test_accuracy_of_some_tasks_is_no_result(make_run: Make) -> None:
    folder = make_run(has_accuracy=True, steps=5)
    log = folder / "eval.csv"
    log.write_text(re.sub(r"(,legal,.*),0\.\d+,40000", r"\1,,40000", log.read_text()))
    assert "test_accuracy" not in results(folder) and "forgetting" in results(folder)


def test_results_of_other_stages(make_run: Make) -> None:
    found = results(make_run(**RECURRING))
    assert found["test_bits_per_byte"] == pytest.approx((2.41 + 1.52 + 1.97) / 3)
    assert found["forgetting"] == pytest.approx(0.15)
    # Only one of the columns was trained: the numbers are its own, and what it did for the others.
    alone = results(make_run("alone", stages=[["python"]], steps=5))
    assert alone["test_bits_per_byte"] == alone["learning_loss"] == pytest.approx(1.52)
    assert alone["forgetting"] == 0.0 and alone["forward_transfer"] == pytest.approx(0.9)


# ---- side by side --------------------------------------------------------------------------------


def test_runs_of_the_same_tasks_stand_in_one_table(make_run: Make, tmp_path: Path) -> None:
    runs = [
        load_run(make_run("kept", steps=40, forgotten_per_task=0.01, routes=("own", "oracle"))),
        load_run(make_run("lost", steps=40, forgotten_per_task=0.4)),
        load_run(make_run("told", steps=40, routes=("oracle",))),
        load_run(make_run("alone", tasks=["english"], steps=40)),
    ]
    comparison = compare(runs)
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    words = " ".join(Checked(write_comparison(comparison, tmp_path / "c.html").read_text()).words)
    told = console.export_text()
    for said in (told, words):
        assert "Learned and kept: bits per byte on the test text of 3 tasks" in said
        assert "told (task known)" in said and "0.6000" in said, "forgetting of `lost`"
        assert "lost by routes" in said
    assert "alone" not in told.partition("Learned and kept")[2]


def test_runs_of_other_tasks_stand_apart(make_run: Make) -> None:
    runs = [load_run(make_run(name, tasks=[name, "z"], steps=40, growth_steps=())) for name in "ab"]
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(compare(runs), console)
    said = console.export_text()
    assert "the test text of a, z" in said and "the test text of b, z" in said


def test_a_checkpoint_has_the_scores_of_its_time(make_run: Make) -> None:
    folder = make_run(steps=40, growth_steps=())
    (folder / "ckpt_step80").mkdir()
    files.write_json(folder / "ckpt_step80" / STATE_JSON, {"progress": {"step": 80}})
    early = load_for_comparison(folder / "ckpt_step80")
    assert len(early.task_matrix().rows) == 3
    metrics = early.transfer_metrics()
    assert metrics is not None and metrics.tasks == ("english", "python")
