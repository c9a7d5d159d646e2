"""What every benchmark shares: a description of the machine, refusal of a busy one, and the result file.

Performance is measured as a ratio, side by side in one run: the sides alternate, each is warmed up, and
medians with a bootstrap interval are reported.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

BUSY_LOAD = 0.5


def arguments(
    description: str, presets: Sequence[str], more: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """The options that every benchmark takes, and more of its own: option -> its help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--anyway", action="store_true", help="run on a busy machine and mark the result")
    for name, help_text in (more or {}).items():
        parser.add_argument(name, help=help_text)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > BUSY_LOAD and not options.anyway and options.preset != "quick":
        parser.exit(
            2, f"the machine is busy (load {load:.2f} above {BUSY_LOAD}); wait, or mark it with --anyway\n"
        )
    torch.set_num_threads(options.threads)
    options.load = load
    return options


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


def write_result(script: str, options: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Write the result file beside its script, with the command that made it; `quick` writes none."""
    path = Path(script).with_suffix(".json")
    if options.preset not in ("full", "cpu"):
        path = path.with_name(f"{path.stem}_{options.preset}.json")
    content = {
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load_at_start": round(options.load, 2),
        "busy": options.load > BUSY_LOAD,
        **result,
    }
    if options.preset != "quick":
        path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_section(page: str, name: str, text: str) -> None:
    """Put a table into a page of docs/, between the markers of that name."""
    path = Path(__file__).parents[1] / "docs" / page
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = path.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{path} has no lines {begin.strip()} and {end}")
    path.write_text(before + begin + text + "\n" + rest[rest.index(end) :])
