"""Searches: each arm gets its trials, judged over seeds; what is killed goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cambia.errors import ConfigError
from cambia.sweepdir import Result, SweepReader, SweepWriter
from cambia.sweeps import cells_of, read_grid, run_grid
from cambia.sweeps.grid import Cell
from cambia.sweeps.launch import open_sweep
from cambia.sweeps.supply import Searched
from tests.sweeps.grids import cache, grid

__all__ = ["cache"]  # a fixture

optuna = pytest.importorskip("optuna")
SPACE = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "training.steps": [2, 3]}
QUIET = Console(quiet=True)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepWriter:
    return SweepWriter(tmp_path / "sweep")


def supply(sweep: SweepWriter, **search: Any) -> Searched:
    read = read_grid(grid(seeds=2, search={"space": SPACE, "trials": 5, **search}))
    sweep.write_grid("", None)
    return Searched(read, cells_of(read), sweep, retry=False)


def result(cell: Cell, **values: float) -> Result:
    return Result(cell.name, cell.hash, cell.record.choice, "finished", values)


def work(source: Searched, sweep: SweepWriter, most: int = 10**6) -> Iterator[Cell]:
    """Pretend to run cells; the best learning rate is 1e-2."""
    import math

    while most and (cell := source.next()) is not None:
        most -= 1
        rate = float(cell.choice["optimizer.learning_rate"])
        found = result(cell, validation_bits_per_byte=abs(math.log10(rate) + 2))
        sweep.record(found)
        source.done(cell, found)
        yield cell


def test_every_arm_gets_its_trials_with_every_seed(sweep: SweepWriter) -> None:
    source = supply(sweep)
    cells = list(work(source, sweep))
    assert source.total == 20 == len(cells) == len(source.records())
    by_arm = {"fixed": 0, "grown": 0}
    for cell in cells:
        by_arm[cell.choice["method"]] += 1
        assert 1e-4 <= cell.choice["optimizer.learning_rate"] <= 1e-1
        assert cell.experiment().training.steps == cell.choice["training.steps"]
    assert by_arm == {"fixed": 10, "grown": 10}


def test_a_search_finds_the_better_half(sweep: SweepWriter) -> None:
    source = supply(sweep, trials=25)
    list(work(source, sweep))
    for study in source._studies.studies.values():
        assert study.best_value < 0.5 and len(study.trials) == 25


@pytest.mark.parametrize("most", [1, 2, 7])
def test_a_search_goes_on_where_it_was_killed(sweep: SweepWriter, most: int) -> None:
    first = list(work(supply(sweep), sweep, most))
    second = list(work(supply(sweep), sweep))
    assert len(first) == most
    hashes = [cell.hash for cell in [*first, *second]]
    assert len(set(hashes)) == len(hashes) == 20, "no cell is run twice and none is lost"


def test_what_is_judged_by_must_be_a_result(sweep: SweepWriter) -> None:
    source = supply(sweep, metric="validation_bits_per_bite")
    with pytest.raises(ConfigError, match="no result; did you mean 'validation_bits_per_byte'"):
        list(work(source, sweep))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {**SPACE, "training.steps": [2, 4]}}, "search.space.training.steps: .*--name"),
        ({"space": {**SPACE, "training.steps": {"low": 2, "high": 3}}}, "search.space.training.steps"),
        ({"maximize": True}, "search.maximize true: .*--name"),
    ],
)
def test_a_search_that_was_changed_under_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path))
    search = {"space": SPACE, "trials": 2}
    read = read_grid(grid(search=search))
    sweep = open_sweep(read, cells_of(read), "study")
    list(work(Searched(read, cells_of(read), sweep, retry=False), sweep))
    before = (sweep.folder / "grid.yaml").read_text()
    with pytest.raises(ConfigError, match=said):
        run_grid(grid(search={**search, **change}), name="study", console=QUIET)
    assert (sweep.folder / "grid.yaml").read_text() == before
    wider = read_grid(
        grid(
            search={
                "space": {**SPACE, "optimizer.learning_rate": {"low": 1e-5, "high": 1.0, "log": True}},
                "trials": 3,
            }
        )
    )
    open_sweep(wider, cells_of(wider), "study")


def test_values_that_are_no_experiment_are_not_run(sweep: SweepWriter) -> None:
    source = supply(sweep, space={**SPACE, "model.hidden_size": [16, 17]}, trials=8, sampler="random")
    cells = list(work(source, sweep))
    assert 0 < len(cells) < 32 and {cell.choice["model.hidden_size"] for cell in cells} == {16}
    assert len(cells) + 2 * len(source.refused) == 32
    assert "does not divide into num_attention_heads" in source.refused[0]


@pytest.mark.parametrize("sampler", ["cmaes", "random"])
def test_other_samplers(sweep: SweepWriter, sampler: str) -> None:
    pytest.importorskip("cmaes")
    source = supply(
        sweep,
        sampler=sampler,
        space={**SPACE, "model.intermediate_size": {"low": 16, "high": 32, "integer": True}},
    )
    assert len(list(work(source, sweep, 8))) == 8


@pytest.mark.slow
def test_a_real_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path))
    monkeypatch.setenv("CAMBIA_CACHE", str(cache))
    tree = grid(axes={}, search={"space": SPACE, "trials": 3}, workers=1)
    reader = SweepReader(run_grid(tree, name="found", console=QUIET))
    assert len(reader.results()) == len(reader.cells()) == 3
    assert all(result.status == "finished" for result in reader.results().values())
