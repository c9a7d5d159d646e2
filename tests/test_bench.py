"""Benchmarks: pages show the numbers of the result files, and `cambia bench` finds, runs and writes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cambia import bench
from cambia.config import merged
from cambia.errors import ConfigError
from cambia.sweepdir import Result
from cambia.sweeps import cells_of, read_grid
from tests.conftest import Call
from tests.markdown import ROOT

BENCHMARKS = ROOT / "benchmarks"
FILES = sorted(path for path in BENCHMARKS.iterdir() if path.suffix in bench.KINDS)
RESULTS = sorted(BENCHMARKS.glob("*.json"))
MACHINE = {
    "cpu": "an oak",
    "gpu": None,
    "cores": 2,
    "threads": 1,
    "python": "3.11.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
SAP = '''"""How fast sap rises.

More about it.
"""

PRESETS = {"quick": 1, "full": max(1, 2), "gpu": 3}


def markdown(result):
    return f"| metres |\\n|---|\\n| {result['metres']} |"


def headlines(result):
    return {"how far sap rises": f"{result['metres']} m"}


if __name__ == "__main__":
    import cambia, sys

    print(*sys.argv[1:], cambia.__file__)
    sys.exit(3)
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with one benchmark, which has a result, and pages without it."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "harness.py").touch()
    (tmp_path / "benchmarks" / "sap_rise.py").write_text(SAP)
    (tmp_path / "README.md").write_text(
        "Short.\n<!-- measured: begin -->\n9 m\n<!-- measured: end -->\nEnd.\n"
    )
    markers = "".join(
        f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("sap_rise", "sap_rise_gpu")
    )
    (tmp_path / "docs" / "results.md").write_text(f"Long.\n{markers}End.\n")
    result = {"command": "cambia bench sap_rise", "date": "2026-11-21", "machine": MACHINE, "busy": True}
    (tmp_path / "benchmarks" / "sap_rise.json").write_text(json.dumps({**result, "metres": 120}))
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("sap_rise", None)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/harness.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


# ---- this checkout -------------------------------------------------------------------------------


def test_pages_say_what_the_result_files_say() -> None:
    for page, text in bench.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is out of date: cambia bench --write"


def test_every_file_is_a_benchmark(harness: ModuleType) -> None:
    found = bench.benchmarks()
    assert list(found) == [path.stem for path in FILES if path.name != "harness.py"]
    for name, benchmark in found.items():
        if isinstance(benchmark, bench.Script):
            # What is read from the file without running it is what the script has.
            assert benchmark.presets == tuple(importlib.import_module(name).PRESETS)
        assert {"quick", "full"} <= set(benchmark.presets) <= set(bench.PRESETS)
        assert len(benchmark.title) > 20
    files = {benchmark.result_file(preset) for benchmark in found.values() for preset in benchmark.kept}
    assert set(RESULTS) <= files, "a result file that no benchmark makes"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_how_to_get_it_on_any_machine(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    name, _, preset = path.stem.rpartition("_")
    assert (name if preset in bench.PRESETS else path.stem) in result["command"]
    assert not re.search(r"[\s=](/|~|\.\.)", result["command"]), "a path of one machine"
    assert result.keys() >= {"date", "machine", "busy"}


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_name_it_lists_what_there_is(checkout: Path, command_line: Call) -> None:
    code, out, _ = command_line("bench")
    assert code == 0
    for shown in ("sap_rise", "How fast sap rises.", "quick, full, gpu", "2026-11-21, busy", "gpu: none yet"):
        assert shown in out


def test_a_script_gets_its_options_and_says_how_it_ended(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from cambia import cli

    for words, seen in (
        (["sap_rise"], "--preset quick"),
        (["sap_rise", "--preset", "full", "--parts", "p"], "--preset full --parts p"),
        (["sap_rise", "--", "--help"], "--preset quick --help"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *words])
        assert stop.value.code == 3
        assert capfd.readouterr().out == f"{seen} {Path(bench.__file__).parent / '__init__.py'}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sap_rice"], "there is no benchmark 'sap_rice'; did you mean 'sap_rise'?"),
        (["sap_rise", "--preset", "fast"], "sap_rise has no preset 'fast'; it has quick, full, gpu"),
        (["--preset", "full"], "cambia bench NAME --preset full"),
        (["--anyway", "sap_rise"], "name the benchmark before --anyway"),
        (["sap_rise", "--write", "--preset", "full"], "--write measures nothing"),
    ],
)
def test_mistakes_are_one_line(checkout: Path, command_line: Call, words: list[str], said: str) -> None:
    code, _, err = command_line("bench", *words)
    assert code == 2
    assert said in err and err.count("\n") == 1


def test_elsewhere_it_says_where_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Call
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks")
    for words in ([], ["step_speed"], ["--write"]):
        code, _, err = command_line("bench", *words)
        assert code == 2
        assert "checkout" in err and "pip install -e ." in err and err.count("\n") == 1


def test_write_measures_nothing_and_puts_results_into_the_pages(checkout: Path, command_line: Call) -> None:
    code, out, _ = command_line("bench", "sap_rise", "--write")
    assert code == 0 and "README.md" in out and "results.md" in out
    table = "| metres |\n|---|\n| 120 |"
    stamp = "`cambia bench sap_rise`, 2026-11-21; an oak, 2 cores, 1 thread; python 3.11.0, torch 2.13.0"
    missing = "Not measured yet: `cambia bench sap_rise --preset gpu`."
    page = (checkout / "docs" / "results.md").read_text()
    assert page.startswith(f"Long.\n<!-- sap_rise: begin -->\n{table}\n\n{stamp}")
    assert "On a busy machine.\n<!-- sap_rise: end -->" in page
    assert page.endswith(f"<!-- sap_rise_gpu: begin -->\n{missing}\n<!-- sap_rise_gpu: end -->\nEnd.\n")
    readme = (checkout / "README.md").read_text()
    assert "| how far sap rises | 120 m | `sap_rise`, on a busy machine |" in readme
    assert "9 m" not in readme and "GPU presets have not been run" in readme and readme.endswith("End.\n")
    assert "up to date" in command_line("bench", "--write")[1]


def test_a_page_without_a_place_for_a_table_is_named(checkout: Path, command_line: Call) -> None:
    (checkout / "docs" / "results.md").write_text("<!-- sap_rise: begin -->\n<!-- sap_rise: end -->\n")
    code, _, err = command_line("bench", "--write")
    assert code == 2 and "results.md lacks" in err and "<!-- sap_rise_gpu: end -->" in err


WAITS = """
import signal, sys, time
PRESETS = {"quick": 1}
def save(*_):
    time.sleep(0.6)
    print("saved")
    sys.exit(7)
signal.signal(signal.SIGINT, save)
print("ready")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "after"), [(signal.SIGINT, 7, "saved\n"), (signal.SIGTERM, 143, "")]
)
def test_a_script_ends_when_it_wants_to_and_with_its_caller(
    checkout: Path, number: signal.Signals, code: int, after: str
) -> None:
    script = checkout / "benchmarks" / "waits.py"
    script.write_text(WAITS)
    source = str(Path(bench.__file__).parents[1])
    call = f"from cambia.bench import Script; from pathlib import Path; import sys; \
sys.exit(Script.read(Path({str(script)!r})).run('quick', []))"
    with subprocess.Popen(
        [sys.executable, "-c", call],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert process.stdout.read() == after


# ---- what scripts share --------------------------------------------------------------------------


def test_a_result_file_holds_no_place_of_this_machine(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--preset", "full", "--threads", "1", "--anyway", "--parts", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "growth_peers.py"), *words])
    paths = {
        "--parts": harness.PathOption("a folder", "FOLDER"),
        "--peers-python": harness.PathOption("", ""),
    }
    options = harness.arguments("", ["quick", "full"], paths)
    assert options.parts == str(tmp_path)
    expected = "cambia bench growth_peers --preset full --threads 1 --anyway --parts FOLDER"
    assert options.command in (expected, expected.replace(" --threads 1", ""))  # one core: not worth saying


def test_another_checkout_is_not_measured(
    harness: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "step_speed.py")])
    with pytest.raises(SystemExit):
        harness.arguments("", ["quick", "full"])
    assert "call `cambia bench step_speed`" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_only_figures_are_kept(
    harness: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    kept = checkout / "benchmarks" / "sap_rise.json"
    before = kept.read_text()
    options = argparse.Namespace(preset=preset, command="cambia bench sap_rise --preset full", load=0.1)
    harness.keep(str(checkout / "benchmarks" / "sap_rise.py"), options, {"metres": 7})
    if preset == "quick":
        assert kept.read_text() == before and "nothing is kept" in capsys.readouterr().err
        return
    result: dict[str, Any] = json.loads(kept.read_text())
    assert (result["metres"], result["busy"], result["command"]) == (7, False, options.command)
    assert "| 7 |" in (checkout / "docs" / "results.md").read_text()
    assert "| 7 m |" in (checkout / "README.md").read_text()


# ---- grids ---------------------------------------------------------------------------------------


def cells(*, seeds: int = 3, grown: float = 0.5) -> dict[str, Any]:
    """The result of a benchmark that is a grid."""
    found = []
    for seed in range(seeds):
        for method, loss in (("fixed", 2.0 + seed), ("grown", 2.0 + seed - grown - 0.01 * seed)):
            choice = {"method": method, "seed": seed}
            numbers = {"test_bits_per_byte": loss, "flops": 3e12, "parameters": 1_000_000}
            one = Result(f"{method}-{seed}", f"{method}{seed}", choice, "finished", numbers)
            found.append(dataclasses.asdict(one))
    return {"cells": found}


def test_a_grid_is_a_benchmark() -> None:
    found = bench.find("growth_or_fixed", "full")
    shown = found.markdown(cells())
    assert "| fixed | 3.0000 ± 1.0000 (3) | 3 TFLOP" in shown
    assert "| grown | -0.5100 | -0.5200 to -0.5000 | 3 |" in shown
    (said,) = found.headlines(cells()).values()
    assert said == "-0.5100 (-0.5200 to -0.5000), 3 pairs"


@pytest.mark.parametrize("preset", bench.find("growth_or_fixed").presets)
def test_the_cells_of_a_grid_are_experiments(preset: str) -> None:
    said = bench._sweep_file(BENCHMARKS / "growth_or_fixed.yaml")
    found = cells_of(read_grid(merged(said.grid, said.presets[preset])))
    assert len(found) == (2 if preset == "quick" else 6)


def test_a_grids_benchmark_takes_few_options() -> None:
    with pytest.raises(ConfigError, match=r"--training\.steps is no option"):
        bench.find("growth_or_fixed").run("quick", ["--training.steps", "3"])
