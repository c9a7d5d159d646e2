"""Grids: which cells follow, what they are called, what is one configuration, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.errors import ConfigError
from cambia.rundir import run_folder
from cambia.sweeps import Cell, cells_of, read_grid
from cambia.sweeps.grid import chosen, plain_grid
from cambia.sweeps.search import Range
from tests.sweeps.grids import BASE, METHODS, grid, written


def cells(tree: Mapping[str, Any], **flags: Any) -> list[Cell]:
    return cells_of(read_grid(tree, flags))


def test_every_choice_with_every_seed_is_a_cell() -> None:
    rates = {"optimizer.learning_rate": [1e-3, 3e-3]}
    found = cells(grid(axes={"method": METHODS, **rates}, seeds=2))
    assert len(found) == len({cell.hash for cell in found}) == len({cell.name for cell in found}) == 8
    first = found[0]
    assert first.record.choice == {"method": "fixed", "optimizer.learning_rate": 1e-3, "seed": 0}
    assert first.name == f"fixed_learning_rate-0.001_seed-0_{first.hash[:8]}"
    experiment = first.experiment()
    assert (experiment.optimizer.learning_rate, experiment.growth.enabled) == (1e-3, False)
    assert [cell.record.choice["seed"] for cell in found] == [0] * 4 + [1] * 4, "a whole table early"


def test_what_comes_first() -> None:
    found = cells(grid(seeds=[3, 5], first=[{"method": "grown"}]))
    order = [(cell.record.choice["method"], cell.record.choice["seed"]) for cell in found]
    assert order == [("grown", 3), ("grown", 5), ("fixed", 3), ("fixed", 5)]


def test_exclusions() -> None:
    left = cells(grid(seeds=3, exclude=[{"method": "fixed", "seed": [0, 2]}]))
    assert [cell.record.choice["seed"] for cell in left if cell.record.choice["method"] == "fixed"] == [1]
    with pytest.raises(ConfigError, match="no cell is left"):
        cells(grid(exclude=[{"method": ["fixed", "grown"]}]))


def test_a_hash_is_that_of_what_can_change_results() -> None:
    (one,) = cells({"base": BASE})
    (same,) = cells(
        {"base": {**BASE, "name": "other", "description": "x"}, "seeds": [0]}, **{"data.cache_dir": "x"}
    )
    (explicit,) = cells({"base": BASE}, **{"threads": 1, "training.batch_size": 2})
    assert one.hash == same.hash == explicit.hash
    for change in ({"threads": 2}, {"training.steps": 4}, {"device": "auto"}):
        (other,) = cells({"base": BASE}, **change)
        assert other.hash != one.hash


def test_threads_are_the_grids_unless_the_base_says_otherwise() -> None:
    (cell,) = cells({"base": BASE, "threads": 3})
    assert cell.experiment().threads == 3
    (cell,) = cells({"base": {**BASE, "threads": 2}, "threads": 3})
    assert cell.experiment().threads == 2


def test_an_extended_grid_keeps_its_cells() -> None:
    small = {cell.hash for cell in cells(grid(seeds=2))}
    more = {**METHODS, "longer": {"training.steps": 9}}
    assert small < {cell.hash for cell in cells(grid(seeds=4, axes={"method": more}))}


@given(
    rate=st.floats(1e-6, 1.0),
    words=st.text(min_size=1, max_size=80),
    seed=st.integers(0, 10**6),
)
def test_every_name_can_be_a_folder(rate: float, words: str, seed: int) -> None:
    axes = {"optimizer.learning_rate": [rate], words: {words: {}}}
    (cell,) = cells({"base": BASE, "axes": axes, "seeds": [seed]})
    assert run_folder(cell.name).name == cell.name and len(cell.name) <= 200


def test_a_grid_stands_alone_once_it_is_read(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.yaml")
    path = written(tmp_path, grid(base="base.yaml"), "study.yaml")
    read = read_grid(path, {"training.steps": 5})
    assert read.name == "study" and read.settings == {"training.steps": 5}
    again = read_grid(plain_grid(read))
    assert [cell.hash for cell in cells_of(again)] == [cell.hash for cell in cells_of(read)]


def test_values_that_have_parts() -> None:
    sizes = {"growth.rules": [[], METHODS["grown"]["growth.rules"]]}
    without, grown = cells({"base": BASE, "axes": sizes})
    assert (
        without.record.choice["growth.rules"] == "[]" and "widen_ffn" in grown.record.choice["growth.rules"]
    )
    assert len(grown.experiment().growth.rules) == 1


def test_only_some() -> None:
    read = read_grid(grid(seeds=3))
    every = cells_of(read)
    assert len(chosen(every, ["method=grown"], read)) == 3
    rates = read_grid({"base": BASE, "axes": {"optimizer.learning_rate": [1e-3, 1e-2]}})
    assert len(chosen(cells_of(rates), ["learning_rate=1e-2"], rates)) == 1
    assert len(chosen(every, ["method=grown", "seed=1", "seed=2"], read)) == 2
    for only, said in (
        ("methd=x", "did you mean 'method'"),
        ("seed", "axis=value"),
        ("seed=7", "no such cell"),
        ("seed=2024-01-01", "no such cell"),
        ("seed={1: 2, b: 3}", "no such cell"),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen(every, [only], read)


TYPES = {"optimizer.type": ["adamw", "muon"]}
"""A search for an optimizer."""


def searched(room: Any, key: str = "training.steps") -> dict[str, Any]:
    return {"space": {key: room}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (grid(axes={"optimizer.learning_rat": [1]}), "axis 'optimizer.learning_rat'.*mean 'learning_rate'"),
        (grid(axes={"training.steps": [3, "many"]}), "axis 'training.steps', 'many'.*integer"),
        (grid(axes={"method": {"a": {"training.stps": 1}}}), "axis 'method', 'a'.*did you mean 'steps'"),
        (grid(axes={"training.steps": []}), "axes.training.steps: is empty"),
        (grid(axes={"method": {}}), "axes.method: is empty"),
        (grid(axes={"seed": [1]}), "seeds: \\[0, 1, 2\\]"),
        (grid(seeds=[]), "seeds: is empty"),
        (grid(seeds=True), "expected a number"),
        (grid(seeds=1_000_000), "2,000,000 cells.*--yes"),
        (grid(axes={"training.steps": [3, 3]}), "are one configuration"),
        (grid(axes={"method": {"a": {}, "b": {}}}), "method=a.*method=b.*one configuration"),
        (grid(axes={"training.steps": [3], "m": {"a": {"training.steps": 2}}}), "by the axis 'm'"),
        (grid(axes={"optimizer": [{"type": "sgd"}]}, settings={"optimizer": {"seed": 1}}), "by settings"),
        (grid(exclude=[{"methd": "a"}]), "exclude.0: 'methd' is no axis; did you mean 'method'"),
        (grid(axs={}), "did you mean 'axes'"),
        (grid(base="first_groth"), "did you mean 'first_growth'"),
        (grid(search={"space": {"training.steps": {"low": 1, "hi": 2}}}), "did you mean 'high'"),
        (grid(search={"space": {"training.steps": {"low": 2, "high": 1}}}), "low < high"),
        (grid(seeds=10**12), "2,000,000,000,000 cells.*--yes"),
        (grid(search={"space": {}}), "is empty"),
        (grid(search=searched([])), "search.space.training.steps: is empty"),
        (grid(search=searched([[1, 2], [3]])), "training.steps: expected numbers, words.*an axis"),
        (grid(search=searched([{"low": 1}])), "training.steps: expected numbers, words.*an axis"),
        (grid(search=searched([1.0, float("inf")])), "expected finite numbers, got inf"),
        (grid(search=searched({"low": 1, "high": float("inf")})), "high: expected a finite number"),
        (grid(search=searched({"low": 0.5, "high": 3, "integer": True, "log": True})), "low: expected a"),
        (grid(search=searched({"low": 1, "high": 3.5, "integer": True})), "high: expected a whole number"),
        (grid(search={**searched([2]), "seed": -1}), "search.seed: .*greater than or equal to 0"),
        (grid(search=searched([2], "training.stps")), "search.space: .*training.stps: .*mean 'steps'"),
        (grid(search=searched([2], "data.tasks.9.name")), "search.space: .*its entries are 0 to 0, got .9."),
        (grid(search={"space": {**TYPES, "optimizer.momentm": [0.9]}}), "search.space: .*mean 'momentum'"),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cells(tree)


def test_a_search_may_choose_a_type_and_what_only_that_type_has() -> None:
    assert len(cells(grid(search={"space": {**TYPES, "optimizer.momentum": [0.9, 0.95]}}))) == len(
        cells(grid())
    )


def test_bounds_from_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="high: expected a finite number"):
        Range(low=0.0, high=float("inf"))


def test_a_flag_does_not_fight_with_an_axis() -> None:
    with pytest.raises(
        ConfigError, match=r"'growth.enabled' is set by the axis 'method' and by --growth.enabled"
    ):
        read_grid(grid(), {"growth.enabled": True})
    with pytest.raises(ConfigError, match="'seed' is set by the axis 'seeds' and by --seed"):
        read_grid(grid(), {"seed": 3})


def test_the_base_may_be_an_experiment() -> None:
    (cell,) = cells({"base": BASE})
    (same,) = cells({"base": cell.experiment()})
    assert same.hash == cell.hash


def test_settings_may_be_nested() -> None:
    nested = {"training": {"steps": 5}, "optimizer": {"type": "sgd", "learning_rate": 0.1}}
    method = {"longer": {"evaluation": {"every_steps": 1}}}
    (cell,) = cells({"base": BASE, "settings": nested, "axes": {"method": method}})
    experiment = cell.experiment()
    assert (experiment.training.steps, experiment.training.batch_size) == (5, 2)
    assert (type(experiment.optimizer).__name__, experiment.optimizer.learning_rate) == ("SGD", 0.1)
    assert (experiment.evaluation.every_steps, experiment.evaluation.max_bytes) == (1, 500)


def test_very_many_cells_can_be_meant() -> None:
    read = read_grid(grid(seeds=6000, exclude=[{"method": ["fixed", "grown"]}]))
    with pytest.raises(ConfigError, match="12,000 cells"):
        cells_of(read)
    with pytest.raises(ConfigError, match="no cell is left"):
        cells_of(read, yes=True)
