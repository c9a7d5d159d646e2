"""Benchmarks: which a checkout has, how one is run, and how its numbers get into the pages.

A script of `benchmarks/` is a benchmark if it declares `PRESETS`, a dictionary of which only the names are
read here; its first line says what it measures. It keeps what it measured as JSON beside itself, and

    markdown(result)     makes the tables of such a file, which go to docs/results.md
    headlines(result)    is the same in rows for README: what was measured -> what came out; may be left out

so that the pages can be written anew without measuring. No number gets into these tables in another way.
A YAML file of `benchmarks/` is a grid of runs (`SweepFile`), with the table that follows from it. Another
kind of benchmark is a subclass of `Benchmark`, named in `KINDS`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

from cambia.config import FieldError, build, did_you_mean, explain, load_yaml, merged, parse_flags
from cambia.errors import ConfigError, SweepError
from cambia.files import read_json, write_text
from cambia.reporting.sweeps.cells import Cell, Row, label
from cambia.reporting.sweeps.sweep import Sweep
from cambia.reporting.sweeps.tables import name_of, paired_table, signed, summary
from cambia.reporting.units import plural
from cambia.sweepdir import Result, SweepReader

FOLDER = Path(__file__).parents[2] / "benchmarks"
"""Where it is in a checkout; an installed package has none."""
PRESETS = {
    "quick": "does it run? A minute, or up to half an hour; nothing is kept",
    "long": "the figures of small models that train long, on a CPU; takes hours",
    "middle": "the same with two thirds of the text, on a CPU; takes an hour or two",
    "choices": "what else was tried, on a CPU; takes hours and goes on where it was stopped",
    "headline": "the figures, on a CPU; takes hours and goes on where it was stopped",
    "full": "the figures, on a CPU; may take an hour, or a day where there is a headline preset",
    "gpu": "the figures, on a GPU",
}


@dataclass(frozen=True)
class Benchmark(ABC):
    """Something that is measured by name."""

    path: Path
    """Its own file in the folder of benchmarks; result files are beside it."""
    title: str
    """What it measures, in a line."""
    presets: tuple[str, ...]

    @classmethod
    @abstractmethod
    def read(cls, path: Path) -> Self | None:
        """The benchmark in a file, without running it; None if the file is something else."""

    @abstractmethod
    def run(self, preset: str, options: Sequence[str]) -> int:
        """Measure; unless it is `quick`, keep the result and renew the pages. Returns an exit code."""

    @abstractmethod
    def markdown(self, result: Mapping[str, Any]) -> str:
        """The tables of a result."""

    @abstractmethod
    def headlines(self, result: Mapping[str, Any]) -> Mapping[str, str]:
        """What was measured -> what came out, a row each of README's table."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return self.path.stem

    @property
    def kept(self) -> tuple[str, ...]:
        """The presets whose results are kept."""
        return tuple(preset for preset in self.presets if preset != "quick")

    def result_file(self, preset: str) -> Path:
        """Where the result of a preset is kept."""
        return self.path.with_name(f"{self.name}.json" if preset == "full" else f"{self.name}_{preset}.json")

    def result(self, preset: str) -> dict[str, Any] | None:
        """What was measured last, None if nothing was."""
        path = self.result_file(preset)
        return read_json(path) if path.exists() else None

    @property
    def shown(self) -> dict[str, Any] | None:
        """The result that README shows, None if nothing was measured."""
        found = (self.result(preset) for preset in ("headline", "full", "long"))
        return next((result for result in found if result), None)

    def _import(self, module: str) -> ModuleType:
        # Scripts import harness.py and each other by name, as they do when they are run.
        if str(self.path.parent) not in sys.path:
            sys.path.insert(0, str(self.path.parent))
        return importlib.import_module(module)

    def section(self, preset: str) -> str:
        """What docs/results.md says about a preset: tables, machine, versions, command, date."""
        result = self.result(preset)
        if result is None:
            return f"Not measured yet: `cambia bench {self.name} --preset {preset}`."
        return f"{self.markdown(result)}\n\n{_stamp(result)}"


class Script(Benchmark):
    """A script that measures in a process of its own."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A Python file with PRESETS."""
        # The file is parsed and not imported: that would load torch.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
                continue
            if [ast.unparse(target) for target in node.targets] == ["PRESETS"]:
                presets = [ast.literal_eval(key) for key in node.value.keys if key]
                return cls(path, (ast.get_docstring(tree) or "").partition("\n")[0], tuple(presets))
        return None

    def run(self, preset: str, options: Sequence[str]) -> int:
        """Run the script with this interpreter; its output is its own."""
        # What is measured is the package that was called, whatever else is installed.
        search = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(self.path), "--preset", preset, *options]
        with subprocess.Popen(command, env=environment) as process:
            before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            try:
                return _ended(process)
            finally:
                signal.signal(signal.SIGTERM, before)

    def markdown(self, result: Mapping[str, Any]) -> str:
        """What the script's own function makes of it."""
        return self._module().markdown(result)

    def headlines(self, result: Mapping[str, Any]) -> Mapping[str, str]:
        """What the script's own function makes of it; nothing where it has none."""
        headlines = vars(self._module()).get("headlines")
        return headlines(result) if headlines else {}

    def _module(self) -> ModuleType:
        return self._import(self.name)


@dataclass
class SweepFile:
    """What a YAML file of `benchmarks/` says. The string under a field is its help."""

    title: str
    """What is measured, in a line."""
    grid: dict[str, Any]
    """As for `cambia sweep`."""
    presets: dict[str, dict[str, Any]]
    """Preset -> what it lays over the grid."""
    metrics: list[str]
    """The columns of the table; differences are taken of the first."""
    compare: str
    """``"AXIS=VALUE"``: what the other values of an axis are compared with."""


class Grid(Benchmark):
    """A grid of runs; it goes on where it was stopped."""

    @functools.cached_property
    def said(self) -> SweepFile:
        """What its file says."""
        return _sweep_file(self.path)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A YAML file with a grid and presets."""
        said = _sweep_file(path)
        return cls(path, said.title, tuple(said.presets))

    def run(self, preset: str, options: Sequence[str]) -> int:
        """Run the cells that have no result yet, in the folder of a sweep of this benchmark's name."""
        from cambia.sweeps import Limits, run_grid

        said = self.said
        flags = parse_flags(options)
        unknown = sorted(flags.keys() - {"workers", "retry"})
        if unknown:
            raise ConfigError(
                f"--{unknown[0]} is no option of a sweep's benchmark; --workers and --retry are"
            )
        workers = flags.get("workers")
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise ConfigError(f"--workers {workers}: expected a whole number from 1")
        harness = self._import("harness")
        load = os.getloadavg()[0]
        folder = run_grid(
            merged(said.grid, said.presets[preset]),
            name=f"bench-{self.name}-{preset}",
            workers=workers,
            limits=Limits(retry=bool(flags.get("retry"))),
        )
        sweep = SweepReader(folder)
        results = sweep.results()
        cells = [asdict(results[cell.hash]) for cell in sweep.cells()]
        failed = [cell for cell in cells if cell["status"] == "failed"]
        if failed:
            raise SweepError(
                f"{len(failed)} of {len(cells)} cells failed, the first: {failed[0]['error']}. Nothing was "
                f"kept; `cambia report {folder.name}` shows them, --retry runs them again"
            )
        command = f"cambia bench {self.name} --preset {preset}"
        about = SimpleNamespace(preset=preset, command=command, load=load)
        harness.keep(str(self.path), about, {"cells": cells})
        return 0

    def markdown(self, result: Mapping[str, Any]) -> str:
        """Means and spreads of each metric, and the paired differences of the first."""
        said = self.said
        sweep = self._sweep(result)
        found = [sweep.table(metric) for metric in said.metrics]
        axes = sweep.varied
        head = [*axes, *(f"{name_of(metric)} (n)" for metric in said.metrics)]
        rows = [
            [*(label(same[0].choice[axis]) for axis in axes), *map(_summary, said.metrics, same)]
            for same in zip(*(each.rows for each in found), strict=True)
        ]
        axis, baseline = self._baseline(sweep)
        paired = paired_table(sweep.paired(said.metrics[0], axis, baseline))
        parts = [table(head, rows), f"{paired.title}:", table(paired.head, paired.rows), *paired.notes]
        return "\n\n".join(parts)

    def headlines(self, result: Mapping[str, Any]) -> Mapping[str, str]:
        """The paired differences, one row each."""
        said, sweep = self.said, self._sweep(result)
        axis, baseline = self._baseline(sweep)
        metric = said.metrics[0]
        return {
            f"{said.title.rstrip('.')}: {label(row.value)} less {label(baseline)}": (
                f"{signed(metric, row.mean)} ({signed(metric, row.interval.low)} to "
                f"{signed(metric, row.interval.high)}), {plural(row.n, 'pair')}"
            )
            for row in sweep.paired(metric, axis, baseline).rows
        }

    def _sweep(self, result: Mapping[str, Any]) -> Sweep:
        results = [Result(**cell) for cell in result["cells"]]
        return Sweep.of(self.name, [Cell(one.cell, one.hash, one.choice, one) for one in results])

    def _baseline(self, sweep: Sweep) -> tuple[str, Any]:
        found = sweep.baseline(self.said.compare)
        assert found is not None
        return found


def _sweep_file(path: Path) -> SweepFile:
    try:
        return build(SweepFile, load_yaml(path))
    except FieldError as error:
        raise explain(error, source=str(path), flags={}) from None


def _summary(metric: str, row: Row) -> str:
    mean, spread, n = summary(metric, row)
    return f"{mean} ± {spread} ({n})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


KINDS: dict[str, type[Benchmark]] = {".py": Script, ".yaml": Grid}
"""Ending of a file in `benchmarks/` -> what it is."""


def benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of this checkout by their names."""
    if not (FOLDER / "harness.py").is_file():
        raise ConfigError(
            "benchmarks are in a checkout of Cambia's repository, and this is an installed package: get the "
            "source, run `pip install -e .` in it, and call `cambia bench` from that environment"
        )
    files = [path for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS]
    found = [KINDS[path.suffix].read(path) for path in files]
    return {benchmark.name: benchmark for benchmark in found if benchmark}


def find(name: str, preset: str = "quick") -> Benchmark:
    """A benchmark that has this preset."""
    known = benchmarks()
    if name not in known:
        raise ConfigError(f"there is no benchmark {name!r}{did_you_mean(name, known)}")
    if preset not in known[name].presets:
        raise ConfigError(f"{name} has no preset {preset!r}; it has {', '.join(known[name].presets)}")
    return known[name]


def pages(only: str | None = None) -> dict[Path, str]:
    """docs/results.md and README.md as they should be by the result files.

    Args:
        only: of docs/results.md, renew the sections of this benchmark.
    """
    found = benchmarks()
    results, readme = FOLDER.parent / "docs" / "results.md", FOLDER.parent / "README.md"
    said = results.read_text(encoding="utf-8")
    for benchmark in found.values():
        for preset in benchmark.kept if only in (None, benchmark.name) else ():
            said = _filled(said, benchmark.result_file(preset).stem, benchmark.section(preset), results)
    short = _filled(readme.read_text(encoding="utf-8"), "measured", _measured(found.values()), readme)
    return {results: said, readme: short}


def write_pages(only: str | None = None) -> list[Path]:
    """Write the pages by the result files; returns those that changed."""
    there = {page: text for page, text in pages(only).items() if page.read_text(encoding="utf-8") != text}
    for page, text in there.items():
        write_text(page, text)
    return list(there)


def _measured(found: Iterable[Benchmark]) -> str:
    """README's table, and what it was measured on."""
    rows, machines, on_gpu = [], set(), False
    for benchmark in found:
        on_gpu |= benchmark.result_file("gpu").exists()
        result = benchmark.shown
        headlines = benchmark.headlines(result) if result else {}
        if not result or not headlines:
            continue
        busy = ", on a busy machine" if result["busy"] else ""
        rows += [f"| {what} | {value} | `{benchmark.name}`{busy} |" for what, value in headlines.items()]
        machine = result["machine"]
        machines.add(f"{plural(machine['cores'], 'core')} of {machine['cpu']}, torch {machine['torch']}")
    below = f"On {'; '.join(sorted(machines))}."
    if not on_gpu:
        below += " The GPU presets have not been run."
    return "\n".join(["| what | result | benchmark |", "|---|---|---|", *rows, "", below])


def _stamp(result: Mapping[str, Any]) -> str:
    """How a result came about, in a line."""
    machine = result["machine"]
    what = [
        machine["cpu"],
        *filter(None, [machine["gpu"]]),
        plural(machine["cores"], "core"),
        plural(machine["threads"], "thread"),
    ]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers"))
    busy = " On a busy machine." if result["busy"] else ""
    return f"`{result['command']}`, {result['date']}; {', '.join(what)}; {versions}.{busy}"


def _filled(page: str, name: str, text: str, path: Path) -> str:
    """A page with a text between the markers of this name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ConfigError(
            f"{path} lacks the lines `{begin.strip()}` and `{end}`: add them where it should stand"
        )
    return f"{before}{begin}{text}\n{rest[rest.index(end) :]}"


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that ends when it wants to."""
    while True:
        # Ctrl-C reaches the script as well, which may have something to save first.
        with contextlib.suppress(KeyboardInterrupt):
            code = process.wait()
            return code if code >= 0 else 128 - code
