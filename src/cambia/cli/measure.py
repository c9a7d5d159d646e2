"""`cambia bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cambia.cli.app import Settings, app, console
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@app.command
def bench(*words: Settings, preset: str | None = None, write: bool = False) -> int:
    """Measure Cambia, in a checkout of its repository: `cambia bench NAME --preset full`.

    Without a name it lists the benchmarks. A script keeps its result beside itself in benchmarks/, and
    the tables of docs/results.md and README follow. What else stands here goes to the script:
    `--threads 1`, `--anyway` on a busy machine (the result says so), and its own options, which
    `cambia bench NAME -- --help` shows.

    Args:
        words: a benchmark's name, then options of its script.
        preset: quick (does it run? nothing is kept; the default), full (the figures, on a CPU), or gpu.
        write: measure nothing, and write the tables anew from the results that are there.
    """
    from cambia.bench import PRESETS, find, write_pages

    if words and words[0].startswith("-"):
        raise ConfigError(f"name the benchmark before {words[0]}: cambia bench NAME {' '.join(words)}")
    if write:
        if preset or len(words) > 1:
            raise ConfigError("--write measures nothing: give it a benchmark's name at most")
        changed = write_pages(find(words[0]).name if words else None)
        for page in changed:
            console().print(f"renewed {page.name}")
        if not changed:
            console().print("the pages are up to date")
        return 0
    if not words:
        if preset:
            raise ConfigError(f"which one? name a benchmark: cambia bench NAME --preset {preset}")
        console().print(_list())
        for name, what in PRESETS.items():
            console().print(f"--preset {name}: {what}")
        return 0
    chosen = preset or "quick"
    return find(words[0], chosen).run(chosen, words[1:])


def _list() -> Table:
    from rich.table import Table

    from cambia.bench import benchmarks

    table = Table("benchmark", "what it measures", "presets", "results", box=None)
    for name, benchmark in benchmarks().items():
        told = []
        for preset in benchmark.kept:
            result = benchmark.result(preset)
            busy = ", busy machine" if result and result["busy"] else ""
            told.append(f"{preset}: {result['date']}{busy}" if result else f"{preset}: none yet")
        table.add_row(name, benchmark.title, ", ".join(benchmark.presets), "\n".join(told))
    return table
