"""Decoding parameters: a few percent of a grid's tokens beside the grid, Optuna, and what people use.

    cambia bench decoding_search --preset headline

Three models write behind prompts of text that they know: stories260K (children's stories), a Llama of a
million parameters that has read WikiText-2, and one that has read Python. For each model and seed

    ours      CMA-ES with a quadric, with a share of the tokens that the grid writes
    optuna    studies of Optuna's TPE, with as many, all candidates behind the same prompts with the same
              noise; the median of them counts
    grid      points x points x points values of temperature, top-p and repetition penalty; its winner
    presets   temperature 1; 0.8 with top-p 0.95; min-p 0.05; greedy

look for what matches people's text best. All that they come to is scored anew behind prompts of other
documents, with noise that none of them has had. The gap from the best preset to the grid's winner is what
there is to win; the share of it that is closed may be above one, since the grid is a grid.
"""

# P prompts of a candidate

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import in_parts, keep, over_seeds, table
from writing.desk import Desk, at_each_desk

from cambia.data.sources import TEST, VALID
from cambia.decoding import PRESETS as USUAL
from cambia.decoding import DecodingPolicy
from cambia.decoding.judging import Judge
from cambia.decoding.rewards import MatchReward
from cambia.decoding.searching import CmaSearch, GridSearch, TpeSearch


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    models: tuple[str, ...] = ("stories260K", "wikitext", "python")
    seeds: int = 3
    points: int = 7
    """Of each of the three parameters in the grid."""
    grid_prompts: int = 64
    """P of the grid."""
    prompts: int = 24
    """P of the searches."""
    share: float = 0.05
    """Of the grid's tokens that the searches may write."""
    studies: int = 5
    held: int = 1000
    """Prompts that all are scored on."""
    calibrated: int = 1000
    """Prompts that the reward is calibrated on for it."""
    base_steps: int = 800
    workers: int | None = None


PRESETS = {
    "quick": Preset(
        ("stories260K",), seeds=1, points=3, grid_prompts=16, prompts=8, share=0.3, studies=2, held=64,
        calibrated=64,
    ),
    "headline": Preset(),
    "full": Preset(grid_prompts=256, prompts=96),
    "gpu": Preset(grid_prompts=1024, prompts=384, held=4000, calibrated=4000),
}  # fmt: skip
GOALS = {"closed": 0.95, "optuna": 0.0}


# ---- one seed of one model -----------------------------------------------------------------------


def cell(at: Desk, seed: int, preset: Preset) -> dict[str, Any]:
    """All searches, and what they came to, scored anew."""
    grid = GridSearch(points=preset.points)
    every = replace(at.fit, by="search", search=grid, prompts=preset.grid_prompts, seed=seed)
    arms = {"grid": at.fitted(every, MatchReward())}
    few = int(preset.share * arms["grid"][1])
    search = replace(at.fit, by="search", prompts=preset.prompts, tokens=few, seed=seed)
    arms["ours"] = at.fitted(replace(search, search=CmaSearch()), MatchReward())
    for study in range(preset.studies):
        one = replace(search, search=TpeSearch(), seed=1000 * (seed + 1) + study)
        arms[f"optuna {study}"] = at.fitted(one, MatchReward())
    arms |= {name: (DecodingPolicy(parameters), 0) for name, parameters in USUAL.items()}
    judge = Judge(
        at.model, at.tokenizer, at.some(VALID, preset.calibrated), at.some(TEST, preset.held), MatchReward(),
        new_tokens=at.fit.new_tokens, seed=seed,
    )  # fmt: skip
    rows = [judge.row(name, policy, tokens=tokens).as_dict() for name, (policy, tokens) in arms.items()]
    return {"rows": rows, "prompts": len(at.some(TEST, preset.held))}


# ---- what came out -------------------------------------------------------------------------------


def closed(one: Mapping[str, Any]) -> dict[str, float]:
    """Of one cell: rewards, the gap, and the share of it that is closed."""
    worth = {row["name"]: row["reward"] for row in one["rows"]}
    best = max(worth[name] for name in USUAL)
    studies = [value for name, value in worth.items() if name.startswith("optuna")]
    gap = worth["grid"] - best
    return {
        "preset": best,
        "grid": worth["grid"],
        "ours": worth["ours"],
        "optuna": statistics.median(studies),
        "gap": gap,
        "closed": (worth["ours"] - best) / gap if gap > 0 else float("nan"),
    }


def markdown(result: dict[str, Any]) -> str:
    """Tables: the gap and who closes it; what each came to."""
    preset, rows, found = result["preset"], [], []
    for name, cells in result["models"].items():
        each = [closed(one) for one in cells]
        columns = ("preset", "grid", "ours", "optuna")
        won = sum(one["ours"] - one["preset"] for one in each) / max(1e-9, sum(one["gap"] for one in each))
        rows.append([name, *(over_seeds([one[key] for one in each]) for key in columns), f"{won:.2f}"])
        for seed, one in enumerate(cells):
            for row in one["rows"]:
                if not row["name"].startswith("optuna ") or row["name"] == "optuna 0":
                    found.append(_row(name, seed, row))
    head = ["model", "best preset", "grid's winner", "ours", "Optuna, median", "of the gap closed"]
    note = (
        f"Match with people's text (1 people, 0 temperature 1) behind {result['prompts']:,} prompts of "
        f"documents that no search has seen, mean and standard deviation over {preset['seeds']} seeds; ours "
        f"and Optuna write {preset['share']:.0%} of the tokens of a grid of {preset['points']} x "
        f"{preset['points']} x {preset['points']} points, {preset['grid_prompts']} prompts each. Goal: "
        f"{GOALS['closed']:.0%} of the gap, and no less than the median of {preset['studies']} studies."
    )
    detail = ["model", "seed", "decoding", "parameters", "reward", "n-grams", "features", "repetition",
              "repeated", "distinct", "tokens", "nats/token", "written to find it"]  # fmt: skip
    return "\n\n".join([note, table(head, rows), table(detail, found)])


def _row(model: str, seed: int, row: Mapping[str, Any]) -> list[str]:
    parts = [row["parts"].get(name) for name in ("n_grams", "mauve", "repetition")]
    likely = row["nats_per_token"]
    return [
        model,
        str(seed),
        row["name"],
        row["parameters"],
        f"{row['reward']:.3f} ± {row['spread']:.3f}",
        *("-" if part is None else f"{part:.3f}" for part in parts),
        f"{row['repeated']:.3f}",
        f"{row['distinct']:.3f}",
        f"{row['length']:.1f}",
        "-" if likely is None else f"{likely:.3f}",
        f"{row['tokens']:,}",
    ]


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The README's row."""
    each = [closed(one) for cells in result["models"].values() for one in cells]
    won = sum(one["ours"] - one["preset"] for one in each) / sum(one["gap"] for one in each)
    what = f"decoding parameters with {result['preset']['share']:.0%} of a grid's tokens, share of its gain"
    return {what: f"{won:.2f}"}


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    models = at_each_desk(cell, preset, data, parts)
    result = {
        "name": f"decoding_search_{options.preset}",
        "preset": asdict(preset),
        "prompts": models[preset.models[0]][0]["prompts"],
        "models": models,
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
