"""Recipes, runs, data, and the state of this machine."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from cambia.cli.app import Settings, app, console, data_app, recipe_and_flags, runs_app
from cambia.errors import CambiaError, ConfigError, DataError


@app.command
def recipes(name: str | None = None, *, print: bool = False) -> None:
    """List the recipes with what each shows, or show one with every setting.

    Args:
        name: of a recipe.
        print: print its complete YAML, ready to be edited and run.
    """
    from rich.table import Table

    from cambia.config import did_you_mean, load_yaml, to_yaml
    from cambia.config import recipes as known_recipes

    known = known_recipes()
    if name is not None and name not in known:
        raise ConfigError(f"there is no recipe {name!r}{did_you_mean(name, known)}")
    if name is not None and print:
        from cambia.experiment.tree import plain_tree, read_experiment

        sys.stdout.write(to_yaml(plain_tree(read_experiment(name))))
        return
    table = Table("recipe", "what it shows", box=None)
    for each in [name] if name else known:
        table.add_row(each, str(load_yaml(known[each]).get("description", "")))
    console().print(table)


@runs_app.command(name="list")
def list_runs() -> None:
    """List the runs, oldest first, and the sweeps."""
    from rich.table import Table

    from cambia import rundir, sweepdir

    found, sweeps = rundir.list_runs(), sweepdir.list_sweeps()
    out = console()
    if not found and not sweeps:
        out.print(f"no runs under {rundir.runs_root()} yet; `cambia run` makes the first")
        return
    table = Table("run", "status", "steps", "parameters", "grown", box=None)
    for folder in found:
        reader = rundir.RunReader(folder)
        try:
            summary, grown = reader.summary() or {}, len(reader.growth())
        except (CambiaError, ValueError) as error:
            table.add_row(reader.name, f"unreadable: {error}", "", "", "")
            continue
        table.add_row(
            reader.name,
            "going" if reader.is_going() else summary.get("status", "interrupted"),
            str(summary.get("steps", "")),
            f"{summary['parameters_end']:,}" if "parameters_end" in summary else "",
            str(grown),
        )
    if found:
        out.print(table)
    for folder in sweeps:
        sweep = sweepdir.SweepReader(folder)
        try:
            cells, results = sweep.cells(), sweep.results().values()
        except (CambiaError, ValueError) as error:
            out.print(f"sweep {sweep.name}: unreadable: {error}", markup=False)
            continue
        states = Counter(result.status for result in results)
        done = f"{states['finished']:,} finished, {states['failed']:,} failed"
        out.print(f"sweep {sweep.name}: {len(cells):,} cells, {done}")


@runs_app.command(name="show")
def show_run(run: str) -> None:
    """Print a run's results.

    Args:
        run: its name or folder.
    """
    from cambia.reporting import load_run, print_summary

    print_summary(load_run(run), console())


@runs_app.command(name="delete")
def delete_run(run: str, *, yes: bool = False) -> None:
    """Delete a run or a sweep for good, after asking.

    Args:
        run: its name or folder.
        yes: do not ask.
    """
    import shutil

    from cambia.errors import RunError
    from cambia.rundir import RunReader
    from cambia.sweepdir import SweepReader, is_sweep

    reader = SweepReader(run) if is_sweep(run) else RunReader(run)
    if reader.is_going():
        raise RunError(f"{reader.name!r} is still going; stop it first (Ctrl-C there)")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting {reader.folder} needs an answer from a person, or --yes")
        try:
            answer = input(f"Delete {reader.folder} for good? [y/N] ")
        except EOFError:  # Ctrl-D
            answer = "no"
        if answer.strip().lower() not in ("y", "yes"):
            console().print("kept")
            return
    shutil.rmtree(reader.folder)
    console().print(f"deleted {reader.folder}")


@data_app.command(name="list")
def list_data() -> None:
    """List embedded domains, sets that can be fetched, and what lies in $CAMBIA_DATA."""
    from rich.table import Table

    from cambia.data.embedded import DOMAINS
    from cambia.data.fetch import FETCHABLE

    folder = os.environ.get("CAMBIA_DATA")
    table = Table("text", "how to name it", "note", box=None)
    for domain in DOMAINS:
        table.add_row(domain, f"source: {{type: embedded, domain: {domain}}}", "on this machine already")
    for name, public in FETCHABLE.items():
        table.add_row(name, f"cambia data fetch {name}", public.license)
    for path in sorted(Path(folder).iterdir()) if folder and Path(folder).is_dir() else []:
        table.add_row(path.name, f"source: {{type: files, path: {path.name}}}", "in $CAMBIA_DATA")
    out = console()
    out.print(table)
    if not folder:
        out.print("$CAMBIA_DATA is not set; it names the folder where your own and fetched sets lie")


@data_app.command
def prepare(*words: Settings) -> None:
    """Write the token files of a recipe's or a YAML file's text, and report what is in them.

    `cambia data prepare [RECIPE|FILE.yaml] [--any.field value ...]`; a run with the same text opens them.

    Args:
        words: recipe and settings.
    """
    from rich.table import Table

    from cambia.config import parse_flags
    from cambia.experiment import read_experiment
    from cambia.experiment.build import open_stream

    recipe, flags = recipe_and_flags(words, parse_flags)
    _, stream = open_stream(read_experiment(recipe or "first_growth", flags))
    table = Table("task", "split", "documents", "bytes", "tokens", "duplicate lines", "file", box=None)
    for task in stream.tasks:
        for split, counts in task.corpus.summary["splits"].items():
            table.add_row(
                task.name,
                split,
                f"{counts['num_documents']:,}",
                f"{counts['num_bytes']:,}",
                f"{counts['num_tokens']:,}",
                _duplicates(counts),
                str(task.corpus.folder / f"{split}.tokens.bin"),
            )
    console().print(table)


def _duplicates(counts: dict[str, int]) -> str:
    dropped, kept = counts.get("duplicate_lines_dropped", 0), counts.get("duplicate_lines_kept", 0)
    return f"{dropped:,} dropped" + (f", {kept:,} kept" if kept else "")


@data_app.command
def fetch(name: str, *, into: Path | None = None) -> None:
    """Download a public set that is one file, check its SHA-256, and put it where sources look.

    Args:
        name: of the set; `cambia data list` shows them.
        into: a folder, instead of $CAMBIA_DATA.
    """
    from cambia.data.fetch import fetch as fetch_set
    from cambia.data.fetch import public_file

    public_file(name)  # an unknown name is the first thing to say
    folder = into or (Path(os.environ["CAMBIA_DATA"]) if os.environ.get("CAMBIA_DATA") else None)
    if folder is None:
        raise DataError("where to? set $CAMBIA_DATA to a folder, or give --into FOLDER")
    console().print(f"{fetch_set(name, into=folder)}")


@app.command
def doctor() -> None:
    """Show versions, devices, threads, extras, sandbox and data of this machine."""
    from cambia.doctor import examine

    out = console()
    for line in examine():
        out.print(line, markup=False)  # an extra's name stands in brackets
