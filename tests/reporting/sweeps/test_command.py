"""`cambia report` and `cambia compare` with sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sweep_records import Choice, Outcome, write_sweep

Call = Callable[..., tuple[int, str, str]]


def outcome(choice: Choice) -> Outcome:
    return {"test_bits_per_byte": 2 + choice["rate"] + 0.01 * choice["seed"], "flops": 1e9}


@pytest.fixture
def sweeps(runs: Path) -> Path:
    for name in ("rates", "again"):
        write_sweep(runs / name, {"rate": [0.1, 0.2], "seed": [0, 1]}, outcome)
    write_sweep(runs / "nothing_yet", {"rate": [0.1]}, lambda _: None)
    write_sweep(runs / "failed", {"rate": [0.1]}, lambda _: "it failed")
    return runs


def test_report_takes_a_sweep(sweeps: Path, command_line: Call) -> None:
    code, out, _ = command_line("report", "rates")
    assert code == 0 and "4 cells: 4 finished" in out and "difference from rate = 0.1" in out
    assert "<h2>By rate</h2>" in (sweeps / "rates/report.html").read_text()
    code, out, _ = command_line("report", "runs/rates", "--metric", "flops", "--baseline", "rate=0.2")
    assert code == 0 and "flops: difference from rate = 0.2" in out
    for name, words in (("nothing_yet", "1 missing"), ("failed", "it failed")):
        code, out, _ = command_line("report", name)
        assert code == 0 and words in out


def test_report_still_takes_a_run(make_run: Callable[..., Path], command_line: Call) -> None:
    make_run("plain", steps=5)
    code, out, _ = command_line("report", "plain")
    assert code == 0 and "english" in out


def test_compare_takes_sweeps(sweeps: Path, command_line: Call) -> None:
    code, out, _ = command_line("compare", "rates", "again")
    assert code == 0 and "difference from rates" in out and "page: comparison.html" in out
    assert Path("comparison.html").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", "rats"], "did you mean the sweep 'rates'"),
        (["report", "zzz"], "no run 'zzz'"),
        (["report", "rates", "--metric", "test_bits"], "did you mean 'test_bits_per_byte'"),
        (["report", "rates", "--baseline", "rate=5"], "rate has no value '5'"),
        (["report", "rates", "--baseline", "seed=0"], "pairs agree on it"),
        (["report", "nothing_yet", "--metric", "loss"], "has no results to read yet"),
        (["report", "plain", "--metric", "loss"], "--metric is for sweeps and 'plain' is a run"),
        (["compare", "rates"], "at least two sweeps"),
        (["compare", "rates", "plain"], "'rates' is a sweep and 'plain' is a run"),
        (["compare", "rates", "zzz"], "no run 'zzz'"),
        (["compare", "rates", "nothing_yet"], "has no results to read yet"),
        (["compare", "plain", "plain", "--metric", "loss"], "--metric is for sweeps"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    sweeps: Path, make_run: Callable[..., Path], command_line: Call, words: list[str], expected: str
) -> None:
    make_run("plain", steps=2)
    code, _, err = command_line(*words)
    assert code == 2 and expected in err
    assert len(err.strip().splitlines()) == 1
