"""Does growth pay? Operations to one decayed loss, against the final size and the best fixed one.

    cambia bench compute_to_loss --preset headline

One text, the same batches in the same order for every arm of a seed; warm-up, constant rate, one decay; the
learning rate is tuned for A, D and B in each dimension with as many trials, on a shorter run of another seed.
Operations are summed from each run's own ledger by the shape of each step, verifying a growth and measuring
what triggers read included. A is also scored as if it had ended earlier, with its rate decayed, so that it is
a curve of decayed losses, and so is D.

    saving           1 - F_B / F_A(loss of B), F_A read off that curve, seed by seed; the interval is a
                     bootstrap over seeds
    over fixed size  the same against D, the fixed size that is best at what B spends
    seconds          the same of seconds: a run's steps at each size times what such a step takes in short
                     runs of all arms, in turns, and its growths (benchmarks/compute/clock.py)

`cambia bench` begun again goes on where it was stopped. The arms: benchmarks/compute/arms.py.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compute.arms import Sizes, arms
from compute.clock import Pace, paces
from compute.curves import Ran, is_beyond, ran, saving
from compute.figures import curves_figure
from forgetting.runs import source
from harness import arguments, keep, over_seeds, table

from cambia.reporting.sweeps.statistics import bootstrap_interval
from cambia.sweepdir import SweepReader
from cambia.sweeps import run_grid

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    sizes: Sizes
    arms: tuple[str, ...] = ("A", "B-depth", "C", "E")
    fixed: tuple[int, ...] = (3, 4, 6)
    """Layers of D; the best of them over the few seeds is run with all."""
    seeds: int = 5
    few: int = 3
    """Seeds of all arms but A, B-depth and the best D."""
    rates: tuple[float, ...] = (0.002, 0.004, 0.008)
    tuning_share: float = 0.5
    """Of the tokens, in the runs by which rates are chosen."""
    scored_bytes: int = 262_144
    workers: int | None = None


QUICK = Sizes(hidden=56, ffn=144, layers=8, heads=4, kv_heads=2, tokens=2_000_000, rows=4)
HEADLINE = Sizes(hidden=96, ffn=256, layers=8, heads=6, kv_heads=2, tokens=8_000_000, rows=4)
CHOICES = (
    "B-once", "B-width", "B-both", "F-jump", "F-silent", "F-interpose", "F-random", "G-0.1-0.4",
    "G-0.1-0.7", "G-0.2-0.6", "G-0.2-0.8", "G-plateau", "G-efficiency", "H-zero", "H-reset",
)  # fmt: skip
EVERY = ("A", "B-depth", *CHOICES, "C", "E")
TUNED = ("A", "B-depth", "B-width", "B-both")
"""Arms with a rate of their own, beside each D; all others vary one of them."""
PRESETS = {
    "quick": Preset(
        QUICK, arms=("A", "B-depth"), fixed=(3, 4), seeds=3, rates=(0.004, 0.008), tuning_share=0.25
    ),
    # 21 tokens a parameter: as long as the final size is worth having.
    "long": Preset(
        replace(QUICK, tokens=6_000_000), arms=("A", "B-depth", "G-0.1-0.4", "G-efficiency"),
        fixed=(4, 6), seeds=3, rates=(0.004, 0.008),
    ),
    # 14 tokens a parameter: halfway.
    "middle": Preset(
        replace(QUICK, tokens=4_000_000), arms=("A", "B-depth", "G-efficiency"),
        fixed=(4, 6), seeds=3, rates=(0.004, 0.008),
    ),
    # 7 tokens a parameter; other dimensions than depth, operators, moments and controls.
    "choices": Preset(
        QUICK,
        arms=(
            "A", "B-depth", "B-width", "B-both", "B-once", "F-jump", "F-silent", "F-interpose", "F-random",
            "H-zero", "H-reset", "C", "E",
        ),
        fixed=(4,), seeds=3, rates=(0.004, 0.008),
    ),
    "headline": Preset(HEADLINE, tuning_share=0.25),
    "full": Preset(replace(HEADLINE, tokens=18_000_000), arms=EVERY),
    "gpu": Preset(
        Sizes(hidden=768, ffn=2048, layers=12, heads=12, kv_heads=12,
              tokens=2_480_000_000, rows=64, length=1024),
        arms=EVERY, seeds=3, fixed=(3, 6, 9), rates=(0.002, 0.004, 0.008),
    ),
}  # fmt: skip
GOALS = {"saving": 0.20, "low": 0.10}


# ---- runs ----------------------------------------------------------------------------------------


def base(preset: Preset, data: Path) -> dict[str, Any]:
    """The experiment of A without its curve."""
    sizes = preset.sizes
    return {
        "data": {"tasks": [{"name": "wikitext", "source": source("wikitext", data, plain=False)}]},
        "model": sizes.model(),
        "optimizer": {"type": "muon", "weight_decay": 0.1},
        "training": {
            "steps": sizes.steps,
            "batch_size": sizes.rows,
            "sequence_length": sizes.length,
            "schedule": {"type": "wsd", "warmup_fraction": 0.05, "decay_fraction": sizes.decay},
        },
        "methods": [],
        "evaluation": {"every_steps": None, "max_bytes": preset.scored_bytes},
        "checkpoint": {"every_steps": 500, "keep_tasks": False},
        "threads": 1,
    }


def swept(
    name: str, preset: Preset, data: Path, groups: Mapping[str, Any], **more: Any
) -> list[tuple[Mapping[str, Any], Path]]:
    """Every cell of a grid of arms: its choices, and the folder of its run."""
    grid = {"base": base(preset, data), "axes": {"arm": dict(groups), **more.pop("axes", {})}, **more}
    folder = run_grid(grid, name=name, workers=preset.workers)
    sweep = SweepReader(folder)
    results = sweep.results()
    cells = [cell for cell in sweep.cells() if cell.hash in results]
    failed = [results[cell.hash].error for cell in cells if results[cell.hash].status == "failed"]
    if failed:
        sys.exit(f"{len(failed)} of {len(cells)} runs failed, the first: {failed[0]}")
    return [(cell.choice, folder / cell.name) for cell in cells]


def tuned(name: str, preset: Preset, data: Path) -> dict[str, Any]:
    """The best rate of A, of B and of each D by validation, and what finding them cost."""
    sizes = replace(preset.sizes, tokens=round(preset.tuning_share * preset.sizes.tokens))
    every = arms(sizes, preset.fixed)
    chosen = [arm for arm in every if (arm in preset.arms and arm in TUNED) or arm.startswith("D-")]
    groups = {
        arm: {"training.steps": sizes.steps, **every[arm], "evaluation.decayed_at": []} for arm in chosen
    }
    axes = {"optimizer.learning_rate": list(preset.rates)}
    found: dict[str, dict[float, Ran]] = {}
    for choice, folder in swept(f"{name}-tuning", preset, data, groups, axes=axes, seeds=[1000]):
        rate = choice["optimizer.learning_rate"]
        found.setdefault(choice["arm"], {})[rate] = ran(folder, 1000)
    return {
        "rates": {arm: min(runs, key=lambda rate: runs[rate].last.valid) for arm, runs in found.items()},
        "valid": {
            arm: {str(rate): one.last.valid for rate, one in runs.items()} for arm, runs in found.items()
        },
        "flops": {arm: sum(one.last.flops for one in runs.values()) for arm, runs in found.items()},
    }


def rate_of(arm: str, rates: Mapping[str, float]) -> float:
    """An arm's own, or that of the one that it varies."""
    varied = "A" if arm == "C" else "B-width" if arm.startswith("H-") else "B-depth"
    return rates.get(arm, rates[varied])


def trained(name: str, preset: Preset, data: Path, rates: Mapping[str, float]) -> dict[str, list[Ran]]:
    """Every arm's runs: all with a few seeds, and then those that count with all."""
    every = arms(preset.sizes, preset.fixed)
    fixed = [f"D-{layers}" for layers in preset.fixed]
    groups = {
        arm: {**every[arm], "optimizer.learning_rate": rate_of(arm, rates)} for arm in (*preset.arms, *fixed)
    }
    groups = {"A": groups.pop("A"), "B-depth": groups.pop("B-depth"), **groups}

    def runs(**more: Any) -> dict[str, list[Ran]]:
        found: dict[str, list[Ran]] = {}
        for choice, folder in swept(name, preset, data, groups, **more):
            one = ran(folder, choice["seed"])
            found.setdefault(choice["arm"], []).append(one)
        return {arm: sorted(found[arm], key=lambda one: one.seed) for arm in groups}

    best = best_fixed(runs(seeds=preset.few))
    late = list(range(preset.few, preset.seeds))
    rest = [arm for arm in groups if arm not in ("A", "B-depth", best)]
    return runs(seeds=preset.seeds, exclude=[{"arm": rest, "seed": late}] if late and rest else [])


def best_fixed(found: Mapping[str, Sequence[Ran]]) -> str:
    """The fixed size of the lowest mean validation where it has spent what B-depth spends."""
    fixed = {arm: found[arm] for arm in tried_sizes(found)}
    shared = set.intersection(*({one.seed for one in runs} for runs in fixed.values()))

    def mean(arm: str) -> float:
        return statistics.fmean(one.ends[-2].valid for one in fixed[arm] if one.seed in shared)

    return min(fixed, key=mean)


# ---- what came out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """What an arm saves against the curve of another, seed by seed."""

    values: tuple[float, ...]
    beyond: int = 0
    """Seeds whose loss lies beyond the curve, of which the nearest piece was continued."""

    @property
    def told(self) -> str:
        """In percent, with the interval; a star for each seed beyond the curve."""
        if not self.values:
            return ""
        mean = f"{100 * statistics.fmean(self.values):.1f} %{self.beyond * '*'}"
        if len(self.values) < 2:
            return mean
        interval = bootstrap_interval(self.values)
        return f"{mean} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def saved(runs: Sequence[Ran], curves: Sequence[Ran]) -> Saved:
    """Operations that each run saved to its own loss, against the curve of the same seed."""
    by_seed = {one.seed: one.ends for one in curves}
    mine = [one for one in runs if one.seed in by_seed]
    savings = [saving(by_seed[one.seed], one.last.flops, one.last.test) for one in mine]
    return Saved(tuple(savings), sum(is_beyond(by_seed[one.seed], one.last.test) for one in mine))


def saved_time(result: Mapping[str, Any], arm: str) -> Saved:
    """The same of an arm's seconds against A's, where a curve takes time as it takes operations."""
    found, sizes = read(result), result["preset"]["sizes"]
    pace = {arm: Pace.from_dict(each) for arm, each in result["pace"].items()}
    step_tokens = sizes["rows"] * sizes["length"]
    by_seed = {one.seed: one for one in found["A"]}
    savings = []
    for one in found[arm]:
        if (other := by_seed.get(one.seed)) is not None:
            a_second = other.last.flops / pace["A"].seconds(other, step_tokens)
            spent = pace[arm].seconds(one, step_tokens) * a_second
            savings.append(saving(other.ends, spent, one.last.test))
    return Saved(tuple(savings))


def read(result: Mapping[str, Any]) -> dict[str, list[Ran]]:
    return {arm: [Ran.from_dict(one) for one in runs] for arm, runs in result["arms"].items()}


def markdown(result: Mapping[str, Any]) -> str:
    """Tables: savings of each arm, and the curves."""
    found, rates = read(result), result["tuning"]["rates"]
    fixed = best_fixed(found)
    rows = []
    for arm, runs in found.items():
        # D is compared where it has spent what B-depth spends.
        ends = [one.ends[-2] if arm.startswith("D-") else one.last for one in runs]
        is_curve = arm == "A" or arm.startswith("D-")
        rows.append(
            [
                arm,
                str(len(runs)),
                f"{rate_of(arm, rates):g}",
                f"{statistics.fmean(end.flops for end in ends) / 1e12:.2f}",
                over_seeds([end.test for end in ends], 4),
                "" if is_curve else saved(runs, found["A"]).told,
                "" if is_curve else saved(runs, found[fixed]).told,
                "" if is_curve else saved_time(result, arm).told,
                ", ".join(f"{share:.2f}" for share in dict.fromkeys(runs[0].grown_at)),
            ]
        )
    head = ["arm", "seeds", "rate", "TFLOP", "test bits per byte, decayed", "saved against A",
            f"saved against {fixed}", "seconds saved against A", "grown at"]  # fmt: skip
    curves = [
        [arm, f"{one.flops / 1e12:.2f}", over_seeds([run.ends[place].test for run in found[arm]], 4)]
        for arm in ("A", fixed)
        for place, one in enumerate(found[arm][0].ends)
    ]
    tuning = sum(result["tuning"]["flops"].values()) / 1e12
    tried = tried_sizes(found)
    best_of = f"the best of {', '.join(tried)} by validation, at what B-depth spends"
    which = best_of if len(tried) > 1 else "the only one tried"
    has = "has" if reaches_goals(found, fixed) else "has not"
    note = (
        "Savings in percent of operations to equal decayed loss: mean over seeds and the 95 % interval of a "
        "bootstrap, which with three seeds goes from the least to the most. A star for each seed whose loss "
        "lies beyond the curve, so that its nearest piece was continued. Rates "
        f"were tuned for {', '.join(rates)} with {len(result['preset']['rates'])} trials each, one run of "
        f"another seed a trial, which took {tuning:.1f} TFLOP in all and are not in the ledger; all others "
        f"vary one of these and take its rate. Goals: {GOALS['saving']:.0%} against A with an interval above "
        f"{GOALS['low']:.0%}, and more than nothing against the best fixed size, {fixed}, {which}. B-depth "
        f"{has} reached them."
    )
    picture = f"![decayed loss over operations, by arm](pictures/compute_to_loss_{result['name']}.png)"
    return "\n\n".join(
        [note, table(head, rows), picture, table(["curve", "TFLOP", "test bits per byte"], curves)]
    )


def tried_sizes(found: Mapping[str, Sequence[Ran]]) -> list[str]:
    """The fixed sizes among the arms."""
    return [arm for arm in found if arm.startswith("D-")]


def reaches_goals(found: Mapping[str, Sequence[Ran]], fixed: str) -> bool:
    """Whether B-depth saves what it should, against A and against the best fixed size."""
    large, best = (saved(found["B-depth"], found[arm]).values for arm in ("A", fixed))
    is_sure = len(large) > 1 and bootstrap_interval(large).low > GOALS["low"]
    return is_sure and statistics.fmean(large) >= GOALS["saving"] and statistics.fmean(best) > 0


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    found, sizes = read(result), Sizes(**result["preset"]["sizes"])
    grown = {"by the plan's schedule": "B-depth", "when the efficiency rule says": "G-efficiency"}
    fixed, count = best_fixed(found), sizes.parameters
    which = f"the {'best' if len(tried_sizes(found)) > 1 else 'only'} fixed size tried"
    told = {}
    for what, arm in grown.items():
        if arm not in found:
            continue
        measured = (
            f"growth in depth {what}, {count / 1e6:.2g}M parameters, {sizes.tokens / count:.0f} tokens for "
            f"each, {len(found[arm])} seeds: operations saved to equal decayed loss"
        )
        value = (
            f"{saved(found[arm], found['A']).told} against {sizes.layers} layers from the start, "
            f"{saved(found[arm], found[fixed]).told} against {fixed[2:]}, {which}"
        )
        told[measured] = value + " (*: a seed beyond the curve)" * ("*" in value)
    return told


def main() -> None:
    options = arguments(__doc__, PRESETS, clocked=False)
    if "CAMBIA_DATA" not in os.environ:
        sys.exit("the data of this benchmark is found by CAMBIA_DATA, which is not set")
    # Workers find the control arm's operator beside this script.
    search = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(search)
    preset, data = PRESETS[options.preset], Path(os.environ["CAMBIA_DATA"])
    name = f"bench-compute_to_loss-{options.preset}"
    tuning = tuned(name, preset, data)
    runs = trained(name, preset, data, tuning["rates"])
    every = arms(preset.sizes, preset.fixed)
    pace = paces(base(preset, data), {arm: every[arm] for arm in preset.arms})
    result = {
        "name": options.preset,
        "preset": asdict(preset),
        "tuning": tuning,
        "pace": {arm: each.as_dict() for arm, each in pace.items()},
        "arms": {arm: [one.as_dict() for one in ones] for arm, ones in runs.items()},
    }
    print(markdown(result))
    if options.preset != "quick":
        figure = curves_figure(runs)
        figure.savefig(PICTURES / f"compute_to_loss_{options.preset}.png", dpi=130, facecolor="white")
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
