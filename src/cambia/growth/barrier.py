"""`grow`: plan, build, swap, verify, commit; or everything as it was.

Growth is a barrier between two training steps. Everybody who keeps state per parameter is asked first. Then
the tensors are exchanged one after another, each old one let go of as its successor is made. The model is run
on a fixed batch; if it does not say what it said before, all of it is undone. Only then is everything that is
kept per parameter exchanged in the same way. Whatever fails at whatever point, model and optimizer are as
they were, bit by bit. Nothing here knows any operator.

    >>> event = grow(model, WidenFFN(factor=1.5), optimizer=optimizer)
    >>> event.parameters_before, event.parameters_after, event.logit_error
    (1049216, 1245824, 0.0)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth.carry import Change, Holder, Moments, OptimizerHolder, Undo, husk, in_model_order, let_go
from cambia.growth.check import check_loss, logits_of, relative_error
from cambia.growth.operators import Contract, Operator, PartOperator
from cambia.growth.parts import add_part
from cambia.growth.plan import GrowthPlan, plan_growth, random_batch, refuse_wrapped
from cambia.growth.rewarm import refuse_unwarmed
from cambia.models.bodies import Body, body_of, resize_layers
from cambia.records import GrowthEvent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# In bfloat16 and float16 other matrix shapes round in another order, and what is multiplied is rounded anew:
# relative 2e-2 for 12 layers of 768 where the gains of all norms are.
_COARSE, _COARSE_RESCALED = 3e-2, 1e-1


def grow(
    model: PreTrainedModel,
    *operators: Operator,
    optimizer: torch.optim.Optimizer | None = None,
    holders: Sequence[Holder] = (),
    check_batch: Tensor | None = None,
    seed: int = 0,
    moments: Moments = "mean",
    reason: str = "asked for",
    context: int = 1024,
) -> GrowthEvent:
    """Grow a live model in place, with its optimizer.

    Args:
        model: any model with an architecture table. Its parameters that grow are replaced by new ones.
        operators: applied in order, as one event.
        optimizer: its state goes along, and new parameters join the group of the old ones they resemble.
        holders: whatever else keeps state per parameter.
        check_batch: (B, T) token ids on which the model must say the same before and after; by default
            32 random tokens.
        seed: of new random weights; they depend on it and their name alone.
        moments: what becomes of the optimizer's state (see `cambia.growth.carry.OptimizerHolder`).
        reason: for the record.
        context: tokens per sequence, for the count of operations.

    Returns:
        What was done, what it cost, and how exact it was.

    Raises:
        GrowthError: illegal for this model, or not exact; model and optimizer are then as they were.
    """
    began = time.perf_counter()
    refuse_wrapped(model)
    _refuse_empty(model)
    batch = random_batch(model, seed) if check_batch is None else check_batch
    if batch.dim() != 2:
        raise GrowthError(f"check_batch has the shape {tuple(batch.shape)}: expected token ids (B, T)")
    if operators and isinstance(operators[0], PartOperator):
        return add_part(model, *operators, optimizer=optimizer, batch=batch, reason=reason, context=context)
    plan = plan_growth(model, *operators, context=context, seed=seed, check_batch=batch)
    refuse_unwarmed(plan, holders)
    before = logits_of(model, batch)

    changes = _changes(model, plan, seed)
    everyone = [*holders, *([OptimizerHolder(optimizer, moments=moments)] if optimizer is not None else [])]
    commits = [holder.prepare(changes) for holder in everyone]
    with Undo() as undo:
        undo.callback(model.tie_weights)
        swap(model, plan.after, plan.layers, changes, undo)
        after = logits_of(model, batch)
        error = relative_error(before, after[..., : before.shape[-1]])
        if plan.contract.exactness != "none" and not error <= tolerance(model.dtype, plan.contract):
            raise GrowthError(
                f"{', '.join(map(str, operators))} changed the model's logits by {error:.1e} (relative); "
                "it was rolled back. Ask for preserve=False where a jump is wanted; otherwise this is a bug"
            )
        for commit in commits:
            commit(undo)
        if optimizer is not None:
            in_model_order(optimizer, model, changes)
        measured = {
            "logit_error": error,
            "loss_before": check_loss(before, batch),
            "loss_after": check_loss(after, batch),
            "check_flops": plan.check_flops(batch.numel()),
            "seconds": time.perf_counter() - began,
        }
        event = plan.event(reason, measured)
        undo.pop_all()  # it has succeeded: nothing is taken back
    return event


def tolerance(dtype: torch.dtype, contract: Contract) -> float:
    """The largest relative difference of a logit that counts as rounding, for weights of this type."""
    if dtype not in TOLERANCE:
        return _COARSE_RESCALED if contract.rescales else _COARSE
    # Stock norms compute in float32 whatever the weights are, and a rescaled gain is rounded there.
    return max(TOLERANCE[dtype], TOLERANCE[torch.float32] if contract.rescales else 0.0)


def _refuse_empty(model: PreTrainedModel) -> None:
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise GrowthError(
            f"{empty!r} is on the meta device and has no values: plan_growth plans such a model, and "
            "`cambia grow` grows a checkpoint on disk"
        )


def _changes(model: PreTrainedModel, plan: GrowthPlan, seed: int) -> list[Change]:
    """All parameters that will be new or other ones, without values yet; copies before their originals."""
    old = dict(model.named_parameters())
    changes = []
    for name, shape in ((name, p.shape) for name, p in plan.after.named_parameters()):
        lineage = plan.lineages[name]
        if lineage.is_same:
            continue
        assert lineage.sibling is not None
        source = old[lineage.origin] if lineage.origin is not None else None
        sibling = old[lineage.sibling]
        new = nn.Parameter(husk(sibling.detach(), shape), requires_grad=sibling.requires_grad)
        changes.append(Change(name, lineage, new, source, sibling, seed))
    # An original is let go of when it has grown, so whatever is copied from it is made before.
    return sorted(changes, key=lambda change: change.old is not None)


@torch.no_grad()
def swap(
    model: PreTrainedModel,
    grown: PreTrainedModel,
    layers: Sequence[int | None],
    changes: Sequence[Change],
    undo: Undo,
) -> None:
    """Give a model another shape, its new tensors put in one after another.

    Args:
        model: changed in place.
        grown: a model of the new shape on the meta device.
        layers: for each layer afterwards the one it was, None where it is new.
        changes: all parameters that are new or other ones; they get their values here.
        undo: takes all of it back.
    """
    body = body_of(model)
    born = _settings_by_module(model, body)
    if list(layers) != list(range(body.config.num_hidden_layers)):
        path = body.table.layers
        old_list = model.get_submodule(path)
        undo.callback(_set_submodule, model, path, old_list)
        template = old_list.get_submodule("0")
        resize_layers(model, layers, lambda _: _empty_copy(template, model, born))
        model.get_submodule(path).training = old_list.training
    # All modules share one config object: change it in place, so that all of them see it.
    for mine, other in zip(body.settings(model), body.settings(grown), strict=True):
        config = vars(mine)
        undo.callback(_replace_dict, config, dict(config))
        _replace_dict(config, vars(copy.deepcopy(other)))

    for change in changes:
        _fill(change)
        parent, _, attribute = change.name.rpartition(".")
        parameters = model.get_submodule(parent)._parameters
        undo.callback(parameters.__setitem__, attribute, parameters[attribute])
        parameters[attribute] = change.new
        if change.old is not None:
            let_go(change.old, change.new, change.lineage, undo)
    model.tie_weights()

    # The model on meta was built from the grown config: it knows what every size attribute must be.
    modules = dict(grown.named_modules())
    _tables_anew(model, modules, undo)
    for name, module in model.named_modules():
        for key, before in born.get(id(module), {}).items():
            value = vars(modules[name])[key]
            if value != before:
                undo.callback(vars(module).__setitem__, key, vars(module)[key])
                setattr(module, key, value)


def _fill(change: Change) -> None:
    """Give a new parameter its values, and the gradient that was being accumulated."""
    new = change.new
    values = change.lineage.values(change.source, seed=change.seed)
    new.data = values.to(device=new.device, dtype=new.dtype)
    if change.old is not None and change.old.grad is not None:
        new.grad = change.lineage.carry(change.old.grad, power=-1)


_SETTINGS = (int, float, tuple, dict)
"""Kinds of settings of modules: a LayerNorm has its size in a tuple, a LoRA layer its ranks in a dict."""


def _tables_anew(model: PreTrainedModel, grown: dict[str, nn.Module], undo: Undo) -> None:
    """Make modules anew whose buffers have another shape: tables of rotary positions."""
    for name, module in list(model.named_modules()):
        if name not in grown:
            continue  # somebody attached it
        after = dict(grown[name].named_buffers(recurse=False))
        before = dict(module.named_buffers(recurse=False))
        if any(before[key].shape != buffer.shape for key, buffer in after.items() if key in before):
            like = next(iter(before.values()))  # model.to(torch.bfloat16) has rounded the speeds, too
            parent, _, attribute = name.rpartition(".")
            undo.callback(model.get_submodule(parent)._modules.__setitem__, attribute, module)
            kind: Any = type(module)
            _set_submodule(model, name, kind(model.config).to(like.device, like.dtype))


def _settings_by_module(model: PreTrainedModel, body: Body) -> dict[int, dict[str, Any]]:
    """The numbers and shapes that the config, and nobody since, has set on each module, by its identity.

    Growth changes these where the grown config says otherwise, and leaves alone what somebody set by hand.
    """
    made = dict(body.like(body.config).named_modules())
    return {
        id(module): {
            key: value
            for key, value in vars(made[name]).items()
            if type(value) in _SETTINGS and not key.startswith("_")
        }
        for name, module in model.named_modules()
        if name in made
    }


def _empty_copy(layer: nn.Module, model: PreTrainedModel, born: dict[int, dict[str, Any]]) -> nn.Module:
    """A layer with the same settings and hooks, whose parameters are about to be replaced.

    Tensors and the shared config are not copied: `memo` tells deepcopy that they are copied already.
    """
    shared: list[Any] = [model.config, *layer.parameters(), *layer.buffers()]
    new = copy.deepcopy(layer, memo={id(item): item for item in shared})
    for module, original in zip(new.modules(), layer.modules(), strict=True):
        if id(original) in born:
            born[id(module)] = born[id(original)]
    return new


def _replace_dict(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    target.clear()
    target.update(values)


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
