"""The experiment behind `cambia tune-decoding MODEL`, and what its policy is worth beside others.

>>> experiment = tuning("stories260K", ["stories.txt"], rewards=["match"])
>>> folder = train(experiment)
>>> judged(folder).rows         # learned, presets, a grid and Optuna at as many tokens
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME

from cambia import rundir
from cambia.config import FieldError, apply_overrides, build, explain, merged
from cambia.data.sources import TEST, TRAIN, VALID
from cambia.decoding.exporting import PARAMS_JSON, exported
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.judging import Judge, JudgedRow
from cambia.decoding.parameters import PRESETS
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.rewards import REWARDS, total
from cambia.decoding.searching import GridSearch, TpeSearch
from cambia.errors import ConfigError, MissingExtraError
from cambia.experiment.build import open_stream
from cambia.experiment.decoding import prompts_of
from cambia.experiment.machine import find_device
from cambia.experiment.texts import tasks_of
from cambia.experiment.tree import Experiment, experiment_from, read_tree
from cambia.models.saved import load_model
from cambia.rundir import RunReader, RunWriter

RECIPE = "tune_decoding"
_FIRST = {
    "fluency": "reference",
    "length": "target",
    "style": "corpus",
    "pattern": "pattern",
    "function": "function",
    "diversity": "target",
}
"""What stands behind a reward's name, `length:40`."""
_SHOWN = 3
"""Prompts whose continuations are shown side by side."""


def reward_of(word: str) -> dict[str, Any]:
    """A reward as it is named on the command line: `match`, `length:40`, `0.2 length:40`, `my_module:Mine`.

    Raises:
        ConfigError: there is no such reward.
    """
    weighed = re.fullmatch(r"(?P<weight>\d*\.?\d+)\s+(?P<name>.+)", word.strip(), re.DOTALL)
    name = weighed["name"] if weighed else word.strip()
    kind, colon, first = name.partition(":")
    if kind in REWARDS:
        found: dict[str, Any] = {"type": kind}
        if colon:
            if kind not in _FIRST:
                raise ConfigError(f"--reward {word}: {kind} takes nothing behind a colon")
            found[_FIRST[kind]] = int(first) if kind == "length" and first.isdecimal() else first
    elif " " in kind:
        raise ConfigError(
            f"--reward {word!r}: what stands before the reward is its weight, as in '0.2 length:40'"
        )
    elif colon:
        found = {"type": name}
    else:
        raise ConfigError(
            f"--reward {word}: known are {', '.join(REWARDS)}, and your own, my_module:MyReward"
        )
    return {**found, "weight": float(weighed["weight"])} if weighed else found


def tuning(
    model: str | Path,
    data: Sequence[str | Path],
    *,
    rewards: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment of learning how to decode from a model that stays as it is.

    Args:
        model: a folder of Hugging Face, a run, or a checkpoint.
        data: files or folders with text as it should be written; a part of it is kept for judging.
        rewards: as `reward_of` reads them; the match with what people write by default.
        flags: dotted settings of the recipe.

    Raises:
        ConfigError, DataError: it cannot be learned from, or with these settings.
    """
    flags = dict(flags or {})
    if not data:
        raise ConfigError("no text to learn from: cambia tune-decoding MODEL --data FILE")
    tasks, _ = tasks_of(data, flags=flags)
    tree = merged(read_tree(RECIPE)[0], {"name": RECIPE, "model": {"type": "pretrained", "path": str(model)}})
    tree["data"] = {**tree["data"], "tasks": tasks}
    if rewards:
        tree["decoding"]["rewards"] = [reward_of(word) for word in rewards]
    try:
        experiment = build(Experiment, apply_overrides(tree, flags))
        if not {"training.steps", "training.tokens", "training.epochs"} & set(flags):
            assert experiment.decoding is not None
            experiment.training.steps = math.ceil(experiment.decoding.fit.steps / len(tasks))
        return experiment
    except FieldError as error:
        raise explain(error, source="cambia tune-decoding", flags=flags) from None


@dataclass(frozen=True)
class Judged:
    """What a policy is worth beside others, on text that none of them has seen."""

    rows: Sequence[JudgedRow]
    """What was learned comes first."""
    samples: Sequence[Mapping[str, str]]
    """Prompts, how their documents go on, and what some of the policies write: by name."""
    left_out: Sequence[str]
    """What could not be compared with, or does not stand in generation_config.json, and why."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.as_dict() for row in self.rows],
            "samples": [dict(sample) for sample in self.samples],
            "left_out": list(self.left_out),
        }


def judged(
    folder: Path,
    *,
    grid_points: int = 3,
    optuna: bool = True,
    draws: int = 3,
    told: Callable[[str], None] = lambda line: None,
) -> Judged:
    """Compare what a run has learned with presets, a grid and Optuna, and write it into its summary.

    Args:
        folder: the run, finished.
        grid_points: values of each parameter in the grid; 0 leaves it out.
        optuna: compare with a study of as many tokens.
        draws: sets of continuations of each.
        told: is told what is being done.

    Raises:
        DataError: the text that was kept for judging is too little.
    """
    reader = RunReader(folder)
    experiment = experiment_from(reader.config(), source=str(folder), flags={})
    settings = experiment.decoding
    assert settings is not None
    tokenizer, stream = open_stream(experiment)
    model = load_model(folder / rundir.LATEST).to(find_device(experiment.device))
    prompts = {name: prompts_of(stream, settings, model, name) for name in (TRAIN, VALID, TEST)}
    reward = total(settings.rewards)
    learned = DecodingPolicy.from_json(folder / rundir.LATEST / PARAMS_JSON, model=model)
    spent = reader.decoding()[-1]["tokens"] if reader.decoding() else 0
    fit, start = settings.fit, settings.policy(model)
    arms = {"learned": (learned, spent), "where it began": (start, 0)}
    arms |= {name: (DecodingPolicy(parameters), 0) for name, parameters in PRESETS.items()}
    rivals: dict[str, DecodingFit] = {}
    if grid_points:
        rivals[f"grid of {grid_points ** len(fit.searched)}"] = replace(
            fit, by="search", search=GridSearch(points=grid_points)
        )
    if optuna:
        rivals["Optuna (TPE)"] = replace(fit, by="search", search=TpeSearch())
    left_out = [f"{GENERATION_CONFIG_NAME}: {note}" for note in exported(learned, "transformers").left_out]
    for name, rival in rivals.items():
        told(f"searching with {name}")
        try:
            found = rival.run(start, model, tokenizer.hf, prompts[TRAIN], reward)
        except MissingExtraError as error:
            left_out.append(f"{name}: {error}")
            continue
        arms[name] = (found.policy, found.tokens)
    judge = Judge(
        model, tokenizer.hf, prompts[VALID], prompts[TEST], reward, new_tokens=fit.new_tokens, draws=draws
    )
    rows = []
    for name, (policy, tokens) in arms.items():
        told(f"scoring {name}")
        rows.append(judge.row(name, policy, tokens=tokens))
    shown = {name: arms[name][0] for name in ("learned", "T 1", "greedy")}
    places = range(min(_SHOWN, len(prompts[TEST])))
    written = {name: judge.samples(policy, places=places) for name, policy in shown.items()}
    first = written["learned"]
    samples = [
        {
            "prompt": first.prompts[i],
            "people": first.human[i],
            **{name: of.texts[i] for name, of in written.items()},
        }
        for i in places
    ]
    result = Judged(rows, samples, left_out)
    run = RunWriter(folder, resume=True)
    try:
        run.write_summary({**(reader.summary() or {}), "decoding": result.as_dict()})
    finally:
        run.close()
    return result
