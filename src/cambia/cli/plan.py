"""`cambia plan`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cambia.cli.app import Settings, app, console, recipe_and_flags
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from cambia.experiment.planning import RunPlan


@app.command
def plan(
    *words: Settings,
    layers: int | None = None,
    start_layers: int | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    grow_at: float | None = None,
    curve: str | None = None,
    out: Path | None = None,
) -> int:
    """Plan a run that grows: `cambia plan [RECIPE|FILE.yaml] --layers 8 --tokens 8e6`.

    Shows the growth that we would make on the way to a target size, what it can save at most, and what our
    own measurements say to expect.

    Args:
        words: recipe (`fixed_size` where it is left out) and settings, as for `cambia run`. A model from
            scratch is the target; a checkpoint (`--model.type pretrained`) is the start.
        layers: of the target; those of the recipe's model where they are left out.
        start_layers: that a model from scratch begins with; by default a quarter of the target's.
        tokens: that it is trained on.
        flops: what training may take, instead.
        grow_at: share of the run after which it has the target's size.
        curve: a run of the small model; says when the efficiency rule would have it grow.
        out: write the run's settings into this file, for `cambia run`.
    """
    from cambia.config import parse_flags, to_yaml
    from cambia.experiment import read_experiment
    from cambia.experiment.planning import due_by_curve, plan_run
    from cambia.files import write_text
    from cambia.rundir import RunReader

    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists already; name a file that does not")
    recipe, flags = recipe_and_flags(words, parse_flags)
    found = plan_run(
        read_experiment(recipe or "fixed_size", flags),
        layers=layers,
        start_layers=start_layers,
        tokens=tokens,
        flops=flops,
        grow_at=grow_at,
    )
    _show(found)
    answer = console()
    if curve is not None:
        fitted, due = due_by_curve(RunReader(curve), found)
        answer.print(
            f"By the curve of {curve} (loss {fitted.floor:.3f} + {fitted.scale:.3g} "
            f"n^-{fitted.exponent:.2f}) the efficiency rule grows it after {due:,.0f} tokens."
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, to_yaml(found.tree))
        answer.print(f"wrote {out}: cambia run {out}")
    return 0


def _show(found: RunPlan) -> None:
    from rich.table import Table

    table = Table("from step", "layers", "parameters", "FLOPs per token", box=None)
    for stage in found.stages:
        sizes = f"{stage.parameters:,}", f"{stage.flops_per_token:.3g}"
        table.add_row(f"{stage.step:,}", str(stage.layers), *sizes)
    answer = console()
    answer.print(table)
    target = found.stages[-1]
    large = target.flops_per_token
    terms = [
        f"{(following.step - stage.step) / found.steps:.2f} x {1 - stage.flops_per_token / large:.2f}"
        for stage, following in pairwise(found.stages)
    ]
    answer.print(
        f"{found.steps:,} steps, {found.tokens:,} tokens, {found.tokens / target.parameters:.2g} for each "
        f"parameter, {found.flops:.3g} FLOPs; the target from the start would take "
        f"{found.flops_large:.3g}. It saves at most t (1 - x) = {' + '.join(terms)} = {found.bound:.0%}, and "
        "that where it ends as good."
    )
    for line in _measured():
        answer.print(line)


def _measured() -> list[str]:
    """What our own results say."""
    from cambia import bench

    try:
        benchmark = bench.find("compute_to_loss")
    except ConfigError:  # an installed package has no benchmarks beside it
        return ["What was measured stands in docs/results.md of the repository."]
    results = [result for preset in benchmark.kept if (result := benchmark.result(preset))]
    if not results:
        return ["Our own measurement of that is not there yet (cambia bench compute_to_loss)."]
    told = [line for result in results for line in benchmark.headlines(result).items()]
    return ["Measured:", *(f"- {what}: {value}" for what, value in told)]
