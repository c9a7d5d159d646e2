from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cambia import rundir
from cambia.reporting import Check, check_health, load_run

Make = Callable[..., Path]
FALLING, HOLDS, KEPT, EXACT, COVERED, SKIPPED = range(6)


def checks(make_run: Make, **settings: Any) -> list[Check]:
    return check_health(load_run(make_run(**{"steps": 60, "growth_steps": (40, 100), **settings})))


def with_losses(folder: Path, losses: list[float], column: str = "loss") -> list[Check]:
    """The checks of a run whose logged losses are replaced."""
    head, *lines = (folder / rundir.METRICS).read_text().splitlines()
    place = head.split(",").index(column)
    rows = [line.split(",") for line in lines]
    for row, loss in zip(rows, losses, strict=True):
        row[place] = repr(loss)
    text = "\n".join([head, *(",".join(row) for row in rows)]) + "\n"
    (folder / rundir.METRICS).write_text(text)
    return check_health(load_run(folder))


def test_a_good_run_is_green_and_every_line_ends_as_a_sentence(make_run: Make) -> None:
    found = checks(make_run)
    assert [check.level for check in found] == ["green"] * 6
    assert all(check.question.endswith("?") and check.sentence.endswith(".") for check in found)


def test_a_rising_loss_is_red_and_names_the_task_and_the_flag(make_run: Make) -> None:
    folder = make_run(tasks=["only"], steps=40, growth_steps=())
    check = with_losses(folder, [2.0 + 0.05 * i for i in range(40)])[FALLING]
    assert check.level == "red"
    assert "'only'" in check.sentence
    assert "--optimizer.learning_rate" in check.sentence


def test_a_loss_within_its_noise_is_amber(make_run: Make) -> None:
    folder = make_run(tasks=["only"], steps=40, growth_steps=())
    assert with_losses(folder, [2.0 + 0.1 * (i % 2) for i in range(40)])[FALLING].level == "amber"


def test_too_few_steps_are_not_judged(make_run: Make) -> None:
    check = checks(make_run, steps=4, growth_steps=())[FALLING]
    assert check.level == "amber"
    assert "Too few" in check.sentence


@pytest.mark.parametrize(("end", "level"), [(2.5, "green"), (2.7, "amber"), (3.2, "red")])
def test_validation_that_rises_again_is_memorizing(make_run: Make, end: float, level: str) -> None:
    folder = make_run(tasks=["only"], steps=40, growth_steps=())
    values = [3.0] * 20 + [2.5] * 10 + [end] * 10
    assert with_losses(folder, values, "validation_loss")[HOLDS].level == level


def test_no_validation_is_amber_and_names_the_setting(make_run: Make) -> None:
    check = checks(make_run, validation_every=None)[HOLDS]
    assert check.level == "amber"
    assert "--evaluation.every_steps" in check.sentence


@pytest.mark.parametrize(("loss", "level"), [(0.1, "green"), (0.3, "amber"), (1.2, "red")])
def test_forgetting_is_told_with_what_was_learned(make_run: Make, loss: float, level: str) -> None:
    check = checks(make_run, forgotten_per_task=loss)[KEPT]
    assert check.level == level
    if level != "green":
        assert f"learned on 'english', {2 * loss:.2f} are lost again" in check.sentence
        assert "--methods '[{type: replay, fraction: 0.25}]'" in check.sentence


def test_forgetting_is_not_judged_too_early(make_run: Make) -> None:
    assert "nothing can be forgotten" in checks(make_run, tasks=["one"], growth_steps=())[KEPT].sentence
    assert checks(make_run, name="going", summary=None, stop_at=90)[KEPT].level == "amber"


@pytest.mark.parametrize(
    ("errors", "level"),
    [((1e-7, 0.0), "green"), ((1e-7, 2e-3), "amber"), ((1e-7, None), "amber"), ((1e-7, 0.5), "red")],
)
def test_growth_is_held_to_its_promise(make_run: Make, errors: tuple[float | None, ...], level: str) -> None:
    assert checks(make_run, logit_errors=errors)[EXACT].level == level


def test_nan_logits_are_never_exact(make_run: Make) -> None:
    assert checks(make_run, logit_errors=(float("nan"), 1e-7))[EXACT].level == "red"


def test_a_declared_jump_is_no_fault_but_is_told(make_run: Make) -> None:
    check = checks(make_run, exactness=("tolerance", "none"), logit_errors=(1e-7, 0.4))[EXACT]
    assert check.level == "green"
    assert "+0.21 nats per token" in check.sentence


@pytest.mark.parametrize(("covered", "level"), [(True, "green"), (False, "red"), (None, "amber")])
def test_parameters_outside_the_optimizer_are_red(make_run: Make, covered: bool | None, level: str) -> None:
    summary = {"optimizer_covers_all_parameters": covered}
    assert checks(make_run, summary=summary)[COVERED].level == level


@pytest.mark.parametrize(("skipped", "level"), [(0, "green"), (1, "amber"), (9, "red")])
def test_skipped_steps(make_run: Make, skipped: int, level: str) -> None:
    assert checks(make_run, skipped=skipped)[SKIPPED].level == level


def test_a_run_that_did_not_grow_has_nothing_to_check(make_run: Make) -> None:
    assert checks(make_run, growth_steps=())[EXACT].level == "green"
