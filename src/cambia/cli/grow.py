"""`cambia grow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cambia.cli.app import Settings, Whole, app, console, refuse_unless
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cambia.growth.disk.offline import CheckpointPlan, GrownCheckpoint
    from cambia.growth.operators import Operator

_EXAMPLE = "cambia grow CHECKPOINT --op widen_ffn --factor 1.5 --out DIR"


@app.command
def grow(
    *words: Settings,
    out: Path | None = None,
    dry_run: bool = False,
    check: Literal["auto", "yes", "no"] = "auto",
    seed: Whole = 0,
    shard_gigabytes: float = 5.0,
) -> None:
    """Grow a checkpoint on the disk: `cambia grow CHECKPOINT --op widen_ffn --factor 1.5 --out DIR`.

    Tensors are streamed, so that a checkpoint may be larger than memory. Several operators are applied in the
    order in which they are given, each with the settings that stand behind it: `--op widen_ffn --factor 1.5
    --op add_layers --add 2 --where append`. An operator takes --factor, --add or --to, and its other fields
    by their names (docs/configuration.md lists them).

    Args:
        words: a model folder or a run's name, then operators with their settings.
        out: the folder to write; it must not exist.
        dry_run: show what would become of it, and touch nothing.
        check: load the old and the new model and compare what they say. auto: where both together have
            less than 500 MB.
        seed: of new random weights.
        shard_gigabytes: the largest file of weights, in GB.
    """
    checkpoint, operators = _read(words)
    if out is None and not dry_run:
        raise ConfigError("where to? give --out DIR, or --dry-run to see what would become of it")
    is_size = 0 < shard_gigabytes < 1e9
    refuse_unless(is_size, "--shard-gigabytes", shard_gigabytes, "a number above 0, below 1e9")
    refuse_unless(0 <= seed < 2**63, "--seed", seed, "a whole number from 0, below 2^63")

    from cambia.growth.disk.offline import plan_checkpoint, refuse_out

    plan = plan_checkpoint(_folder(checkpoint), *operators, seed=seed)
    answer = console()
    if out is not None:
        refuse_out(plan, out)
    if dry_run or out is None:
        answer.print(_table(plan, f"{plan.checkpoint.folder}", "planned"))
        _say(plan)
        answer.print("Nothing was written.")
        return
    _say(plan)
    grown = _write(plan, out, check, round(shard_gigabytes * 1e9))
    answer.print(_table(plan, f"{plan.checkpoint.folder}", f"{grown.out}"))
    answer.print(_told(grown))


def _read(words: Sequence[str]) -> tuple[str, list[Operator]]:
    """`CHECKPOINT --op NAME --field value ... --op ...` taken apart."""
    if not words or words[0].startswith("-"):
        raise ConfigError(f"name the checkpoint first: {_EXAMPLE}")
    groups: list[list[str]] = []
    for word in words[1:]:
        if word == "--op" or word.startswith("--op="):
            groups.append([word.partition("=")[2]] if "=" in word else [])
        elif groups:
            groups[-1].append(word)
        else:
            raise ConfigError(f"{word!r} stands before the first --op: {_EXAMPLE}")
    if not groups:
        raise ConfigError(f"nothing to do: name at least one operator with --op, as in {_EXAMPLE}")
    return words[0], [_operator(group) for group in groups]


def _operator(words: Sequence[str]) -> Operator:
    """An operator from its name and the flags behind it."""
    from cambia.config import FieldError, Member, parse_flags
    from cambia.growth.operators import OPERATORS

    if not words or words[0].startswith("-"):
        raise ConfigError(f"--op takes an operator's name: {', '.join(OPERATORS)}")
    name, *flags = words
    settings: dict[str, Any] = parse_flags(flags)
    try:
        return Member(OPERATORS, "operator").parse({"type": name, **settings})
    except FieldError as error:
        place = ".".join(str(part) for part in error.path)
        shown = f"--op {name}" if place in ("", "type") else f"--op {name} --{place}"
        raise ConfigError(f"{shown}: {error.problem}") from None


def _folder(checkpoint: str) -> Path:
    """The model folder that is meant: a path that is there, or a run of this name."""
    from cambia import rundir
    from cambia.experiment.build import model_folder

    is_run = not Path(checkpoint).exists() and (rundir.runs_root() / checkpoint).is_dir()
    return model_folder(checkpoint) if is_run else Path(checkpoint)


def _write(
    plan: CheckpointPlan, out: Path, check: Literal["auto", "yes", "no"], shard_bytes: int
) -> GrownCheckpoint:
    """Carry the plan out behind a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from cambia.growth.disk.offline import write_grown

    screen = Console(stderr=True)
    columns = BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=plan.bytes_after)
        return write_grown(
            plan,
            out=out,
            shard_bytes=shard_bytes,
            check=check,
            progress=lambda done, _: bar.update(task, completed=done),
        )


def _table(plan: CheckpointPlan, before: str, after: str) -> Table:
    from rich.table import Table

    from cambia.reporting.units import size

    growth = plan.growth
    table = Table("", before, after, box=None)
    table.add_row("grown", "", "\n".join(_in_words(operator) for operator in growth.operators))
    table.add_row("parameters", f"{growth.parameters_before:,}", f"{growth.parameters_after:,}")
    table.add_row(
        "FLOPs per token", f"{growth.flops_per_token_before:.3g}", f"{growth.flops_per_token_after:.3g}"
    )
    table.add_row("weights on disk", size(plan.bytes_before), size(plan.bytes_after))
    for name, (old, new) in sorted(growth.config_changes.items()):
        if name not in ("layer_ids", "layer_types"):
            table.add_row(name, "" if old is None else str(old), str(new))
    table.add_row("loads as", "", plan.loads_as)
    return table


def _in_words(operator: Operator) -> str:
    """Its name, its amount, and what else is not as it always is."""
    from cambia.config import dump
    from cambia.growth.plan import describe
    from cambia.reporting.units import operator as in_words

    usual = {field.name: field.default for field in fields(operator)}
    given = {key: value for key, value in dump(operator).items() if value != usual.get(key)}
    return in_words({"type": describe(operator)["type"], **given}, full=True)


def _say(plan: CheckpointPlan) -> None:
    """What its user should know, on stderr."""
    from rich.console import Console

    screen = Console(stderr=True, highlight=False)
    for note in plan.notes:
        screen.print(f"note: {note}", markup=False)


def _told(grown: GrownCheckpoint) -> str:
    from cambia.reporting.units import duration, error, size

    event = grown.event
    took = f"{duration(event.seconds)}, {size(grown.resident_peak - grown.resident_before)} of memory"
    if event.logit_error is None:
        checked = "the two models were not compared (--check yes loads both, one after the other)"
    else:
        checked = f"compared on random tokens, logits differ by {error(event.logit_error)} (relative)"
    return f"{grown.out}: {took} above the program itself; {checked}"
