"""The experiment behind `cambia learn MODEL DATA...`: one text after another, with an expert for each kind.

    >>> experiment = learning("stories260K", ["plays.txt", "queries.sql"])
    >>> [task.name for task in experiment.data.tasks]
    ['plays', 'queries']

It is the recipe `learn` with model and texts filled in. A model that learned so before goes on: its experts,
and what is known of their texts, are taken along, and the earlier texts are scored beside the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cambia import files, rundir
from cambia.config import FieldError, apply_overrides, build, explain, merged
from cambia.data.textfiles import find_path
from cambia.errors import ConfigError, DataError
from cambia.experiment.starts import PretrainedModel
from cambia.experiment.texts import tasks_of
from cambia.experiment.tree import Experiment, read_tree
from cambia.models.parts.folder import EXPERTS
from cambia.models.saved import STATE_JSON

RECIPE = "learn"
_WIDTH = 128
"""Of the model for which the recipe's learning rate was found; wider ones take less, in proportion."""


def learning(
    model: str | Path,
    data: Sequence[str | Path],
    *,
    steps: int | None = None,
    boundaries: bool = False,
    flags: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment of learning texts one after another.

    Args:
        model: a folder of Hugging Face, or a run, checkpoint or folder of experts, which then go on.
        data: files or folders, in the order in which they are read; one may come again.
        steps: on each of them; by default one pass.
        boundaries: tell the learner where one ends.
        flags: dotted settings of the recipe.

    Raises:
        ConfigError, DataError: it cannot be learned from, or with these settings.
    """
    flags = dict(flags or {})
    if not data:
        raise ConfigError("nothing to learn from: name files or folders, cambia learn MODEL DATA...")
    place = _checkpoint(str(model))
    before = _earlier(place)
    tree = before or read_tree(RECIPE)[0]
    known = _scored_again(before) if before else []
    new, order = tasks_of(data, known, flags)
    stream = {"type": "sequence", "boundaries": boundaries, "order": order}
    tree = merged(tree, {"name": RECIPE, "model": {"type": "pretrained", "path": place}})
    # In the order of training: new texts first, so that --data.tasks.0 is the first that was named.
    tree["data"] = {**tree["data"], "tasks": [*new, *known], "stream": stream}
    if steps is not None:
        flags = {"training.steps": steps, "training.epochs": None, "training.tokens": None, **flags}
    if before is None:
        tree = merged(tree, _fitted(place))
    try:
        return build(Experiment, apply_overrides(tree, flags))
    except FieldError as error:
        raise explain(error, source="cambia learn", flags=flags) from None


# ---- the model -----------------------------------------------------------------------------------


def _checkpoint(model: str) -> str:
    """The model to start from; of a folder of experts it is the checkpoint in which they lie."""
    folder = files.expanded(model)
    if not (folder / EXPERTS).is_file():
        return model
    files.verified(folder)
    around = folder.resolve().parent
    if not (around / STATE_JSON).is_file():
        raise ConfigError(
            f"{model} holds experts without what was known of their texts, so that nobody could say what is "
            "new: name the run or the checkpoint that they come from"
        )
    return str(around)


def _earlier(place: str) -> dict[str, Any] | None:
    """The settings of the run behind a checkpoint, where it learned with experts."""
    for folder in (files.expanded(place), rundir.runs_root() / place):
        for run in (folder, folder.parent):
            if not (run / rundir.CONFIG_JSON).is_file() or not (run / rundir.CONFIG_YAML).is_file():
                continue
            tree = files.read_json(run / rundir.CONFIG_JSON)
            methods = tree.get("methods") or []
            if len(methods) == 1 and methods[0].get("type") == "experts":
                return tree
    return None


def _fitted(place: str) -> dict[str, Any]:
    """What the recipe's settings become for this model."""
    tree = read_tree(RECIPE)[0]
    start = PretrainedModel(path=place)
    try:
        width, longest = start.config().hidden_size, start.longest()
    except FieldError as error:
        raise ConfigError(error.problem) from None
    length = min(tree["training"]["sequence_length"], longest or math.inf)
    rate = tree["optimizer"]["learning_rate"] * min(1.0, _WIDTH / width)
    return {
        "training": {"sequence_length": length},
        "optimizer": {"learning_rate": float(f"{rate:.3g}")},
        "evaluation": {"context_tokens": min(tree["evaluation"]["context_tokens"], length // 2)},
        "methods": [{"type": "experts", "prefix_tokens": min(64, length // 2)}],
    }


# ---- the texts -----------------------------------------------------------------------------------


def _scored_again(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The texts of an earlier run that are still there: they are scored, and not trained on."""
    found = []
    for task in tree["data"]["tasks"]:
        source = task["source"]
        if source.get("type") == "files" and isinstance(source["path"], str):
            try:
                path = find_path(source["path"])
            except DataError:
                continue
            found.append({**task, "source": {**source, "path": str(path.resolve())}})
    return found
