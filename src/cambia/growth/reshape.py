"""Give a live model the shape that a checkpoint has, before its weights are loaded.

A training script that is started again builds the model that it began with. The checkpoint holds a grown
one. What growth changed in the config is known from the growth events, and from the config follows every
tensor's shape; the values come from the checkpoint right afterwards. Layers are told apart by their stable
ids, so that a model may become larger or smaller.

    reshape(model, recorded_fields(now=[], then=events), frozen=(), optimizer=None)
    model.load_state_dict(tensors)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import CheckpointError
from cambia.growth.barrier import swap
from cambia.growth.carry import Change, Undo, husk
from cambia.models.architectures import layer_ids
from cambia.models.bodies import body_of
from cambia.nn.param_map import Fill, Lineage, TensorMap
from cambia.records import GrowthEvent

WEIGHTS = "model.safetensors"


def has_other_shape(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a model of another shape, or with more or fewer layers."""
    own = dict(model.named_parameters())
    if any(name in own and own[name].shape != tensor.shape for name, tensor in tensors.items()):
        return True
    table = body_of(model).table
    here = {table.layer_of(name) for name in own}
    there = {table.layer_of(name) for name in tensors} | {None}
    is_whole = all(name in tensors for name in own if table.layer_of(name) is None)  # not one shard of many
    return bool(there - here) or (is_whole and bool(here - there))


def folder_of(tensors: Mapping[str, Tensor], folders: Iterable[Path]) -> Path | None:
    """The first of these folders that holds exactly these weights; None where none does."""
    return next((folder for folder in folders if _holds(folder / WEIGHTS, tensors)), None)


def _holds(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as opened:
        if set(opened.keys()) != set(tensors):
            return False
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if any(opened.get_slice(name).get_shape() != shape for name, shape in shapes.items()):
            return False
        # Two checkpoints of one run have the same shapes and differ in their first tensor already.
        return all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def recorded_fields(*, now: Sequence[GrowthEvent], then: Sequence[GrowthEvent]) -> dict[str, Any]:
    """The config fields that growth changed, as a checkpoint has them.

    Args:
        now: the events that the live model has seen; they are taken back.
        then: the events that the checkpoint's model had seen.
    """
    fields: dict[str, Any] = {}
    for event in reversed([event for event in now if event.done]):
        fields |= {name: before for name, (before, _) in event.config_changes.items()}
    for event in then:
        if event.done:
            fields |= {name: after for name, (_, after) in event.config_changes.items()}
    return fields


def reshape(
    model: PreTrainedModel,
    fields: Mapping[str, Any],
    *,
    frozen: Collection[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Give a model the sizes that these config fields say; what changes shape has no values yet.

    Args:
        model: its unchanged tensors stay.
        fields: config field -> value; None where the config had no such field.
        frozen: names of the parameters in layers that come new which are not trained.
        optimizer: gets the new parameters in the places of the old ones; what it knew of these is dropped.
    """
    body = body_of(model)
    sizes = copy.deepcopy(body.config)
    for name, value in fields.items():
        setattr(sizes, name, value)
    after = body.like(sizes)
    ids = layer_ids(body.config)
    layers = [ids.index(i) if i in ids else None for i in layer_ids(sizes)]
    old = dict(model.named_parameters())
    changes = []
    for name, empty in after.named_parameters():
        place = body.table.layer_of(name)
        source = None if place is None else layers[place]
        is_new = place is not None and source is None
        if is_new:
            trains = name not in frozen
            alike = [old[body.table.renamed(name, i)] for i in range(len(ids))]
            like = next((p for p in alike if p.requires_grad == trains), alike[0])
        else:
            like = old[name if source is None or source == place else body.table.renamed(name, source)]
            trains = like.requires_grad
            if like.shape == empty.shape:
                continue
        zeros = TensorMap(None, fill=Fill.zeros(), shape=tuple(empty.shape))
        new = nn.Parameter(husk(like.detach(), empty.shape), requires_grad=trains)
        changes.append(Change(name, Lineage(name, None, (zeros,), None), new, None, like, 0))
    with Undo() as undo:
        swap(model, after, layers, changes, undo)
        undo.pop_all()
    if optimizer is not None:
        _adopt(optimizer, model, changes, {id(parameter) for parameter in old.values()})


def check_shape(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a checkpoint whose weights are not what its growth record says.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    for name, parameter in model.named_parameters():
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(
                f"{folder}: {name!r} is {found}, after the recorded growth it would be "
                f"{tuple(parameter.shape)}: build the model that this training began with, or load the "
                "grown one with from_pretrained"
            )


def _adopt(
    optimizer: torch.optim.Optimizer, model: nn.Module, changes: Sequence[Change], known: Collection[int]
) -> None:
    """Put a reshaped model's parameters into the groups of those that they replace or resemble."""
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    siblings = {id(change.new): change.sibling for change in changes}
    groups: list[list[nn.Parameter]] = [
        [p for p in group["params"] if id(p) not in known] for group in optimizer.param_groups
    ]
    for parameter in model.parameters():
        index = group_of.get(id(siblings.get(id(parameter), parameter)))
        if index is not None:
            groups[index].append(parameter)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    kept = {id(parameter) for parameters in groups for parameter in parameters}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]
