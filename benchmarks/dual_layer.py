"""Weights and decoding that learn in turns, against decoding that learns when the weights are done.

    cambia bench dual_layer --preset headline

A model reads text it does not know, a step of its decoding parameters after every tenth batch (`in turns`).
How a model is decoded from does not change what its weights learn, so the weights are those of a run
without; what there is to win is a policy that is ready with them. Beside it, on the finished model and
with as many tokens written: the same learner (`after`), a search (`after, by search`), and a search with a
twentieth of the tokens. All are scored behind prompts of other documents by their match with people's text,
0 being the finished model at temperature 1.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forgetting.runs import source
from forgetting.streams import base_model
from harness import in_parts, keep, over_seeds, table

from cambia import rundir
from cambia.data.sources import TEST, TRAIN, VALID
from cambia.decoding import DecodingPolicy
from cambia.decoding.exporting import PARAMS_JSON
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.judging import Judge
from cambia.decoding.rewards import MatchReward
from cambia.experiment.build import open_stream, train_in
from cambia.experiment.decoding import prompts_of
from cambia.experiment.tree import experiment_from
from cambia.models.saved import load_model
from cambia.rundir import RunReader


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    texts: tuple[str, ...] = ("plays", "sql")
    seeds: int = 3
    steps: int = 300
    prompts: int = 48
    """Texts of a step of the policy, four behind each prompt."""
    held: int = 500
    calibrated: int = 512
    base_steps: int = 800
    workers: int | None = None


PRESETS = {
    "quick": Preset(("plays",), seeds=1, steps=20, prompts=16, held=40, calibrated=40, base_steps=100),
    "headline": Preset(),
    "full": Preset(("plays", "spanish", "sql"), steps=2000, prompts=64, held=1000),
    "gpu": Preset(("plays", "spanish", "sql"), steps=4000, prompts=512, held=4000, calibrated=1000),
}
EVERY = 10
START = {"temperature": 1.0, "top_p": 0.95}
FIT = {"by": "gradient", "prompt_tokens": 48, "new_tokens": 64}


def tree_of(text: str, seed: int, data: Path, base: Path, preset: Preset) -> dict[str, Any]:
    """The settings of the run in which both learn."""
    return {
        "data": {
            "tasks": [{"name": text, "source": source(text, data, plain=False)}],
            "valid_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "model": {"type": "pretrained", "path": str(base)},
        "optimizer": {"type": "adamw", "learning_rate": 0.001},
        "training": {"steps": preset.steps, "batch_size": 16, "sequence_length": 128},
        "methods": [],
        "growth": {"enabled": False},
        "decoding": {
            "engine_update_freq": EVERY,
            "start": START,
            "rewards": [{"type": "match", "mauve_share": 0}],
            "fit": {**FIT, "prompts": preset.prompts, "seed": seed},
        },
        "evaluation": {"every_steps": None, "max_bytes": 16_384},
        "checkpoint": {"every_steps": 100, "keep_tasks": False},
        "seed": seed,
    }


def cell(text: str, seed: int, data: Path, base: Path, preset: Preset) -> dict[str, Any]:
    """One seed of one text."""
    experiment = experiment_from(tree_of(text, seed, data, base, preset), source="benchmark", flags={})
    folder = rundir.run_folder(f"bench-dual_layer-{preset.steps}-{text}-{seed}")
    if not train_in(folder, experiment):
        raise SystemExit("stopped; the same command goes on")
    tokenizer, stream = open_stream(experiment)
    model = load_model(folder / rundir.LATEST).eval()
    settings = experiment.decoding
    assert settings is not None
    prompts = {split: prompts_of(stream, settings, model, split) for split in (TRAIN, VALID, TEST)}
    updates = RunReader(folder).decoding()
    tokens = updates[-1]["tokens"]
    own = DecodingPolicy.from_json(folder / rundir.LATEST / PARAMS_JSON, model=model)

    def after(fit: DecodingFit) -> tuple[DecodingPolicy, int]:
        start, reward = settings.policy(model), MatchReward(mauve_share=0)
        found = fit.run(start, model, tokenizer.hf, prompts[TRAIN], reward)
        return found.policy, found.tokens

    search = replace(settings.fit, by="search", prompts=16)
    arms = {
        "temperature 1": (DecodingPolicy(), 0),
        "where it began": (settings.policy(model), 0),
        "in turns": (own, tokens),
        "after": after(replace(settings.fit, tokens=tokens)),
        "after, by search": after(replace(search, tokens=tokens)),
        "after, by search, a twentieth": after(replace(search, tokens=max(1, tokens // 20))),
    }
    held = prompts[TEST].at_most(preset.held)
    judge = Judge(
        model, tokenizer.hf, prompts[VALID].at_most(preset.calibrated), held, MatchReward(mauve_share=0),
        new_tokens=settings.fit.new_tokens, draws=2, seed=seed,
    )  # fmt: skip
    rows = [judge.row(name, policy, tokens=written).as_dict() for name, (policy, written) in arms.items()]
    return {"rows": rows, "rewards": [update["reward"] for update in updates], "prompts": len(held)}


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    preset, rows = result["preset"], []
    for text, cells in result["texts"].items():
        for place, row in enumerate(cells[0]["rows"]):
            same = [one["rows"][place] for one in cells]
            rows.append(
                [
                    text,
                    row["name"],
                    over_seeds([one["reward"] for one in same]),
                    "; ".join(one["parameters"] for one in same),
                    f"{statistics.fmean(one['repeated'] for one in same):.3f}",
                    f"{statistics.fmean(one['tokens'] for one in same):,.0f}",
                ]
            )
    note = (
        f"A Llama of 1M parameters that has read WikiText-2 reads another text, {preset['steps']} steps of "
        f"2,048 bytes, one of the policy after every {EVERY}th; match with people's text (1 people, 0 the "
        f"finished model at temperature 1) behind {result['prompts']:,} prompts of other documents, mean and "
        f"standard deviation over {preset['seeds']} seeds."
    )
    head = ["text", "decoding learned", "reward", "parameters, by seed", "repeated", "tokens written"]
    return f"{note}\n\n{table(head, rows)}"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The README's row."""

    def over_all(name: str) -> float:
        found = [row for cells in result["texts"].values() for one in cells for row in one["rows"]]
        return statistics.fmean(row["reward"] for row in found if row["name"] == name)

    told = ", ".join(f"{name} {over_all(name):.3f}" for name in ("in turns", "after", "after, by search"))
    return {"match with people's text, decoding learned with the weights or when they are done": told}


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    folder = rundir.run_folder(f"bench-decoding-wikitext-{preset.base_steps}")
    base = base_model("llama", data, folder, steps=preset.base_steps, rows=16)
    texts = {
        text: [
            parts.once(f"{text}-{seed}", functools.partial(cell, text, seed, data, base, preset))
            for seed in range(preset.seeds)
        ]
        for text in preset.texts
    }
    prompts = texts[preset.texts[0]][0]["prompts"]
    result = {
        "name": f"dual_layer_{options.preset}",
        "preset": asdict(preset),
        "prompts": prompts,
        "texts": texts,
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
