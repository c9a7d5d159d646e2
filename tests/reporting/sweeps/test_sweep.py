from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia import sweepdir
from cambia.errors import CheckpointError, ConfigError, RunError
from cambia.reporting import Sweep, load, load_sweep
from cambia.reporting.sweeps.cells import direction, key, label
from cambia.reporting.sweeps.statistics import bootstrap_interval, holm, paired_t
from cambia.sweepdir import SweepWriter
from tests.sweep_records import Choice, Outcome, cell, record_outcome, write_cells, write_sweep

AXES = {"rate": [0.003, 0.001], "growth": ["none", "depth"], "seed": [0, 1, 2]}


def bits(choice: Choice) -> float:
    """2 and a little, never twice the same."""
    noise = [0.0, 0.02, -0.01][choice["seed"]]
    return 2 + 10 * choice["rate"] - 0.1 * (choice["growth"] == "depth") + noise * (1 + 100 * choice["rate"])


def measured(choice: Choice) -> Outcome:
    return {"zeta": 1.0, "validation_bits_per_byte": bits(choice) + 0.1, "test_bits_per_byte": bits(choice)}


def with_gaps(choice: Choice) -> Outcome:
    """One cell failed, one is missing, one was not finite; the rest is `measured`."""
    special = {
        (0.003, "none", 0): "OutOfMemoryError: 3 GB\nare not enough",
        (0.001, "none", 1): None,
        (0.001, "depth", 2): {"test_bits_per_byte": None, "zeta": 1.0},
    }
    return special.get((choice["rate"], choice["growth"], choice["seed"]), measured(choice))


@pytest.fixture
def whole(runs: Path) -> Sweep:
    write_sweep(runs / "whole", AXES, measured)
    return load_sweep("whole")


@pytest.fixture
def gaps(runs: Path) -> Sweep:
    write_sweep(runs / "gaps", AXES, with_gaps)
    return load_sweep("gaps")


# ---- loading -------------------------------------------------------------------------------------


def test_a_sweep_is_what_its_grid_asked_for(whole: Sweep) -> None:
    assert whole.name == "whole" and whole.handle == "whole"
    assert list(whole.axes) == ["rate", "growth", "seed"]  # in the order of the grid, not of the alphabet
    assert whole.axes["rate"] == (0.003, 0.001)
    assert whole.varied == ["rate", "growth"]
    assert whole.metrics == ["zeta", "validation_bits_per_byte", "test_bits_per_byte"]
    assert whole.main_metric == "test_bits_per_byte"
    assert len(whole.having("finished")) == len(whole.results) == 12
    assert "base: smoke" in whole.grid and whole.progress is not None


def test_what_did_not_finish_is_counted(gaps: Sweep) -> None:
    assert [len(gaps.having(status)) for status in ("finished", "failed", "missing")] == [10, 1, 1]
    table = gaps.table()
    assert (table.left_out.failed, table.left_out.missing, table.left_out.unmeasured) == (1, 1, 1)
    assert [row.n for row in table.rows] == [2, 3, 2, 2]
    assert table.rows[0].left_out.words == "1 failed"
    assert table.rows[3].left_out.words == "1 without value"
    assert gaps.table("zeta").left_out.words == "1 failed, 1 missing"


def test_results_of_earlier_grids_are_counted_and_not_shown(runs: Path) -> None:
    write_sweep(runs / "sweep", AXES, measured)
    write_sweep(runs / "sweep", {**AXES, "rate": [0.001]}, lambda _: None)
    sweep = load_sweep("sweep")
    assert (len(sweep.cells), len(sweep.results), sweep.earlier) == (6, 6, 6)
    assert sweep.axes["rate"] == (0.001,)


def test_the_last_result_of_a_cell_counts(runs: Path) -> None:
    writer = write_sweep(runs / "sweep", {"seed": [0]}, lambda _: "first it failed")
    record_outcome(writer, cell({"seed": 0}), {"loss": 1.5})
    assert load_sweep("sweep").cells[0].value("loss") == 1.5


def test_a_cell_is_called_as_the_grid_calls_it_now(runs: Path) -> None:
    record = cell({"arm": "old name", "seed": 0})
    writer = write_cells(runs / "sweep", [(record, {"loss": 1.0})], {})
    writer.write_grid("", [sweepdir.CellRecord("renamed", record.hash, {"arm": "new name", "seed": 0})])
    sweep = load_sweep("sweep")
    assert sweep.cells[0].name == "renamed"
    assert sweep.table().rows[0].choice == {"arm": "new name"}


def test_files_that_are_missing_or_broken(runs: Path) -> None:
    write_sweep(runs / "sweep", {"seed": [0]}, lambda _: {"loss": 1.0}, progress=False)
    (runs / "sweep" / sweepdir.GRID).unlink()
    assert load_sweep("sweep").progress is None and load_sweep("sweep").grid == ""
    (runs / "sweep" / sweepdir.CELLS).write_text('[{"cell": 1}]')
    with pytest.raises(CheckpointError, match="does not list cells"):
        load_sweep("sweep")


def test_a_name_that_is_nearly_one_is_named(runs: Path, whole: Sweep) -> None:
    with pytest.raises(RunError, match="did you mean 'whole'"):
        load_sweep("whol")
    with pytest.raises(RunError, match="did you mean the sweep 'whole'"):
        load("whol")
    with pytest.raises(RunError, match="no run 'else'"):
        load("else")
    assert isinstance(load(whole.folder), Sweep)


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_has_a_row_per_combination(whole: Sweep) -> None:
    table = whole.table()
    assert (table.axes, table.over) == (("rate", "growth"), ("seed",))
    assert [row.choice for row in table.rows] == [
        {"rate": rate, "growth": growth} for rate in AXES["rate"] for growth in AXES["growth"]
    ]
    first = [bits({"rate": 0.003, "growth": "none", "seed": seed}) for seed in range(3)]
    assert table.rows[0].values == tuple(first)
    assert table.rows[0].mean == pytest.approx(sum(first) / 3)
    middle = sum(first) / 3
    assert table.rows[0].spread == pytest.approx(math.sqrt(sum((v - middle) ** 2 for v in first) / 2))


def test_axes_are_averaged_over(whole: Sweep) -> None:
    table = whole.table("zeta", over=["growth"])
    assert (table.axes, set(table.over)) == (("rate",), {"growth", "seed"})
    assert [row.n for row in table.rows] == [6, 6]
    everything = whole.table(over=["growth", "rate"])
    assert [row.choice for row in everything.rows] == [{}]
    assert everything.rows[0].n == 12


def test_one_seed_has_no_spread(runs: Path) -> None:
    write_sweep(runs / "one", {"rate": [1, 2], "seed": [0]}, lambda choice: {"loss": choice["rate"]})
    rows = load_sweep("one").table().rows
    assert [row.n for row in rows] == [1, 1]
    assert all(math.isnan(row.spread) for row in rows)
    assert load_sweep("one").paired(None, "rate").rows[0].n == 1


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda sweep: sweep.table("test_bits_per_bite"), "--metric .*did you mean 'test_bits_per_byte'"),
        (lambda sweep: sweep.table("x"), "known are .*zeta"),
        (lambda sweep: sweep.table(over=["rte"]), "did you mean 'rate'"),
        (lambda sweep: sweep.paired(None, "seed"), "pairs agree on it"),
        (lambda sweep: sweep.paired(None, "rate", 0.5), "rate has 0.003, 0.001"),
        (lambda sweep: sweep.baseline("rate"), "expected AXIS=VALUE"),
        (lambda sweep: sweep.baseline("growth=dept"), "did you mean 'depth'"),
        (lambda sweep: sweep.baseline("grwth=depth"), "did you mean 'growth'"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(whole: Sweep, ask: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(whole)


@pytest.mark.parametrize("outcome", [None, "it failed"])
def test_without_results_there_is_nothing_to_read(runs: Path, outcome: Outcome) -> None:
    write_sweep(runs / "sweep", AXES, lambda _: outcome)
    sweep = load_sweep("sweep")
    assert sweep.main_metric is None and sweep.metrics == []
    with pytest.raises(RunError, match="has no results to read yet: of 12 cells"):
        sweep.table()


def test_which_end_is_better(runs: Path) -> None:
    write_sweep(
        runs / "sweep",
        {"seed": [0, 1, 2]},
        lambda choice: {name: float(choice["seed"]) for name in ("loss", "backward_transfer", "flops")},
    )
    sweep = load_sweep("sweep")
    assert [sweep.best(name).choice["seed"] for name in sweep.metrics] == [0, 2, 0]
    assert [sweep.worst(name).choice["seed"] for name in sweep.metrics] == [2, 0, 2]
    assert [direction(name) for name in sweep.metrics] == ["lower", "higher", None]


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("learning_loss", "lower"),
        ("incremental_mean", "lower"),
        ("forgetting_by_weights", "lower"),
        ("regret_to_oracle", "lower"),
        ("accuracy_forgetting", "lower"),
        ("test_accuracy", "higher"),
        ("forward_transfer", "higher"),
        ("growth_events", None),
    ],
)
def test_which_end_of_a_metric_is_better(metric: str, better: str | None) -> None:
    assert direction(metric) == better


def test_values_are_told_apart() -> None:
    assert key(1) == key(1.0) != key(True)
    assert key("1") != key(1) and key(None) != key("None")
    assert [label(value) for value in (3e-4, 128, True, None, "a", [1, 2])] == [
        "0.0003",
        "128",
        "true",
        "none",
        "a",
        "[1, 2]",
    ]


def test_cells_need_not_have_the_same_axes(runs: Path) -> None:
    cells = [(cell({"arm": "a", "seed": 0}), {"loss": 1.0}), (cell({"rate": 0.1, "seed": 0}), {"loss": 2.0})]
    write_cells(runs / "sweep", cells, {})
    sweep = load_sweep("sweep")
    assert sweep.axes == {"arm": ("a", None), "seed": (0,), "rate": (None, 0.1)}
    assert [row.mean for row in sweep.table().rows] == [1.0, 2.0]


# ---- pairs ---------------------------------------------------------------------------------------


def test_pairs_agree_on_everything_else(whole: Sweep) -> None:
    paired = whole.paired(None, "growth")
    assert (paired.baseline, paired.over) == ("none", ("rate", "seed"))
    (row,) = paired.rows
    assert row.value == "depth" and row.unpaired == 0
    assert row.differences == pytest.approx([-0.1] * 6)
    by_rate = whole.paired(None, "rate", 0.001).rows[0]
    assert by_rate.value == 0.003 and by_rate.mean == pytest.approx(0.02 + 0.01 / 3 * 0.2)
    assert by_rate.interval == bootstrap_interval(by_rate.differences)
    assert by_rate.test == paired_t(by_rate.differences)
    assert by_rate.p_holm == by_rate.test.p


def test_cells_without_a_partner_are_counted(gaps: Sweep) -> None:
    (row,) = gaps.paired(None, "growth").rows
    assert (row.n, row.unpaired) == (3, 3)  # of six pairs each gap spoils one
    (row,) = gaps.paired(None, "rate").rows
    assert (row.n, row.unpaired) == (3, 3)


def test_holm_is_over_the_rows_of_the_table(runs: Path) -> None:
    noise = {0: 0.0, 1: 0.011, 2: -0.013, 3: 0.004}
    write_sweep(
        runs / "sweep",
        {"arm": ["a", "b", "c", "alone"], "seed": [0, 1, 2, 3]},
        lambda c: (
            None
            if c["arm"] == "alone" and c["seed"] > 0
            else {"loss": 2 + 0.01 * ord(c["arm"][0]) + noise[c["seed"]] * (ord(c["arm"][0]) - 90)}
        ),
    )
    rows = load_sweep("sweep").paired(None, "arm").rows
    assert [row.n for row in rows] == [4, 4, 1]
    assert math.isnan(rows[2].test.p) and math.isnan(rows[2].p_holm) and math.isnan(rows[2].interval.low)
    assert [row.p_holm for row in rows[:2]] == holm([row.test.p for row in rows[:2]]).tolist()


def test_no_pairs_at_all(runs: Path) -> None:
    cells = [(cell({"arm": arm, "seed": seed}), {"loss": 1.0}) for seed, arm in enumerate("ab")]
    write_cells(runs / "sweep", cells, {})
    (row,) = load_sweep("sweep").paired(None, "arm").rows
    assert row.n == 0 and math.isnan(row.mean) and math.isnan(row.p_holm) and row.unpaired == 1


def test_a_baseline_in_words(whole: Sweep) -> None:
    assert whole.baseline() == ("rate", 0.003)
    assert whole.baseline("growth=depth") == ("growth", "depth")
    assert whole.baseline("rate=0.001") == ("rate", 0.001)


@given(st.data())
def test_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    outcomes = st.sampled_from(
        [None, "failed", {"loss": None}, {"loss": 1.0}, {"loss": -2.5}, {"other": 1.0}]
    )
    writer = SweepWriter(tmp_path_factory.mktemp("sweep"))
    records = [cell({"a": a, "b": b, "seed": s}) for a in (1, 2) for b in ("x", None) for s in (0, 1)]
    writer.write_grid("", records)
    for record in records:
        record_outcome(writer, record, data.draw(outcomes))
    sweep = load_sweep(writer.folder)
    if "loss" not in sweep.metrics:
        return
    for over in ([], ["a"], ["a", "b"]):
        table = sweep.table("loss", over=over)
        left = table.left_out
        assert sum(row.n for row in table.rows) + left.failed + left.missing + left.unmeasured == 8
    for axis in ("a", "b"):
        assert all(row.n + row.unpaired == 4 for row in sweep.paired("loss", axis).rows)


def test_lines_that_were_cut_short_are_left_out(runs: Path) -> None:
    write_sweep(runs / "sweep", {"seed": [0, 1]}, lambda _: {"loss": 1.0})
    with open(runs / "sweep" / sweepdir.RESULTS, "a") as log:
        log.write(json.dumps({"cell": "half a line"}))
    assert len(load_sweep("sweep").results) == 2
