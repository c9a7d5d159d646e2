"""`cambia run`."""

from __future__ import annotations

from typing import Any

from cambia.cli.app import Settings, app, console, recipe_and_flags, reported
from cambia.errors import ConfigError


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

    recipe, flags = recipe_and_flags(words, parse_flags)
    if dry_run:
        return _dry_run(recipe, flags)
    if resume is not None and (recipe or name):
        raise ConfigError("--resume goes on with a run as it is: leave out the recipe and --name")

    from cambia.experiment import train

    return reported(
        train(recipe or "first_growth", name=resume or name, resume=resume is not None, overrides=flags)
    )


def _dry_run(recipe: str | None, flags: dict[str, Any]) -> int:
    from rich.table import Table

    from cambia.experiment import estimate, read_experiment
    from cambia.reporting.units import duration, operators

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
    out = console()
    out.print(table)
    out.print(
        f"{sum(result.stage_steps):,} steps, {result.tokens:,} tokens, {result.flops:.3g} FLOPs, "
        f"about {result.memory_bytes / 2**20:,.0f} MiB, about {duration(result.seconds)} of training here "
        "(scoring and saving not counted). Nothing was trained."
    )
    return 0
