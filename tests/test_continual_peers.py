"""What of benchmarks/continual_peers.py needs no Avalanche: rows for both sides, our side, the page."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/continual_peers.py, which imports what it has of `peers`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("continual_peers")


@pytest.fixture(scope="module")
def course(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tasks with little text."""
    with pytest.MonkeyPatch.context() as patch:
        ours = sys.modules["peers.continual.ours"]
        patch.setattr(ours, "TEXT_BYTES", 20_000)
        patch.setattr(ours, "SCORED_BYTES", 400)
        yield bench.Course(tmp_path_factory.mktemp("course"))


def laid_down(bench: ModuleType, course: Any, run: Any) -> Any:
    """The rows as the other side reads them."""
    course.lay_down(run)
    module = sys.modules["peers.continual.course"]
    return module.Rows.load(module.rows_file(course.folder, run))


def test_the_rows_laid_down_are_those_that_our_side_reads(bench: ModuleType, course: Any) -> None:
    run = bench.Run("naive", 3, "adamw", 2)
    rows = laid_down(bench, course, run)
    stream = course.stream(run)
    assert len(rows.train) == len(rows.held_out) == len(bench.TASKS)
    for task, windows in enumerate(rows.train):
        for some in windows.split(bench.BATCH):
            batch = stream.next_batch(task)
            assert torch.equal(batch.input_ids, some[:, :-1])
            assert torch.equal(batch.targets, some[:, 1:])


def test_both_sides_score_alike(bench: ModuleType, course: Any) -> None:
    run = bench.Run("naive", 3, "sgd", 2)
    rows = laid_down(bench, course, run)
    model = LlamaForCausalLM.from_pretrained(course.folder / "model-3")
    shared = sys.modules["peers.continual.course"]
    found = shared.scores(shared.Logits(model), rows.held_out)
    untrained, *after = course.train(run)
    assert found == pytest.approx(untrained, abs=1e-5)
    assert len(after) == len(bench.TASKS)


def test_whatever_is_drawn_of_one_row_is_that_row(bench: ModuleType, course: Any) -> None:
    rows = laid_down(bench, course, bench.Run("replay", 3, "adamw", 2, stream="same"))
    first, second = rows.train
    assert len(first.unique(dim=0)) == 1
    assert len(second.unique(dim=0)) == len(second)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_lent_fisher_information_is_what_holds(bench: ModuleType, course: Any, value: float) -> None:
    run = bench.ewc(3, 2, 100.0, 1.0, lent=True)
    laid_down(bench, course, run)
    model = LlamaForCausalLM.from_pretrained(course.folder / "model-3")
    file_of = sys.modules["peers.continual.course"].fisher_file
    for task in range(len(bench.TASKS)):
        fisher = {name: torch.full_like(p, value) for name, p in model.named_parameters()}
        save_file(fisher, file_of(course.folder, run, task))
    held, free = course.train(run), course.train(bench.Run("naive", 3, "adamw", 2))
    assert (held == free) == (value == 0)
    assert held[:2] == free[:2]  # nothing holds in the first task


def pair(run: Any, ours: float, theirs: float) -> dict[str, Any]:
    """A run whose scores are all the same, but for the untrained model's."""
    sides = {"ours": ours, "theirs": theirs}
    return {"run": asdict(run), **{side: [[8.0] * 3, *[[end] * 3] * 3] for side, end in sides.items()}}


def test_each_side_takes_the_strength_that_ends_lowest(bench: ModuleType) -> None:
    ends = {(1.0, 0): 3.0, (1.0, 1): 3.0, (10.0, 0): 2.0, (10.0, 1): 3.5}
    tuning = [
        {
            "run": asdict(bench.ewc(seed, 2, strength, 2 * strength)),
            "ours": [[end] * 3] * 4,
            "theirs": [[-end] * 3] * 4,
        }
        for (strength, seed), end in ends.items()
    ]
    assert bench.best(tuning, "ours", "strength") == 10.0
    assert bench.best(tuning, "theirs", "ewc_lambda") == 2.0


def test_the_page_has_a_row_for_each_method_side_and_strength(bench: ModuleType) -> None:
    result = {
        "tasks": bench.TASKS,
        "avalanche": {
            "avalanche": "0.6.0",
            "torch": "2.13.0",
            "torchvision": "0.28.0",
            "torchvision_operators": 1,
        },
        "taken": {"strength": 1.0, "ewc_lambda": 20.0},
        "checks": [
            pair(bench.ewc(0, 2, 40.0, 20.0, lent=True), 2.25, 2.25),
            pair(bench.Run("naive", 0, "adamw", 2), 2.5, 2.5),
            pair(bench.Run("naive", 0, "sgd", 2, stream="same"), 3.5, 3.5),
            pair(bench.Run("agem", 0, "sgd", 2, stream="same"), 3.0, 3.0),
        ],
        "arms": [
            pair(run(seed), 2.5 + seed + gap, 2.5 + seed)
            for seed in range(3)
            for run, gap in (
                (lambda s: bench.Run("naive", s, "adamw", 2), 0.0),
                (lambda s: bench.ewc(s, 2, 1.0, 20.0), 0.125),
            )
        ],
        "tuning": [pair(bench.ewc(100, 2, each, 2 * each), 2.0, 2.0) for each in (1.0, 10.0)],
    }
    page = bench.markdown(result)
    checks, arms, _, tuning, _ = page.split("\n\n")
    assert [len(part.splitlines()) for part in (checks, arms, tuning)] == [2 + 3, 2 + 6, 2 + 4]
    for part in (checks, arms, tuning):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert "| A-GEM | SGD | the first task is one row | 0e+00 | 0.50 |" in checks
    assert "| EWC | AdamW | Cambia takes Avalanche's Fisher information | 0e+00 | 0.25 |" in checks
    assert "+0.125 (+0.125 to +0.125)" in arms
    assert tuning.count("✓") == 2


def test_the_interval_is_students(bench: ModuleType) -> None:
    page = sys.modules["peers.continual.page"]
    # Mean 3, standard error 0.7071, and 2.776 is the quantile for four degrees of freedom.
    assert page.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "+3.000 (+1.037 to +4.963)"


def test_without_avalanche_it_says_how_to_get_it(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "continual_peers.py")])
    with pytest.raises(SystemExit, match=r"avalanche-lib==0\.6\.0"):
        bench.main()
