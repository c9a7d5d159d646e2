"""`cambia plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cambia.cli.app import Settings, Whole, app, console, recipe_and_flags
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from cambia.experiment.planning import RunPlan
    from cambia.rundir import RunReader


@app.command
def plan(
    *words: Settings,
    layers: Whole | None = None,
    start_layers: Whole | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    grow_at: float | None = None,
    curve: str | None = None,
    out: Path | None = None,
) -> int:
    """Plan a run that grows: `cambia plan [RECIPE|FILE.yaml] --layers 8 --tokens 4e7`.

    Shows the growth that we would make on the way to a target size, what it does not compute, and what our
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
    from cambia.experiment.planning import plan_run
    from cambia.files import write_text
    from cambia.rundir import RunReader

    if out is not None:
        _refuse_place(out)
    recipe, flags = recipe_and_flags(words, parse_flags)
    _refuse_decided(flags, layers)
    small = RunReader(curve) if curve is not None else None
    named = {"name": "planned", "description": "Grows as `cambia plan` has it."}
    found = plan_run(
        read_experiment(recipe or "fixed_size", named | flags),
        layers=layers,
        start_layers=start_layers,
        tokens=tokens,
        flops=flops,
        grow_at=grow_at,
    )
    _show(found)
    answer = console()
    if small is not None:
        answer.print(_by_curve(small, found))
    if out is not None:
        write_text(out, to_yaml(found.tree))
        answer.print(f"wrote {out}: cambia run {out}")
    return 0


def _refuse_decided(flags: Mapping[str, Any], layers: int | None) -> None:
    """Refuse settings that a plan makes itself."""
    from cambia.experiment.planning import decided

    own = decided(0, ())
    for flag in flags:
        if any(f"{flag}.".startswith(f"{setting}.") for setting in own):
            raise ConfigError(
                f"--{flag}: the plan decides that, from --layers and --tokens or --flops: leave it out"
            )
    if layers is not None and "model.num_hidden_layers" in flags:
        raise ConfigError("--layers and --model.num_hidden_layers both name the target: leave one out")


def _refuse_place(out: Path) -> None:
    """Refuse a file that cannot be written, before anything is planned."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already; name a file that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: no folder can be made there: {error.strerror}") from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: nothing can be written into {out.parent}")


def _show(found: RunPlan) -> None:
    from rich.table import Table

    from cambia.experiment.planning import ENOUGH, PER_PARAMETER

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
        f"parameter of the target, {found.flops:.3g} FLOPs; the target from the start would take "
        f"{found.flops_large:.3g}. What is not computed, t (1 - x) = {' + '.join(terms)} = "
        f"{found.bound:.0%}, is saved if it ends as good."
    )
    if found.is_short:
        answer.print(
            f"The run is too short to grow after {PER_PARAMETER:g} tokens for each parameter of the layers, "
            "so it grows for the last time shortly before its rate falls."
        )
    for line in _measured():
        answer.print(line)
    if not found.is_checkpoint and found.tokens < ENOUGH * target.parameters:
        answer.print(
            f"With fewer than some {ENOUGH:g} tokens for each parameter a smaller model that never grows is "
            "the better plan: give fewer --layers."
        )
    if found.is_checkpoint:
        answer.print("None of this was measured on a model that has learned before.")


def _by_curve(small: RunReader, found: RunPlan) -> str:
    from cambia.experiment.planning import due_by_curve
    from cambia.growth import EfficiencyTrigger

    curve, due = due_by_curve(small, found)
    when = (
        f"would wait until {EfficiencyTrigger.latest:g} of the run is over"
        if due is None
        else f"would first grow at step {due / found.step_tokens:,.0f}"
    )
    return (
        f"By the curve of {small.folder.name} (loss {curve.floor:.3f} + {curve.scale:.3g} "
        f"n^-{curve.exponent:.2f}) the efficiency rule {when}; the plan does at {found.stages[1].step:,}."
    )


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
