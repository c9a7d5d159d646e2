"""`cambia sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from cambia.cli.app import Settings, Whole, app, console, recipe_and_flags
from cambia.errors import ConfigError


@app.command
def sweep(
    *words: Settings,
    name: str | None = None,
    workers: Whole | None = None,
    only: Annotated[list[str] | None, Parameter(negative="")] = None,
    limit: Whole | None = None,
    retry: bool = False,
    ray: bool = False,
    ray_address: str | None = None,
    yes: bool = False,
    dry_run: bool = False,
) -> int:
    """Run every cell of a grid: `cambia sweep GRID.yaml [--any.field value ...]`.

    Stop it at any time; the same command goes on where it stopped, also beside another one on the same sweep.
    Cells that have a result are skipped.

    Args:
        words: the grid's YAML file, and settings for all cells.
        name: of the sweep's folder under runs/.
        workers: cells at a time.
        only: axis=value; only cells that match. May be given several times.
        limit: start at most so many cells now.
        retry: run cells again that have failed.
        ray: run the cells on a Ray of this machine's own.
        ray_address: run them on the Ray cluster there.
        yes: make the cells even if there are very many.
        dry_run: show cells and time, and run nothing.
    """
    from cambia.config import parse_flags
    from cambia.reporting import load_sweep, print_sweep, write_sweep_report
    from cambia.sweeps import Limits, run_grid

    grid, flags = recipe_and_flags(words, parse_flags)
    if grid is None:
        raise ConfigError("name a grid: cambia sweep GRID.yaml")
    for word, value in (("--workers", workers), ("--limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{word} {value}: expected a whole number from 1")
    limits = Limits(only or (), limit, retry)
    if dry_run:
        return _dry_run(Path(grid), flags, name, limits, workers, yes)
    folder = run_grid(
        Path(grid),
        name=name,
        overrides=flags,
        workers=workers,
        limits=limits,
        yes=yes,
        ray=ray_address or ray,
    )
    found = load_sweep(folder)
    write_sweep_report(found)
    print_sweep(found, console())
    return 1 if found.having("failed") else 0


def _dry_run(
    grid: Path, flags: dict[str, Any], name: str | None, limits: Any, workers: int | None, yes: bool
) -> int:
    from rich.table import Table

    from cambia import sweepdir
    from cambia.reporting.units import duration, plural
    from cambia.sweeps import cells_of, read_grid
    from cambia.sweeps.estimate import estimate_sweep
    from cambia.sweeps.grid import chosen
    from cambia.sweeps.launch import worker_count

    read = read_grid(grid, flags)
    cells = chosen(cells_of(read, yes=yes), limits.only, read)
    folder = sweepdir.sweep_folder(name or read.name or "sweep")
    results = sweepdir.SweepReader(folder).results() if sweepdir.is_sweep(folder) else {}
    table = Table("cell", "state", box=None)
    shown = cells[: limits.most or _SHOWN]
    for cell in shown:
        table.add_row(cell.name, results[cell.hash].status if cell.hash in results else "")
    out = console()
    out.print(table)
    if len(shown) < len(cells):
        out.print(f"and {len(cells) - len(shown):,} more")
    found = estimate_sweep(cells, results)
    count = workers or worker_count(read)
    trials = f", {read.search.trials} trials each" if read.search else ""
    out.print(
        f"{plural(found.cells, 'cell')}{trials}: {found.finished:,} finished, {found.failed:,} failed, "
        f"{found.left:,} to do"
    )
    if found.cell_seconds is not None and found.left:
        seconds = found.seconds(count) * (read.search.trials if read.search else 1)
        out.print(
            f"about {duration(found.cell_seconds)} a cell (by {found.measured}), about {duration(seconds)} "
            f"with {plural(count, 'worker')}. Nothing was run."
        )
    return 0


_SHOWN = 40
