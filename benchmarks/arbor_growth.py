"""Growth in pretraining against the sizes that it begins and ends with, three seeds.

    python benchmarks/arbor_growth.py

Five arms; the same text, batches and order for each seed; every arm decayed to its own end:

    growth         recipe arbor_growth: half of the steps small, then large
    small, large   its baselines at the same number of tokens: fewer and more operations
    small, longer and large, shorter   the baselines at the operations that growth takes

What is compared is bits per byte on the test split at the end. The learning rate is the recipe's for all of
them, not tuned for each. Finished runs (arbor-ARM-seedN) are read, an interrupted one goes on. The table
goes to docs/results.md, the curves of seed 0 beside it.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from harness import arguments, write_result, write_section
from rich.console import Console

from cambia import rundir
from cambia.evaluation import growth_metrics
from cambia.experiment import train
from cambia.reporting import compare, load_run
from cambia.reporting.figures import curves_figure
from cambia.reporting.run import Run

SMALL, LARGE = "arbor_fixed_small", "arbor_fixed_large"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "arbor_growth.png"


def trained(arm: str, recipe: str, seed: int, steps: int | None = None) -> Run:
    """A finished run of an arm; goes on with one that was interrupted."""
    folder = rundir.run_folder(f"arbor-{arm.replace(', ', '-')}-seed{seed}")
    begun = (folder / rundir.CONFIG_JSON).exists()
    if not begun:
        settings: dict[str, Any] = {"seed": seed} | ({"training.steps": steps} if steps else {})
        train(recipe, name=folder.name, overrides=settings)
    elif load_run(folder).status != "finished":
        train(recipe, name=folder.name, resume=True)
    run = load_run(folder)
    if run.status != "finished":
        raise SystemExit(f"{run.name} was interrupted; the same command goes on with it")
    return run


def main() -> None:
    options = arguments(__doc__ or "", ["full", "quick"])
    seeds = range(3 if options.preset == "full" else 1)
    arms: dict[str, list[Run]] = {}
    for seed in seeds:
        growth = trained("growth", "arbor_growth", seed)
        small, large = trained("small", SMALL, seed), trained("large", LARGE, seed)
        longer, shorter = (round(run.steps * growth.flops / run.flops) for run in (small, large))
        found = {
            "growth": growth,
            "small": small,
            "large": large,
            "small, longer": trained("small, longer", SMALL, seed, longer),
            "large, shorter": trained("large, shorter", LARGE, seed, shorter),
        }
        for arm, run in found.items():
            arms.setdefault(arm, []).append(run)
    rows = [row(arm, runs, arms["growth"]) for arm, runs in arms.items()]
    events = [
        {
            "seed": seed,
            "logit_errors": [event.logit_error for event in run.growth],
            "loss_jumps": growth_metrics(run.growth, []).loss_jumps,
        }
        for seed, run in zip(seeds, arms["growth"], strict=True)
    ]
    text = markdown(rows, len(seeds))
    Console(width=140).print(text)
    write_result(__file__, options, {"seeds": len(seeds), "rows": rows, "growth": events})
    if options.preset == "full":
        PICTURE.parent.mkdir(exist_ok=True)
        figure = curves_figure(compare([runs[0] for runs in arms.values()]))
        figure.savefig(PICTURE, dpi=160, facecolor="white")
        write_section("results.md", "arbor_growth", text)


def row(arm: str, runs: list[Run], growth: list[Run]) -> dict[str, Any]:
    bits = [run.task_matrix("test")[-1][0] for run in runs]
    against = [run.task_matrix("test")[-1][0] for run in growth]
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


def markdown(rows: list[dict[str, Any]], seeds: int) -> str:
    head = (
        "arm",
        "parameters at the end",
        "tokens",
        "TFLOP",
        "bits per byte, test",
        "above growth's",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for found in rows:
        bits, less = found["bits_per_byte"], found["less_growth"]
        spread = f" ± {statistics.stdev(bits):.4f}" if seeds > 1 else ""
        own = found["arm"] == "growth"
        difference = "" if own else f"{statistics.fmean(less):+.4f} ({min(less):+.4f} to {max(less):+.4f})"
        lines.append(
            f"| {found['arm']} | {found['parameters']:,} | {found['tokens'] / 1e6:.2f}M "
            f"| {found['flops'] / 1e12:.2f} | {statistics.fmean(bits):.4f}{spread} | {difference} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
