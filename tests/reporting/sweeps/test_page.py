from __future__ import annotations

import html
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cambia import rundir
from cambia.reporting import load_sweep, print_sweep, write_sweep_report
from cambia.reporting.sweeps.tables import number, probability, signed
from tests.pages import EVIL, Checked
from tests.sweep_records import Choice, Outcome, write_sweep

AXES = {"rate": [0.001, 0.003, 0.01], "growth": ["none", "depth"], "steps": [200], "seed": [0, 1, 2]}
NOISE = {0: 0.0, 1: 0.02, 2: -0.01}


def outcome(choice: Choice) -> Outcome:
    if choice["rate"] == 0.01 and choice["seed"] == 1:
        return "NonFiniteLossError: nan at step 7 [bold]\nlower --optimizer.learning_rate"
    if choice["rate"] == 0.01 and choice["seed"] == 2:
        return None
    value = 2 + 10 * choice["rate"] + NOISE[choice["seed"]] * (1 + 50 * choice["rate"])
    return {"test_bits_per_byte": value, "flops": 3.1e12, "tokens": 40_000, "backward_transfer": -value / 9}


def page_of(folder: Path, **chosen: str) -> tuple[str, Checked]:
    path = write_sweep_report(load_sweep(folder), **chosen)
    assert path == folder / rundir.REPORT
    text = path.read_text(encoding="utf-8")
    return text, Checked(text)


def told(folder: Path, width: int = 200, **chosen: str) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_sweep(load_sweep(folder), console, **chosen)
    return console.export_text()


def test_terminal_and_page_say_the_same(runs: Path) -> None:
    write_sweep(runs / "grid", AXES, outcome)
    text, parsed = page_of(runs / "grid")
    words, said = " ".join(parsed.words), told(runs / "grid")
    for expected in (
        "18 cells: 14 finished, 2 failed, 2 missing",
        "2.0135",  # mean of the first row, and its spread
        "0.0160",
        "1 failed, 1 missing",
        "The same in all cells: steps=200.",
        "difference from rate = 0.001",
        "with equal growth, steps and seed",
        "family of all 2 tests",
        "too short with fewer than 10 pairs",
        "NonFiniteLossError: nan at step 7 [bold] lower --optimizer.learning_rate",
        "rate=0.001 growth=none seed=2",
        "cambia sweep runs/grid/grid.yaml",
        "working on rate0.01-growthnone-steps200-seed2",
    ):
        assert expected in words, expected
        assert expected in said, expected
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Test bits per byte, lower is better",
        "By rate",
        "By growth",
        "Test bits per byte: difference from rate = 0.001",
        "Best and worst cells by test bits per byte",
        "Every metric, means",
        "Failures",
        "Missing",
        "Grid",
    ]
    assert "3.1 TFLOP" in words and "40k" in words


def test_a_page_stands_alone(runs: Path) -> None:
    write_sweep(runs / "grid", AXES, outcome)
    text, parsed = page_of(runs / "grid")
    assert all(load.startswith("#") for load in parsed.loads)
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert parsed.tags.count("figure") == 3
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)
    assert not re.search(r"#[0-9a-f]{6}", text.split("</style>")[1])  # every color follows the theme
    assert page_of(runs / "grid")[0] == text


def test_a_sweep_of_methods_shows_what_they_trade(runs: Path) -> None:
    def measured(choice: Choice) -> Outcome:
        lost = "abc".index(choice["method"]) + 0.01 * choice["seed"]
        return {"test_bits_per_byte": 2.0 + lost, "learning_loss": 2.0, "forgetting": lost}

    write_sweep(runs / "methods", {"method": ["a", "b", "c"], "seed": [0, 1]}, measured)
    text, parsed = page_of(runs / "methods")
    assert "<h2>What is learned against what is forgotten</h2>" in text
    assert parsed.tags.count("figure") == 3 and len(set(parsed.ids)) == len(parsed.ids)
    assert "forgetting, lower is better" in told(runs / "methods", metric="forgetting")


def test_another_metric_and_baseline(runs: Path) -> None:
    write_sweep(runs / "grid", AXES, outcome)
    chosen = {"metric": "backward_transfer", "baseline": "growth=depth"}
    words = " ".join(page_of(runs / "grid", **chosen)[1].words)
    said = told(runs / "grid", **chosen)
    for expected in (
        "ackward transfer, higher is better",
        "ackward transfer: difference from growth = depth",
        "Above zero is better than depth.",
        "the 1 test in this table",
    ):
        assert expected in words and expected in said
    assert "test_bits_per_byte, flops" in said  # the others are named


@pytest.mark.parametrize("result", [None, "it failed"])
def test_without_results_the_page_says_so(runs: Path, result: Outcome) -> None:
    write_sweep(runs / "grid", AXES, lambda _: result, progress=False)
    words = " ".join(page_of(runs / "grid")[1].words)
    said = told(runs / "grid")
    count = "18 missing" if result is None else "18 failed"
    assert count in words and count in said
    assert "No cell has a result with a number yet." in words
    assert "No progress file" in words and "No progress file" in said
    assert ("it failed" in said) == ("it failed" in words) == (result is not None)


def test_one_cell(runs: Path) -> None:
    write_sweep(runs / "one", {"seed": [0]}, lambda _: {"loss": 1.25})
    words = " ".join(page_of(runs / "one")[1].words)
    said = told(runs / "one")
    assert "n = 1: one value each" in words and "n = 1: one value each" in said
    assert "1.2500" in said and "difference" not in said


def test_only_the_seed_varies(runs: Path) -> None:
    write_sweep(runs / "seeds", {"seed": [0, 1, 2]}, lambda choice: {"loss": 1.0 + choice["seed"]})
    text, parsed = page_of(runs / "seeds")
    assert "By seed" in text and parsed.tags.count("figure") == 1
    assert "over the seeds 0, 1, 2" in told(runs / "seeds")


def test_everything_is_escaped(runs: Path) -> None:
    axes = {"arm": [EVIL, "$x_{1}$ & <b>", "[/] [red]"], "_hidden": [1, 2], "seed": [0, 1]}
    write_sweep(
        runs / "evil", axes, lambda c: EVIL if c["arm"] == EVIL else {"loss": 1.0 + c["seed"] + c["_hidden"]}
    )
    text, parsed = page_of(runs / "evil")
    assert "script" not in parsed.tags and html.escape(EVIL) in text
    said = told(runs / "evil")
    assert EVIL in said and "[/] [red]" in said and "$x_{1}$ & <b>" in said


def test_a_narrow_terminal_cuts_no_number(runs: Path) -> None:
    long = {"a name that is so long that it has to be folded, whatever the width " + end: 1.0 for end in "ab"}
    write_sweep(runs / "long", {"arm": list(long), "seed": [0, 1]}, lambda c: {"loss": 1.0 + c["seed"] / 7})
    said = told(runs / "long", width=60)
    assert "1.0714" in said and "0.1010" in said


def test_long_tables_are_shortened_in_the_terminal_alone(runs: Path) -> None:
    write_sweep(runs / "many", {"width": list(range(1, 60)), "seed": [0]}, lambda c: {"loss": 1 / c["width"]})
    assert "19 more rows stand in the report." in told(runs / "many")
    text, _ = page_of(runs / "many")
    assert "Table of 59 rows" in text


def test_how_numbers_are_written() -> None:
    assert number("test_bits_per_byte", 2.01) == "2.0100"
    assert number("loss", 1e-6) == "1e-06"
    assert number("flops", 3.1e12) == "3.1 TFLOP"
    assert number("parameters_end", 1_245_824) == "1.25M"
    assert number("loss", float("nan")) == number("loss", None) == "-"
    assert signed("loss", 0.5) == "+0.5000" and signed("loss", -0.5) == "-0.5000"
    assert [probability(p) for p in (0.0, 0.01234, 1.0, float("nan"))] == ["<0.0001", "0.012", "1", "-"]
