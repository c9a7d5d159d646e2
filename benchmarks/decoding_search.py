"""Decoding parameters: a few percent of a grid's tokens beside the grid, Optuna, and what people use.

    cambia bench decoding_search --preset headline

Three models write behind prompts of text that they know: stories260K (children's stories), a Llama of a
million parameters that has read WikiText-2, and one that has read Python. For each model and seed

    ours      a Gaussian process of what is worth how much, with a share of the tokens that the grid writes
    optuna    studies of Optuna's TPE, with as many, all candidates behind the same prompts with the same
              noise; the median of them counts
    grid      points x points x points values of temperature, top-p and repetition penalty; its winner
    presets   temperature 1; 0.8 with top-p 0.95; min-p 0.05; greedy

look for what earns most: by the match with people's text, by match and diversity together, and, for a model
that writes bytes, by text as varied as people's whose words are words. All that they come to is scored anew
behind prompts of other documents, with noise that none of them has had. The gap from the best preset to the
grid's winner is what there is to win; the share of it that is closed may be above one, since the grid is a
grid, and says nothing where there is no gap.
"""

# P prompts of a candidate

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from harness import in_parts, keep, over_seeds, table
from writing.desk import Desk, at_each_desk

from cambia.data.sources import TEST, VALID
from cambia.decoding import PRESETS as USUAL
from cambia.decoding import DecodingPolicy
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.judging import Judge
from cambia.decoding.rewards import DiversityReward, FunctionReward, MatchReward, Reward, total
from cambia.decoding.searching import GridSearch, ProcessSearch, TpeSearch


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    models: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "match": ("stories260K", "wikitext", "python"),
            "both": ("stories260K",),
            "words": ("wikitext",),
        }
    )
    """By reward."""
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
    draws: int = 2
    """Continuations of each."""
    read: int = 2048
    """Prompts of the searches and what their reward is calibrated on."""
    base_steps: int = 800
    workers: int | None = None


PRESETS = {
    "quick": Preset(
        {"match": ("stories260K",), "both": ("stories260K",)},
        seeds=1, points=3, grid_prompts=16, prompts=8, share=0.3, studies=2, held=64, calibrated=64,
    ),
    "headline": Preset(),
    "full": Preset(grid_prompts=256, prompts=96),
    "gpu": Preset(grid_prompts=1024, prompts=384, held=4000, calibrated=4000),
}  # fmt: skip
REWARDS: dict[str, Callable[[], Reward]] = {
    "match": MatchReward,
    "both": lambda: total([MatchReward(), DiversityReward()]),
    "words": lambda: total([DiversityReward(), FunctionReward("writing.words:spelled", weight=10)]),
}
TITLES = {
    "match": "match with people's text",
    "both": "match and diversity",
    "words": "diversity and ten times the share of words that are words",
}
GOALS = {"closed": 0.95, "optuna": 0.0}


# ---- one seed of one model -----------------------------------------------------------------------


def cell(reward: str, at: Desk, seed: int, preset: Preset) -> dict[str, Any]:
    """All searches, and what they came to, scored anew."""

    def fitted(fit: DecodingFit) -> tuple[DecodingPolicy, int]:
        return at.fitted(fit, REWARDS[reward](), most=preset.read)

    grid = GridSearch(points=preset.points)
    every = replace(at.fit, by="search", search=grid, prompts=preset.grid_prompts, seed=seed)
    arms = {"grid": fitted(every)}
    few = int(preset.share * arms["grid"][1])
    search = replace(at.fit, by="search", prompts=preset.prompts, tokens=few, seed=seed)
    arms["ours"] = fitted(replace(search, search=ProcessSearch()))
    for study in range(preset.studies):
        one = replace(search, search=TpeSearch(), seed=1000 * (seed + 1) + study)
        arms[f"optuna {study}"] = fitted(one)
    arms |= {name: (DecodingPolicy(parameters), 0) for name, parameters in USUAL.items()}
    judge = Judge(
        at.model, at.tokenizer, at.some(VALID, preset.calibrated), at.some(TEST, preset.held),
        REWARDS[reward](), new_tokens=at.fit.new_tokens, draws=preset.draws, seed=seed,
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
    for reward, models in result["rewards"].items():
        for name, cells in models.items():
            each = [closed(one) for one in cells]
            scores = [over_seeds([one[key] for one in each]) for key in ("preset", "grid", "ours", "optuna")]
            rows.append([TITLES[reward], name, *scores, won_of(each)])
            found += [_row(reward, name, seed, row) for seed, one in enumerate(cells) for row in _shown(one)]
    head = ["reward", "model", "best preset", "grid's winner", "ours", "Optuna, median", "of the gap closed"]
    note = (
        f"Rewards (1 a part that is as people's text is, 0 as that of temperature 1) behind "
        f"{result['prompts']} prompts of documents that no search has seen, mean and standard deviation over "
        f"{preset['seeds']} seeds; ours and Optuna write {preset['share']:.0%} of the tokens of a grid of "
        f"{preset['points']} x {preset['points']} x {preset['points']} points, {preset['grid_prompts']} "
        f"prompts each. Goal: {GOALS['closed']:.0%} of the gap, and no less than the median of "
        f"{preset['studies']} studies. Where the gap is less than its own spread its share says nothing, and "
        "is left out."
    )
    detail = ["reward", "model", "seed", "decoding", "parameters", "reward", "n-grams", "features",
              "repetition", "diversity", "words", "repeated", "distinct", "tokens", "nats/token",
              "written to find it"]  # fmt: skip
    return "\n\n".join([note, table(head, rows), table(detail, found)])


def won_of(each: Sequence[Mapping[str, float]]) -> str:
    """The share of the gap that is closed, over seeds; nothing where there is none to speak of."""
    gaps = [one["gap"] for one in each]
    spread = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    if sum(gaps) <= 0 or statistics.fmean(gaps) < spread:
        return "no gap"
    return f"{sum(one['ours'] - one['preset'] for one in each) / sum(gaps):.2f}"


def _shown(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its rows, of Optuna's studies the first."""
    return [row for row in one["rows"] if not row["name"].startswith("optuna ") or row["name"] == "optuna 0"]


PARTS = (("n_grams",), ("mauve",), ("repetition",), ("distinct", "repeated", "self_bleu"), ("function",))
"""Columns, and the parts of rewards that they add up."""


def _row(reward: str, model: str, seed: int, row: Mapping[str, Any]) -> list[str]:
    parts = {name.rpartition(".")[2]: value for name, value in row["parts"].items()}
    columns = [[parts[name] for name in names if name in parts] for names in PARTS]
    likely = row["nats_per_token"]
    return [
        reward,
        model,
        str(seed),
        row["name"],
        row["parameters"],
        f"{row['reward']:.3f} ± {row['spread']:.3f}",
        *(f"{sum(values):.3f}" if values else "-" for values in columns),
        f"{row['repeated']:.3f}",
        f"{row['distinct']:.3f}",
        f"{row['length']:.1f}",
        "-" if likely is None else f"{likely:.3f}",
        f"{row['tokens']:,}",
    ]


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The README's rows: what was closed where there is a gap, and who won against Optuna."""
    every = {
        f"{model}, {TITLES[reward]}": [closed(one) for one in cells]
        for reward, models in result["rewards"].items()
        for model, cells in models.items()
    }
    shares = {name: won_of(each) for name, each in every.items()}
    told = [f"{name} {share}" for name, share in shares.items() if share != "no gap"]
    without = sum(share == "no gap" for share in shares.values())
    told += [f"no gap in {without} others"] if without and told else []
    cells = [one for each in every.values() for one in each]
    won = sum(one["ours"] >= one["optuna"] for one in cells)
    share = f"{result['preset']['share']:.0%}"
    return {
        f"decoding parameters with {share} of a grid's tokens, share of its gain": "; ".join(told)
        or f"no gap in any of {len(shares)}",
        f"the same, at least as good as the median of {result['preset']['studies']} Optuna studies": (
            f"{won} of {len(cells)} cells"
        ),
    }


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rewards = {
        reward: at_each_desk(partial(cell, reward), models, preset, data, parts, kind=f"{reward}-")
        for reward, models in preset.models.items()
    }
    prompts = {model: cells[0]["prompts"] for model, cells in next(iter(rewards.values())).items()}
    result = {
        "name": f"decoding_search_{options.preset}",
        "preset": asdict(preset),
        "prompts": ", ".join(f"{count:,} ({model})" for model, count in prompts.items()),
        "rewards": rewards,
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
