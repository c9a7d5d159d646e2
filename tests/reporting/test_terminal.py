from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cambia.reporting import load_run, print_summary, units, write_report

Make = Callable[..., Path]


def printed(folder: Path, *, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(load_run(folder), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_numbers_are_the_runs(make_run: Make) -> None:
    folder = make_run(steps=50, growth_steps=(30, 80))
    run = load_run(folder)
    write_report(run)
    text = printed(folder)
    for row in run.task_matrix().rows:
        for bits in row:
            assert f"{bits:.3f}" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    metrics = run.transfer_metrics()
    assert metrics is not None
    assert lines["learned"] == [f"{value:.3f}" for value in metrics.learned]
    assert lines["forgotten"] == [f"{value:.3f}" for value in metrics.forgotten]
    assert lines["parameters"] == ["1,049,216", "→", f"{run.parameters_end:,}"]
    assert f"150 steps, {run.tokens:,} tokens, {units.flops(run.flops)}" in text
    assert "3 min 12 s" in text
    assert "runs/rings/report.html" in text
    assert 'cambia generate rings --prompt "Once upon a time"' in text


def test_rows_and_diagonal(make_run: Make) -> None:
    text = printed(make_run(steps=5))
    rows = [line for line in text.splitlines() if line.startswith(("untrained", "after"))]
    assert [re.findall(r"\[(.*?)\]", row) for row in rows] == [[], ["2.210"], ["1.520"], ["1.870"]]


def test_growth_is_told(make_run: Make) -> None:
    text = printed(make_run(steps=50, growth_steps=(30,)))
    assert re.search(r"30 +widen_ffn x1.5 +1.05M → 1.52M +5.1000 → 5.1000 +3.1e-07", text)


@pytest.mark.parametrize("count", [1, 3, 6, 14])
@pytest.mark.parametrize("name", ["short{}", "a name that is really far too long {}"])
def test_it_fits_80_columns(make_run: Make, count: int, name: str) -> None:
    tasks = [name.format(i) for i in range(count)]
    text = printed(make_run(tasks=tasks, steps=3, growth_steps=(2,)))
    assert max(map(len, text.splitlines())) <= 80
    for bits in load_run("rings").task_matrix().rows[-1]:
        assert f"{bits:.3f}" in text


def test_markup_in_names_is_text(make_run: Make) -> None:
    assert "after [red]x[/]" in printed(make_run(tasks=["[red]x[/]"], steps=2))


def test_unfinished_runs(make_run: Make) -> None:
    killed = printed(make_run("killed", summary=None, steps=20, stop_at=30))
    assert "interrupted" in killed
    assert "1 of 3 tasks are done" in killed
    assert "cambia run --resume killed" in killed
    assert "cambia report killed   (not written yet)" in killed
    assert "going" in printed(make_run("alive", going=True, summary=None, stop_at=0))


def test_skipped_steps_are_told(make_run: Make) -> None:
    assert "3 steps, for a loss that was not finite" in printed(make_run(steps=5, skipped=3))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.count(999), "999"),
        (units.count(999_600), "1M"),
        (units.count(1_245_824), "1.25M"),
        (units.flops(0), "0 FLOP"),
        (units.flops(3.14e15), "3.14 PFLOP"),
        (units.size(1_500_000), "1.5 MB"),
        (units.duration(0.25), "0.25 s"),
        (units.duration(192.4), "3 min 12 s"),
        (units.duration(7500), "2 h 05 min"),
        (units.jump(2.0, 2.0), "0"),
        (units.jump(2.0, 2.5), "+0.5"),
        (units.jump(None, 2.5), "not measured"),
        (units.error(3.14e-7), "3.1e-07"),
        (units.plural(1, "step"), "1 step"),
        (units.plural(1200, "step"), "1,200 steps"),
        (units.operator({"type": "my.module:Bend", "to": 8, "soft": True}, full=True), "Bend to 8 soft=True"),
    ],
)
def test_how_numbers_are_written(written: str, expected: str) -> None:
    assert written == expected
