from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from cambia.errors import ConfigError, RunError
from cambia.reporting import compare_sweeps, load_sweep, print_sweep_comparison, write_sweep_comparison
from tests.pages import EVIL, Checked
from tests.sweep_records import Choice, cell, write_cells, write_sweep

NOISE = {0: 0.0, 1: 0.02, 2: -0.01}


def made(folder: Path, shift: float = 0.0, **axes: list[object]) -> None:
    grid = {"rate": [0.001, 0.003], "seed": [0, 1, 2], **axes}

    def bits(choice: Choice) -> dict[str, float | None]:
        value = 2 + 10 * choice["rate"] + NOISE[choice["seed"]] + shift * (1 + choice["rate"])
        return {"flops": 1e12, "test_bits_per_byte": value}

    write_sweep(folder, grid, bits)


def test_equal_choices_stand_together_and_are_paired(runs: Path) -> None:
    made(runs / "fixed")
    made(runs / "grown", -0.1, rate=[0.003, 0.01])
    comparison = compare_sweeps([load_sweep("fixed"), load_sweep("grown")])
    assert (comparison.metric, comparison.axes, comparison.paired_over) == (
        "test_bits_per_byte",
        ("rate",),
        ("rate", "seed"),
    )
    (shared,) = comparison.shared
    assert shared.choice == {"rate": 0.003}
    assert [row.n for row in shared.rows] == [3, 3]
    assert comparison.not_shared == (1, 1)
    (row,) = comparison.paired
    assert (row.value, row.n, row.unpaired) == ("grown", 3, 3)
    assert row.mean == pytest.approx(-0.1 * 1.003)


def test_an_axis_that_only_one_has_is_averaged_over_and_not_paired(runs: Path) -> None:
    made(runs / "fixed")
    made(runs / "more", width=[64, 128])
    comparison = compare_sweeps([load_sweep("fixed"), load_sweep("more")])
    assert comparison.averaged == ((), ("width",))
    assert [row.n for row in comparison.shared[0].rows] == [3, 6]
    assert comparison.paired[0].n == 0
    made(runs / "one_width", width=[64])  # one value of it leaves no doubt who the partner is
    assert compare_sweeps([load_sweep("fixed"), load_sweep("one_width")]).paired[0].n == 6


def test_holm_is_over_all_the_sweeps(runs: Path) -> None:
    for i, name in enumerate(("one", "two", "three")):
        made(runs / name, 0.1 * i)
    comparison = compare_sweeps([load_sweep(name) for name in ("one", "two", "three")], "test_bits_per_byte")
    assert [row.value for row in comparison.paired] == ["two", "three"]
    assert all(row.p_holm >= row.test.p for row in comparison.paired)


def test_sweeps_of_one_name_are_called_by_their_folders(runs: Path) -> None:
    made(runs / "here/same")
    made(runs / "there/same")
    comparison = compare_sweeps([load_sweep(runs / "here/same"), load_sweep(runs / "there/same")])
    assert comparison.labels == ("runs/here/same", "runs/there/same")
    assert comparison.paired[0].test.p == 1.0


def test_what_cannot_be_compared(runs: Path) -> None:
    made(runs / "fixed")
    with pytest.raises(RunError, match="at least two sweeps"):
        compare_sweeps([load_sweep("fixed")])
    made(runs / "elsewhere", rate=[0.1])
    with pytest.raises(RunError, match="share no choice"):
        compare_sweeps([load_sweep("fixed"), load_sweep("elsewhere")])
    write_sweep(runs / "other", {"seed": [0]}, lambda _: {"reward": 1.0})
    with pytest.raises(
        RunError, match="share no metric: fixed has flops, test_bits_per_byte; other has reward"
    ):
        compare_sweeps([load_sweep("fixed"), load_sweep("other")])
    with pytest.raises(ConfigError, match="'reward' is no metric of the sweep 'fixed'"):
        compare_sweeps([load_sweep("fixed"), load_sweep("other")], "reward")
    write_sweep(runs / "empty", {"seed": [0]}, lambda _: None)
    with pytest.raises(RunError, match="'empty' has no results"):
        compare_sweeps([load_sweep("fixed"), load_sweep("empty")])


def test_terminal_and_page_say_the_same(runs: Path, tmp_path: Path) -> None:
    made(runs / "fixed")
    made(runs / "grown", -0.1)
    cells = [
        (cell({"rate": 0.001, "arm": EVIL, "seed": s}), {"test_bits_per_byte": 2.0 + s / 9}) for s in (0, 1)
    ]
    write_cells(runs / "evil", cells, {})
    comparison = compare_sweeps([load_sweep(name) for name in ("fixed", "grown", "evil")])
    console = Console(width=200, record=True, file=io.StringIO())
    print_sweep_comparison(comparison, console)
    told = console.export_text()
    page = write_sweep_comparison(comparison, tmp_path / "page.html").read_text()
    parsed = Checked(page)
    assert all(load.startswith("#") for load in parsed.loads) and "script" not in parsed.tags
    words = " ".join(parsed.words)
    for expected in ("difference from fixed", "family of all 2 tests", "fixed made 1 more choice"):
        assert expected in told and expected in words
    for place in comparison.shared:
        for row in place.rows:
            assert f"{row.mean:.4f}" in told and f"{row.mean:.4f}" in words
    assert not math.isnan(comparison.paired[0].interval.low)


def test_a_narrow_terminal_cuts_nothing(runs: Path) -> None:
    long = "a_name_that_is_long_enough_to_be_folded_in_two"
    made(runs / "fixed")
    made(runs / long, -0.1, rate=[0.003, 0.01])
    console = Console(width=80, record=True, file=io.StringIO())
    print_sweep_comparison(compare_sweeps([load_sweep("fixed"), load_sweep(long)]), console)
    lines = [line.split() for line in console.export_text().splitlines()]
    head = next(words for words in lines if "unpaired" in words)
    assert head[-1] == "unpaired"
    row = lines[lines.index(head) + 2]
    assert row[1] == "-0.1003" and row[-1] == "3" and row[-4] == "3"
