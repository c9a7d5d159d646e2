"""Training on after growth: the same model, the same text in the same order, grown in different ways."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from peers import by_hand, ours
from peers.judging import Clones
from peers.llama import adamw, batches, stories, train, validation_loss
from peers.process import fate
from peers.sides import SIDES, Place


@dataclass(frozen=True)
class Arm:
    """One way to grow and go on."""

    name: str
    label: str
    side: str | None
    """Name of a side; None where nothing grows."""
    keeps_optimizer: bool = False
    """Whether the optimizer goes along; a new one otherwise."""


FEED_FORWARD = [
    Arm("none", "not grown", None, keeps_optimizer=True),
    Arm("none_fresh", "not grown, new optimizer", None),
    Arm("random", "Cambia, random units, optimizer carried", "cambia", keeps_optimizer=True),
    Arm("random_fresh", "Cambia, random units, new optimizer", "cambia"),
    Arm("split", "Cambia, split 0.7/0.3, optimizer carried", "cambia_split", keeps_optimizer=True),
    Arm("split_fresh", "Cambia, split 0.7/0.3, new optimizer", "cambia_split"),
    Arm("net2net", "Net2Net, equal clones, new optimizer", "net2net"),
    Arm("zeros", "zeros on both sides, new optimizer", "zeros"),
]
COMPUTED = {"tiny": "GroMo, computed units (TINY), new optimizer", "gradmax": "GroMo, GradMax, new optimizer"}
DEPTH = [
    Arm("layers", "Cambia, `AddLayers`, optimizer carried", "cambia_depth", keeps_optimizer=True),
    Arm("layers_fresh", "Cambia, `AddLayers`, new optimizer", "cambia_depth"),
    Arm("mergekit", "mergekit, copies, new optimizer", "mergekit"),
    Arm("mergekit_silent", "mergekit, silenced copies, new optimizer", "mergekit_silent"),
]
_BY_NAME = {side.name: side for side in SIDES}


@dataclass(frozen=True)
class Course:
    """How long, on what, and by how much."""

    data: Path
    tokens: Tensor
    held_out: Tensor
    tokens_file: Path
    before: int
    """Steps before growth."""
    after: int
    units: int
    """New units of each gated layer."""
    plain_units: int
    """New units of each plain block of GroMo's: two weights a channel each, where a gated one has three."""
    layers: int
    """New layers."""


def compared(course: Course, place: Place, seed: int, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each arm's loss right after growth and at the end."""
    base = stories(course.data / "stories260K")
    optimizer = adamw(base)
    train(base, optimizer, batches(course.tokens, seed), course.before)
    folder = place.folder / f"base{seed}"
    base.save_pretrained(folder)
    rows = []
    for arm in arms:
        side = _BY_NAME[arm.side] if arm.side else None
        if side is not None and not place.has(side):
            continue
        model, state = copy.deepcopy((base, optimizer))
        model = _grown(arm, model, state, course, place, folder)
        if not arm.keeps_optimizer:
            state = adamw(model)
        elif fate(*copy.deepcopy((model, state))) != "kept":
            raise SystemExit(f"{arm.label}: the optimizer did not go along")
        rows.append({"arm": arm.name, "seed": seed, **_train_on(model, state, course, seed)})
    if "gromo" in place.libraries and any(arm in FEED_FORWARD for arm in arms):
        rows += [_computed(method, course, place, folder, seed) for method in COMPUTED]
    return rows


def _train_on(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, course: Course, seed: int
) -> dict[str, Any]:
    size = stories(course.data / "stories260K").config.intermediate_size
    clones = Clones(model, size) if model.config.intermediate_size > size else None
    born = clones.likeness(model) if clones else 0.0
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "loss_grown": validation_loss(model, course.held_out),
    }
    stream = batches(course.tokens, seed)
    for _ in range(course.before):
        next(stream)
    train(model, optimizer, stream, course.after)
    result["loss_trained"] = validation_loss(model, course.held_out)
    if clones is not None and born > 0.999:
        result["clone_cosine"] = clones.likeness(model)
    return result


def _grown(
    arm: Arm,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    course: Course,
    place: Place,
    folder: Path,
) -> PreTrainedModel:
    if arm.side is None:
        return model
    side = _BY_NAME[arm.side]
    amount = course.layers if arm in DEPTH else course.units
    if side.module == "ours":
        ours.operation(side.task)(model, amount, optimizer if arm.keeps_optimizer else None)
        return model
    if side.module == "by_hand":
        by_hand.OPERATIONS[side.task](model, amount)
        return model
    target = place.folder / f"{folder.name}_{arm.name}"
    result = place.run(place.command(side, folder, target, amount))
    if "failed" in result:
        raise SystemExit(f"{side.library}: {result['failed']}")
    grown = AutoModelForCausalLM.from_pretrained(target)
    shutil.rmtree(target)
    return grown


def _computed(method: str, course: Course, place: Place, folder: Path, seed: int) -> dict[str, Any]:
    """GroMo's own method grows and trains in its own process, on the same batches."""
    command = [str(place.peers), "-m", "peers.gromo_computed", method, str(folder)]
    told = {
        "tokens": course.tokens_file,
        "amount": course.plain_units,
        "steps": course.after,
        "seed": seed,
        "skip": course.before,
    }
    result = place.run(command + [f"--{name}={value}" for name, value in told.items()])
    if "failed" in result:
        raise SystemExit(f"GroMo, {method}: {result['failed']}")
    return {"arm": method, "seed": seed, **result}
