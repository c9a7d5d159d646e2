"""`grow`: plan, build, swap, verify, commit; or everything as it was.

Growth is a barrier between two training steps. All new tensors and all new optimizer state are built
beside the old ones first. Then one swap puts them in. The model is run on a fixed batch; if it does not
say what it said before, the swap is undone. Only then is everything that is kept per parameter handed
over. Nothing here knows any operator.

    >>> event = grow(model, WidenFFN(factor=1.5), optimizer=optimizer)
    >>> event.parameters_before, event.parameters_after, event.logit_error
    (1049216, 1245824, 0.0)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth.carry import Change, Holder, Moments, OptimizerHolder
from cambia.growth.operators import Operator
from cambia.growth.plan import GrowthPlan, describe, plan_growth, random_batch
from cambia.models.architectures import architecture_of, body_of, resize_layers
from cambia.records import GrowthEvent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_COARSE = 3e-2  # bfloat16 and float16: other matrix shapes round in another order


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
    batch = random_batch(model, seed) if check_batch is None else check_batch
    plan = plan_growth(model, *operators, context=context, seed=seed, check_batch=batch)
    before = _logits(model, batch)

    changes = _build(model, plan, seed)
    everyone = [*holders, *([OptimizerHolder(optimizer, moments=moments)] if optimizer is not None else [])]
    commits = [holder.prepare(changes) for holder in everyone]
    undo: list[Callable[[], None]] = [model.tie_weights]
    try:
        _swap(model, plan, changes, undo)
        after = _logits(model, batch)
        error = _relative_error(before, after)
        if plan.contract.exactness == "tolerance" and not error <= TOLERANCE.get(model.dtype, _COARSE):
            raise GrowthError(
                f"{', '.join(map(str, operators))} changed the model's logits by {error:.1e} (relative); "
                "it was rolled back. Ask for preserve=False where a jump is wanted; otherwise this is a bug"
            )
    except BaseException:
        for action in reversed(undo):
            action()
        raise
    for commit in commits:
        commit()
    return GrowthEvent(
        operators=tuple(describe(operator) for operator in operators),
        reason=reason,
        parameters_before=plan.parameters_before,
        parameters_after=plan.parameters_after,
        flops_per_token_before=plan.flops_per_token_before,
        flops_per_token_after=plan.flops_per_token_after,
        exactness=plan.contract.exactness,
        logit_error=error,
        loss_before=_loss(before, batch),
        loss_after=_loss(after, batch),
        seconds=time.perf_counter() - began,
        config_changes=plan.config_changes,
    )


def _build(model: PreTrainedModel, plan: GrowthPlan, seed: int) -> list[Change]:
    """All new parameters, none of them in the model yet."""
    old = dict(model.named_parameters())
    changes = []
    with torch.no_grad():
        for name, lineage in plan.lineages.items():
            if lineage.is_same:
                continue
            assert lineage.sibling is not None
            source = old[lineage.origin] if lineage.origin is not None else None
            sibling = old[lineage.sibling]
            values = lineage.values(source, seed=seed).to(device=sibling.device, dtype=sibling.dtype)
            new = nn.Parameter(values, requires_grad=sibling.requires_grad)
            change = Change(name, lineage, new, source, sibling, seed)
            if change.old is not None and change.old.grad is not None:
                new.grad = lineage.carry(change.old.grad, power=-1)
            changes.append(change)
    return changes


def _swap(
    model: PreTrainedModel, plan: GrowthPlan, changes: Sequence[Change], undo: list[Callable[[], None]]
) -> None:
    """Put the new tensors in; `undo` gets what takes them out again, last first."""
    config = vars(model.config)
    kept_config = dict(config)
    undo.append(lambda: _replace_dict(config, kept_config))

    born = _settings_by_module(model)
    layers = list(plan.layers)
    if layers != list(range(body_of(model).config.num_hidden_layers)):
        path = architecture_of(model.config).layers
        old_list = model.get_submodule(path)
        undo.append(lambda: _set_submodule(model, path, old_list))
        template = old_list.get_submodule("0")
        resize_layers(model, layers, lambda _: _empty_copy(template, model, born))
        model.get_submodule(path).training = old_list.training
    # All modules share one config object: change it in place, so that all of them see it.
    _replace_dict(config, vars(copy.deepcopy(plan.config)))

    for change in changes:
        parent, _, attribute = change.name.rpartition(".")
        module = model.get_submodule(parent)
        undo.append(_restore(module._parameters, attribute))
        module._parameters[attribute] = change.new
    model.tie_weights()

    # The model on meta was built from the grown config: it knows what every size attribute must be.
    grown = dict(plan.after.named_modules())
    for name, module in model.named_modules():
        for key, before in born.get(id(module), {}).items():
            value = vars(grown[name])[key]
            if value != before:
                undo.append(_restore(vars(module), key))
                setattr(module, key, value)


def _settings_by_module(model: PreTrainedModel) -> dict[int, dict[str, int | float]]:
    """The numbers that the config, and nobody since, has set on each module, by the module's identity.

    Growth changes these where the grown config says otherwise, and leaves alone what somebody set by hand.
    """
    body = body_of(model)
    made = dict(body.like(body.config).named_modules())
    return {
        id(module): {key: value for key, value in vars(made[name]).items() if type(value) in (int, float)}
        for name, module in model.named_modules()
        if name in made
    }


def _empty_copy(
    layer: nn.Module, model: PreTrainedModel, born: dict[int, dict[str, int | float]]
) -> nn.Module:
    """A layer with the same settings and hooks, whose parameters are about to be replaced.

    Tensors and the shared config are not copied: `memo` tells deepcopy that they are copied already.
    """
    shared: list[Any] = [model.config, *layer.parameters(), *layer.buffers()]
    new = copy.deepcopy(layer, memo={id(item): item for item in shared})
    for module, original in zip(new.modules(), layer.modules(), strict=True):
        if id(original) in born:
            born[id(module)] = born[id(original)]
    return new


def _replace_dict(target: dict[str, Any], values: dict[str, Any]) -> None:
    target.clear()
    target.update(values)


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _restore(holder: dict[str, Any], key: str) -> Callable[[], None]:
    old = holder[key]
    return lambda: holder.__setitem__(key, old)


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """(B, T, V), without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(input_ids=batch.to(model.device), use_cache=False).logits
    finally:
        for module in training:
            module.training = True


def _relative_error(before: Tensor, after: Tensor) -> float:
    scale = before.abs().max().item()
    return (after - before).abs().max().item() / (scale or 1.0)


def _loss(logits: Tensor, batch: Tensor) -> float:
    """Mean negative log-likelihood of the check batch, nats per token."""
    flat = logits[:, :-1].flatten(0, 1).float()  # (B (T - 1), V)
    return nn.functional.cross_entropy(flat, batch[:, 1:].flatten().to(flat.device)).item()
