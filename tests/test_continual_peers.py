"""What of benchmarks/continual_peers.py needs no Avalanche: rows for both sides, our side, the page."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
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
        little = {
            stream: {name: replace(source, size_bytes=20_000) for name, source in tasks.items()}
            for stream, tasks in bench.STREAMS.items()
        }
        patch.setattr(ours, "STREAMS", little)
        patch.setattr(ours, "SCORED_BYTES", 400)
        yield bench.Course(tmp_path_factory.mktemp("course"))


def laid_down(bench: ModuleType, course: Any, run: Any) -> Any:
    """The rows as the other side reads them."""
    course.lay_down(run)
    module = sys.modules["peers.continual.course"]
    return module.Rows.load(module.rows_file(course.folder, run))


def test_the_rows_laid_down_are_those_that_our_side_reads(bench: ModuleType, course: Any) -> None:
    run = bench.Run("naive", "unlike", 3, "adamw", 2)
    rows = laid_down(bench, course, run)
    stream = course.stream(run)
    assert len(rows.train) == len(rows.held_out) == 3
    for task, windows in enumerate(rows.train):
        for some in windows.split(bench.BATCH):
            batch = stream.next_batch(task)
            assert torch.equal(batch.input_ids, some[:, :-1])
            assert torch.equal(batch.targets, some[:, 1:])


def test_both_sides_score_alike(bench: ModuleType, course: Any) -> None:
    run = bench.Run("naive", "unlike", 3, "sgd", 2)
    rows = laid_down(bench, course, run)
    model = LlamaForCausalLM.from_pretrained(course.folder / "model-3")
    shared = sys.modules["peers.continual.course"]
    found = shared.scores(shared.Logits(model), rows.held_out)
    untrained, *after = course.train(run)
    assert found == pytest.approx(untrained, abs=1e-5)
    assert len(after) == 3


def test_whatever_is_drawn_of_one_row_is_that_row(bench: ModuleType, course: Any) -> None:
    rows = laid_down(bench, course, bench.Run("replay", "one_row", 3, "adamw", 2))
    first, second = rows.train
    assert len(first.unique(dim=0)) == 1
    assert len(second.unique(dim=0)) == len(second)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_lent_fisher_information_is_what_holds(bench: ModuleType, course: Any, value: float) -> None:
    run = bench.Strength(100.0, 1.0).run("unlike", 3, 2, lent=True)
    laid_down(bench, course, run)
    model = LlamaForCausalLM.from_pretrained(course.folder / "model-3")
    file_of = sys.modules["peers.continual.course"].fisher_file
    for task in range(3):
        fisher = {name: torch.full_like(p, value) for name, p in model.named_parameters()}
        save_file(fisher, file_of(course.folder, run, task))
    held, free = course.train(run), course.train(bench.Run("naive", "unlike", 3, "adamw", 2))
    assert (held == free) == (value == 0)
    assert held[:2] == free[:2]  # nothing holds in the first task


class Told:
    """Both sides, with made-up ends: ours is above theirs by an eighth where EWC is at work."""

    def both(self, runs: list[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        avalanche = {"avalanche": "0.6.0", "torch": "2", "torchvision": "0", "torchvision_operators": False}
        return [self.pair(run) for run in runs], avalanche

    def pair(self, run: Any) -> dict[str, Any]:
        end = {"naive": 3.5, "agem": 3.0}.get(run.method, 2.5) + run.seed
        theirs = end - (run.ewc_lambda == 1e4 * 256)
        ours = theirs if run.method != "ewc" or run.lent else end + 0.125 - (run.strength == 1e3)
        sides = {"ours": ours, "theirs": theirs}
        return {"run": asdict(run), **{side: [[8.0] * 3, *[[e] * 3] * 3] for side, e in sides.items()}}


def test_each_side_takes_its_best_strength_and_the_page_says_all(bench: ModuleType) -> None:
    preset = bench.Preset(2, 2, 2, seeds=3, strengths=(1e2, 1e3, 1e4))
    result = json.loads(json.dumps(bench.measured(preset, Told())))
    best = {"strength": 1e3, "ewc_lambda": 1e4 * 256}
    assert result["taken"] == {"unlike": best, "alike": best}
    checks, arms, _, tuning, _ = bench.markdown(result).split("\n\n")
    assert [len(part.splitlines()) for part in (checks, arms, tuning)] == [2 + 5, 2 + 8 * 3, 2 + 2 * 2 * 3]
    for part in (checks, arms, tuning):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert "| A-GEM | SGD | the first task is one row | 0e+00 | 0.50 |" in checks
    assert "| alike | AdamW | EWC | Cambia less Avalanche | +0.125 (+0.125 to +0.125) |" in arms
    assert "| unlike | SGD | A-GEM | Cambia | 4.000 ± 1.000 |" in arms
    assert tuning.count("✓") == 4


def test_the_interval_is_students(bench: ModuleType) -> None:
    page = sys.modules["peers.continual.page"]
    # Mean 3, standard error 0.7071, and 2.776 is the quantile for four degrees of freedom.
    assert page.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "+3.000 (+1.037 to +4.963)"


def test_without_avalanche_it_says_how_to_get_it(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "continual_peers.py")])
    with pytest.raises(SystemExit, match=r"avalanche-lib==0\.6\.0"):
        bench.main()
