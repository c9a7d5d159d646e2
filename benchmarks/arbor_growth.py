"""Growth in pretraining against the sizes that it begins and ends with, three seeds.

    cambia bench arbor_growth --preset full

Five arms; the same text, batches and order for each seed; every arm decayed to its own end:

    growth         recipe arbor_growth: half of the steps small, then large
    small, large   its baselines at the same number of tokens: fewer and more operations
    small, longer and large, shorter   the baselines at the operations that growth takes

What is compared is bits per byte on the test split at the end. The learning rate is the recipe's for all of
them, not tuned for each. Finished runs (arbor-ARM-seedN) are read, an interrupted one goes on; `quick` makes
other ones, of a few steps. The curves of seed 0 go to docs/pictures/.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import arguments, keep, spread, table

from cambia import rundir
from cambia.evaluation import growth_metrics
from cambia.experiment import train
from cambia.reporting import compare, load_run
from cambia.reporting.figures import curves_figure
from cambia.reporting.run import Run

SMALL, LARGE = "arbor_fixed_small", "arbor_fixed_large"
PRESETS = {
    "quick": {"seeds": 1, "settings": {"training.steps": 10, "evaluation.max_bytes": 2000}},
    "full": {"seeds": 3, "settings": {}},
}
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "arbor_growth.png"


def trained(arm: str, recipe: str, settings: Mapping[str, Any]) -> Run:
    """A finished run of an arm; goes on with one that was interrupted."""
    folder = rundir.run_folder(f"arbor-{arm.replace(', ', '-')}-seed{settings['seed']}")
    begun = (folder / rundir.CONFIG_JSON).exists()
    if not begun:
        train(recipe, name=folder.name, overrides=dict(settings))
    elif load_run(folder).status != "finished":
        train(recipe, name=folder.name, resume=True)
    run = load_run(folder)
    if run.status != "finished":
        raise SystemExit(f"{run.name} was interrupted; the same command goes on with it")
    return run


def arms_of(seed: int, settings: Mapping[str, Any]) -> dict[str, Run]:
    """Every arm, trained with this seed."""
    settings = {**settings, "seed": seed}
    growth = trained("growth", "arbor_growth", settings)
    small, large = trained("small", SMALL, settings), trained("large", LARGE, settings)
    longer, shorter = (
        {"training.steps": round(run.steps * growth.flops / run.flops)} for run in (small, large)
    )
    return {
        "growth": growth,
        "small": small,
        "large": large,
        "small, longer": trained("small, longer", SMALL, {**settings, **longer}),
        "large, shorter": trained("large, shorter", LARGE, {**settings, **shorter}),
    }


def row(arm: str, runs: list[Run], growth: list[Run]) -> dict[str, Any]:
    bits = [run.task_matrix("test").rows[-1][0] for run in runs]
    against = [run.task_matrix("test").rows[-1][0] for run in growth]
    return {
        "arm": arm,
        "parameters": runs[0].parameters_end,
        "steps": runs[0].steps,
        "tokens": runs[0].tokens,
        "flops": runs[0].flops,
        "bits_per_byte": bits,
        "less_growth": [mine - its for mine, its in zip(bits, against, strict=True)],
        "wall_seconds": [run.wall_seconds for run in runs],
    }


def markdown(result: Mapping[str, Any]) -> str:
    head = (
        "arm",
        "parameters at the end",
        "tokens",
        "TFLOP",
        "bits per byte, test",
        "above growth's",
    )
    rows = []
    for found in result["rows"]:
        bits = found["bits_per_byte"]
        deviation = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        rows.append(
            [
                found["arm"],
                f"{found['parameters']:,}",
                f"{found['tokens'] / 1e6:.2f}M",
                f"{found['flops'] / 1e12:.2f}",
                f"{statistics.fmean(bits):.4f}{deviation}",
                "" if found["arm"] == "growth" else spread(found["less_growth"], 4),
            ]
        )
    return table(head, rows)


def measure(seeds: int, settings: Mapping[str, Any]) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """The runs of every arm, and what they say."""
    found = [arms_of(seed, settings) for seed in range(seeds)]
    arms = {arm: [runs[arm] for runs in found] for arm in found[0]}
    events = [
        {
            "seed": seed,
            "logit_errors": [event.logit_error for event in run.growth],
            "loss_jumps": growth_metrics(run.growth, []).loss_jumps,
        }
        for seed, run in enumerate(arms["growth"])
    ]
    rows = [row(arm, runs, arms["growth"]) for arm, runs in arms.items()]
    return arms, {"seeds": seeds, "rows": rows, "growth": events}


def main() -> None:
    options = arguments(__doc__, PRESETS)
    with tempfile.TemporaryDirectory() as folder:
        if options.preset == "quick":
            os.environ["CAMBIA_RUNS"] = folder
        arms, result = measure(**PRESETS[options.preset])
    print(markdown(result))
    if options.preset == "full":
        PICTURE.parent.mkdir(exist_ok=True)
        figure = curves_figure(compare([runs[0] for runs in arms.values()]))
        figure.savefig(PICTURE, dpi=160, facecolor="white")
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
