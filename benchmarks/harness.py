"""What every benchmark shares: its options, the machine, refusal of a busy one, tables, and the result file.

Performance is measured as a ratio, side by side in one run: the sides alternate, each is warmed up, and
medians with a bootstrap interval are reported.

A benchmark is a script with a dictionary `PRESETS` and a function `markdown` (`cambia.bench` says more):

    options = arguments(__doc__, PRESETS)
    result = ...                          # plain JSON
    print(markdown(result))
    keep(__file__, options, result)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from cambia import bench
from cambia.bench import table as table
from cambia.files import write_text

BUSY_LOAD = 0.5

Preset = TypeVar("Preset")


@dataclass(frozen=True)
class PathOption:
    """An option that names a place on the machine."""

    help: str
    shown: str
    """What stands in help and result file instead: a result says how to call it, not where things lay."""


def arguments(
    description: str | None,
    presets: Iterable[str],
    paths: Mapping[str, PathOption] | None = None,
    *,
    clocked: bool = True,
) -> argparse.Namespace:
    """The options that every benchmark takes, and more of its own, `--like-this`.

    Args:
        clocked: whether a clock is among the figures; if not, a busy machine does not matter.
    """
    script, paths = Path(sys.argv[0]).resolve(), paths or {}
    name = script.stem
    parser = argparse.ArgumentParser(
        prog=f"cambia bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=tuple(presets), default="quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--anyway", action="store_true", help="run on a busy machine and mark the result")
    for option, path in paths.items():
        parser.add_argument(option, metavar=path.shown, help=path.help)
    options = parser.parse_args()
    if script.parent != bench.FOLDER.resolve():
        parser.exit(
            2, f"{script} would measure the package of {bench.__file__}; call `cambia bench {name}` instead\n"
        )
    load = os.getloadavg()[0] if clocked else 0.0
    if load > BUSY_LOAD and not options.anyway and options.preset != "quick":
        parser.exit(
            2, f"the machine is busy (load {load:.2f} above {BUSY_LOAD}); wait, or mark it with --anyway\n"
        )
    torch.set_num_threads(options.threads)
    options.load = load
    options.command = _command(name, options, paths)
    return options


def in_parts(
    description: str | None, presets: Mapping[str, Preset]
) -> tuple[argparse.Namespace, Preset, Path, Parts]:
    """How a benchmark begins that trains on the corpora for hours, by no clock.

    Args:
        presets: dataclasses; their `workers` change nothing that is measured.

    Returns:
        The options, the preset, where the corpora are, and what has been measured of it already.
    """
    told = PathOption("where what was measured is kept", "FOLDER")
    options = arguments(description, presets, {"--parts": told}, clocked=False)
    if "CAMBIA_DATA" not in os.environ:
        sys.exit("the data of this benchmark is found by CAMBIA_DATA, which is not set")
    preset = presets[options.preset]
    parts = Parts(options.parts, {**asdict(preset), "workers": None})
    return options, preset, Path(os.environ["CAMBIA_DATA"]), parts


def _command(name: str, options: argparse.Namespace, paths: Mapping[str, PathOption]) -> str:
    """How to call it so again, on any machine."""
    words = ["cambia bench", name, "--preset", options.preset]
    if options.threads != os.cpu_count():
        words += ["--threads", str(options.threads)]
    if options.anyway:
        words.append("--anyway")
    for option, path in paths.items():
        if vars(options)[option.strip("-").replace("-", "_")]:
            words += [option, path.shown]
    return " ".join(words)


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def interleaved(
    one: Callable[[], float], other: Callable[[], float], *, pairs: int, warmup: int = 3
) -> tuple[list[float], list[float]]:
    """Run two timed sides in turn, the order alternating; each returns its own seconds."""
    for _ in range(warmup):
        one(), other()
    first: list[float] = []
    second: list[float] = []
    for i in range(pairs):
        if i % 2:
            second.append(other())
            first.append(one())
        else:
            first.append(one())
            second.append(other())
    return first, second


def median_interval(values: Sequence[float], *, resamples: int = 4000) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval (percentile method, fixed seed)."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(resamples))
    return (
        statistics.median(values),
        medians[int(0.025 * resamples)],
        medians[int(0.975 * resamples)],
    )


class Parts:
    """Pieces of a long measurement, each a file of its own in a folder: what is there is not measured again.

    Without a folder nothing is kept. A folder belongs to one description of what is measured and on what; the
    benchmark refuses it with another one.
    """

    def __init__(self, folder: str | None, description: Mapping[str, Any]):
        self.folder = Path(folder) if folder else None
        if not self.folder:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(description))
        if self.once("description", lambda: mine) != mine:
            raise SystemExit(f"--parts {folder} was measured with other settings: name another folder")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, which must be plain JSON, from the folder if it is there."""
        if not self.folder:
            return measure()
        path = self.folder / f"{name}.json"
        if not path.exists():
            written = path.with_suffix(".part")
            written.write_text(json.dumps(measure()))
            written.replace(path)
        return json.loads(path.read_text())


def spread(values: Sequence[float], digits: int) -> str:
    """The mean of signed differences, with the least and the largest of them."""
    mean, least, most = (f"{v:+.{digits}f}" for v in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def over_seeds(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation; nothing where a seed has none."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return ""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def seeds_told(count: int) -> str:
    """Over how many seeds `over_seeds` was taken, and what it gives."""
    return "1 seed" if count == 1 else f"{count} seeds, mean ± standard deviation"


def keep(script: str, options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Keep a result beside its script, with the command that made it, and renew the pages.

    `quick` says only whether a script runs: nothing of it is kept.
    """
    name = Path(script).stem
    if options.preset == "quick":
        print(f"nothing is kept of quick; the figures: cambia bench {name} --preset full", file=sys.stderr)
        return
    content = {
        "command": options.command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load_at_start": round(options.load, 2),
        "busy": options.load > BUSY_LOAD,
        **result,
    }
    path = bench.find(name, options.preset).result_file(options.preset)
    write_text(path, json.dumps(content, indent=1) + "\n")
    for written in [path, *bench.write_pages(name)]:
        print(f"wrote {written.relative_to(bench.FOLDER.parent)}", file=sys.stderr)
