"""The command line: verbs, each of which imports what it needs when it is called.

A user's mistake is one line on stderr and exit code 2, never a traceback; an interrupted run exits with
130 after saving.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from cambia import __version__
from cambia.errors import CambiaError, ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

app = App(name="cambia", version=__version__, help="Language models that keep growing.")
runs_app = App(name="runs", help="List, show and delete runs.")
data_app = App(name="data", help="List, prepare and fetch text.")
app.command(runs_app)
app.command(data_app)

Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The `cambia` command; `words` are what stands behind it on the command line."""
    # Progress bars of other libraries would stand between ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(
            sys.argv[1:] if words is None else words,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        _fail(f"{error} (`cambia --help` lists commands, `cambia COMMAND --help` their options)")
    except CambiaError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader went away (`cambia recipes | head`): nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("cambia: stopped", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"cambia: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


# ---- run -----------------------------------------------------------------------------------------


@app.command
def run(
    *words: Settings,
    name: str | None = None,
    resume: str | None = None,
    dry_run: bool = False,
) -> int:
    """Train: `cambia run [RECIPE|FILE.yaml] [--any.field value ...]`.

    Without a recipe it runs `first_growth`. Every setting can be given as a dotted flag
    (`--training.steps 200`, `--growth.rules.0.then.factor 2`); `cambia recipes NAME --print` shows them all.

    Args:
        words: recipe and settings.
        name: name of the run directory under runs/.
        resume: go on with this run.
        dry_run: show sizes, cost and planned growth, and train nothing.
    """
    from cambia.config import parse_flags

    recipe, flags = _recipe_and_flags(words, parse_flags)
    if dry_run:
        return _dry_run(recipe, flags)
    if resume is not None and (recipe or name):
        raise ConfigError("--resume goes on with a run as it is: leave out the recipe and --name")

    from cambia.experiment import train
    from cambia.reporting import load_run, print_summary, write_report

    folder = train(recipe or "first_growth", name=resume or name, resume=resume is not None, overrides=flags)
    finished = load_run(folder)
    write_report(finished)
    print_summary(finished, _console())
    return 0 if finished.status == "finished" else 130


def _recipe_and_flags(words: tuple[str, ...], parse: Any) -> tuple[str | None, dict[str, Any]]:
    if words and not words[0].startswith("-"):
        return words[0], parse(words[1:])
    return None, parse(words)


def _dry_run(recipe: str | None, flags: dict[str, Any]) -> int:
    from rich.table import Table

    from cambia.experiment import estimate, read_experiment
    from cambia.reporting.units import operators

    result = estimate(read_experiment(recipe or "first_growth", flags))
    table = Table("from step", "what", "parameters", "FLOPs per token", "memory while growing", box=None)
    for phase in result.phases:
        table.add_row(
            "unknown" if phase.at_step is None else f"{phase.at_step:,}",
            operators(phase.operators, full=True) if phase.operators else "start",
            f"{phase.parameters:,}",
            f"{phase.flops_per_token:.3g}",
            f"{phase.growth_bytes / 2**20:,.1f} MiB" if phase.growth_bytes else "",
        )
    console = _console()
    console.print(table)
    console.print(
        f"{sum(result.stage_steps):,} steps, {result.tokens:,} tokens, {result.flops:.3g} FLOPs, "
        f"about {result.memory_bytes / 2**20:,.0f} MiB, about {result.seconds / 60:.1f} min of training here "
        "(scoring and saving not counted). Nothing was trained."
    )
    return 0


# ---- use a run -----------------------------------------------------------------------------------


@app.command
def generate(
    model: str,
    *,
    prompt: list[str],
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> None:
    """Continue text with the model of a run, a checkpoint, or a Hugging Face folder.

    Args:
        model: a run's name, or a folder.
        prompt: text to continue; may be given several times.
        max_new_tokens: how much to write (bytes, for a byte-level model).
        temperature: 0 takes the likeliest token always.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: the same seed writes the same text.
    """
    from cambia.experiment.build import model_folder
    from cambia.generation import continue_text
    from cambia.training.checkpoint import load_model, load_tokenizer

    folder = model_folder(model)
    texts = continue_text(
        load_model(folder),
        load_tokenizer(folder),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    console = _console()
    for given, text in zip(prompt, texts, strict=True):
        console.print(f"[bold]{_escape(given)}[/bold]{_escape(text)}\n")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command(name="eval")
def evaluate(model: str, *files: Path, split: str = "test", max_bytes: int = 262_144) -> None:
    """Score a model in bits per byte: on the tasks of its run, or on text files.

    Args:
        model: a run's name, or a folder with a model.
        files: text files; left out, the tasks of the run.
        split: of the run's tasks: valid or test.
        max_bytes: text scored per task or file, in whole documents.
    """
    from rich.table import Table

    from cambia.experiment.score import score_files, score_run

    scores = score_files(model, files, max_bytes) if files else score_run(model, split, max_bytes)
    table = Table("text", "bytes", "bits per byte", "nats per byte", box=None)
    for name, score in scores.items():
        table.add_row(name, f"{score.bytes:,}", f"{score.bits_per_byte:.4f}", f"{score.nats_per_byte:.4f}")
    _console().print(table)


@app.command
def report(run: str) -> None:
    """Print a run's results and write its report.html, also while it is still going.

    Args:
        run: a run's name or folder.
    """
    from cambia.reporting import load_run, print_summary, write_report

    found = load_run(run)
    write_report(found)
    print_summary(found, _console())


@app.command
def export(model: str, out: Path, *, to: str = "llama") -> None:
    """Write a model as a stock Hugging Face class with the same logits.

    Args:
        model: a run's name, or a folder with a native model.
        out: the folder to write; must not exist.
        to: the class: llama (uneven layers are padded with zeros).
    """
    from cambia.experiment.build import model_folder
    from cambia.files import atomic_folder
    from cambia.models.causal_lm import CambiaForCausalLM
    from cambia.models.export import to_llama
    from cambia.training.checkpoint import load_model, load_tokenizer

    if to != "llama":
        raise ConfigError(f"--to {to!r}: the only class so far is llama")
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not")
    folder = model_folder(model)
    grown = load_model(folder)
    if not isinstance(grown, CambiaForCausalLM):
        raise ConfigError(f"{folder} holds a {type(grown).__name__}, which is a stock class already")
    exported = to_llama(grown)
    with atomic_folder(out) as temporary:
        exported.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
    _console().print(f"{out}: {type(exported).__name__}, {exported.num_parameters():,} parameters")


# ---- recipes, runs, data, doctor -----------------------------------------------------------------


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
    _console().print(table)


@runs_app.command(name="list")
def list_runs() -> None:
    """List the runs, oldest first."""
    from rich.table import Table

    from cambia import rundir

    found = rundir.list_runs()
    console = _console()
    if not found:
        console.print(f"no runs under {rundir.runs_root()} yet; `cambia run` makes the first")
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
    console.print(table)


@runs_app.command(name="show")
def show_run(run: str) -> None:
    """Print a run's results.

    Args:
        run: its name or folder.
    """
    from cambia.reporting import load_run, print_summary

    print_summary(load_run(run), _console())


@runs_app.command(name="delete")
def delete_run(run: str, *, yes: bool = False) -> None:
    """Delete a run for good, after asking.

    Args:
        run: its name or folder.
        yes: do not ask.
    """
    import shutil

    from cambia.errors import RunError
    from cambia.rundir import RunReader

    reader = RunReader(run)
    if reader.is_going():
        raise RunError(f"the run {reader.name!r} is still going; stop it first (Ctrl-C there)")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting {reader.folder} needs an answer from a person, or --yes")
        if input(f"Delete {reader.folder} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            _console().print("kept")
            return
    shutil.rmtree(reader.folder)
    _console().print(f"deleted {reader.folder}")


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
    console = _console()
    console.print(table)
    if not folder:
        console.print("$CAMBIA_DATA is not set; it names the folder where your own and fetched sets lie")


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

    recipe, flags = _recipe_and_flags(words, parse_flags)
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
    _console().print(table)


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
    _console().print(f"{fetch_set(name, into=folder)}")


@app.command
def doctor() -> None:
    """Show versions, devices, threads, extras, sandbox and data of this machine."""
    from cambia.doctor import examine

    console = _console()
    for line in examine():
        console.print(line, markup=False)  # an extra's name stands in brackets
