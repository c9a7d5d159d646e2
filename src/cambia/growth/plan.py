"""A growth plan: everything that is known about a growth step before a single weight is touched.

Pure shape arithmetic on a model without memory. The same plan serves the live run, the dry run and
resuming: legality, parameters, operations and memory are read off it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.config import type_name
from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators import OPERATORS, Contract, Operator, Shape
from cambia.models.architectures import (
    architecture_of,
    changed_fields,
    count_parameters,
    flops_per_token,
    on_meta,
)
from cambia.nn.param_map import Lineage, ParamMap, lineages


@dataclass(frozen=True, eq=False)
class GrowthPlan:
    """What one growth event will do to a model."""

    operators: tuple[Operator, ...]
    contract: Contract
    """The weakest promise of its operators."""
    after: PreTrainedModel
    """The grown model on the meta device: right shapes, no memory."""
    layers: tuple[int | None, ...]
    """For each layer afterwards the one it was, None where it is new."""
    lineages: Mapping[str, Lineage]
    """For each parameter afterwards where it comes from."""
    config_changes: Mapping[str, tuple[Any, Any]]
    parameters_before: int
    parameters_after: int
    parameters_replaced: int
    """Entries, as they were, of the tensors that growth replaces."""
    flops_per_token_before: float
    flops_per_token_after: float

    @property
    def config(self) -> PreTrainedConfig:
        """The config afterwards."""
        return self.after.config

    def extra_bytes(self, *, bytes_per_value: int = 4, moments: int = 2) -> int:
        """Memory held only while growing: the old copies of what is replaced, and of its moments."""
        return self.parameters_replaced * bytes_per_value * (1 + moments)


def plan_growth(model: PreTrainedModel, *operators: Operator, context: int = 1024) -> GrowthPlan:
    """Plan a growth event.

    Args:
        model: the model as it is, real or on the meta device; it is only looked at.
        operators: applied in order, as one event.
        context: tokens per sequence, for the count of operations.

    Raises:
        GrowthError: illegal for this model; the message says why and what would do.
    """
    if not operators:
        raise GrowthError("nothing to do: name at least one operator, for example WidenFFN(factor=1.5)")
    architecture_of(model.config)
    shape = _shape_of(model)
    steps: list[ParamMap] = []
    layers: list[int | None] = list(range(shape.num_layers))
    after = model
    for operator in operators:
        step = operator.step(shape)
        layers = [None if i is None else layers[i] for i in step.layers]
        after = _checked(type(model), step.config, shape, step.params, operator)
        shape = _shape_of(after)
        steps.append(step.params)
    ways = lineages(steps, shape.shapes)
    replaced = {way.origin for way in ways.values() if way.inherits and not way.is_same}
    return GrowthPlan(
        operators=operators,
        contract=_weakest([operator.contract for operator in operators]),
        after=after,
        layers=tuple(layers),
        lineages=ways,
        config_changes=changed_fields(model.config, after.config),
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(after),
        parameters_replaced=sum(p.numel() for name, p in model.named_parameters() if name in replaced),
        flops_per_token_before=flops_per_token(model, context),
        flops_per_token_after=flops_per_token(after, context),
    )


def _shape_of(model: PreTrainedModel) -> Shape:
    return Shape(model.config, {name: p.shape for name, p in model.named_parameters()})


def _checked(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    before: Shape,
    params: ParamMap,
    operator: Operator,
) -> PreTrainedModel:
    """The grown model on meta; the map must give exactly its tensors."""
    try:
        after = on_meta(model_class, config)
    except ConfigError as error:
        raise GrowthError(f"{operator}: {error}") from None
    expected = {name: p.shape for name, p in after.named_parameters()}
    mapped = {}
    for name, tensor_map in params.tensors.items():
        shape = list(before.shapes[tensor_map.source] if tensor_map.source else tensor_map.shape or ())
        for dim, axis in tensor_map.axes.items():
            shape[dim] = len(axis.index)
        mapped[name] = torch.Size(shape)
    if mapped != expected:
        wrong = sorted(
            name for name in mapped.keys() | expected.keys() if mapped.get(name) != expected.get(name)
        )
        name = wrong[0]
        raise GrowthError(
            f"{operator} maps {name!r} to {mapped.get(name)}, the grown model has {expected.get(name)} "
            f"({len(wrong)} such tensors); the operator or the architecture table is wrong"
        )
    return after


def _weakest(contracts: Sequence[Contract]) -> Contract:
    # Zero writers stacked on zero writers wake up one after the other, so the waiting adds up.
    waiting = 1 + sum(contract.alive_within - 1 for contract in contracts)
    exact = all(contract.exactness == "tolerance" for contract in contracts)
    return Contract("tolerance" if exact else "none", alive_within=waiting)


def describe(operator: Operator) -> dict[str, Any]:
    """An operator's name and the settings that were given."""
    settings = {name: value for name, value in vars(operator).items() if value is not None}
    return {"type": type_name(type(operator), OPERATORS), **settings}
