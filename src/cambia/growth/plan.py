"""A growth plan: everything that is known about a growth step before a single weight is touched.

Pure shape arithmetic on a model without memory. The same plan serves the live run, the dry run and
resuming: legality, parameters, operations and memory are read off it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.config import type_name
from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators import OPERATORS, Contract, Operator, PartOperator, Shape
from cambia.growth.triggers import Planned
from cambia.models.architectures import changed_fields, per_layer
from cambia.models.bodies import Body, body_of, count_parameters, flops_per_token, lora_layers
from cambia.nn.modes import evaluating
from cambia.nn.param_map import Lineage, ParamMap, lineages
from cambia.nn.routed import Routed
from cambia.records import GrowthEvent


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
    layer_parameters: tuple[int, int]
    """Before and afterwards, of the layers alone: without embeddings and head."""
    entries_held: int
    """Entries of old tensors that are held beside their successors while growing: the largest one, and all
    whose values could not be read back from those."""
    flops_per_token_before: float
    flops_per_token_after: float

    @property
    def config(self) -> PreTrainedConfig:
        """The config afterwards."""
        return self.after.config

    def check_flops(self, tokens: int) -> float:
        """Operations of asking both models about so many tokens: forward only, a third of a step."""
        return tokens * (self.flops_per_token_before + self.flops_per_token_after) / 3

    @property
    def fades_in(self) -> bool:
        """Whether new tensors come up to what others hold while they warm up."""
        return any(lineage.fade_in for lineage in self.lineages.values())

    @property
    def planned(self) -> Planned:
        """What triggers weigh of it."""
        return Planned(*self.layer_parameters, self.flops_per_token_before, self.flops_per_token_after)

    def event(
        self, reason: str, measured: Mapping[str, Any] | None = None, *, done: bool = True
    ) -> GrowthEvent:
        """The record of this growth, done or left undone, with what was measured of it."""
        return GrowthEvent(
            operators=tuple(describe(operator) for operator in self.operators),
            reason=reason,
            parameters_before=self.parameters_before,
            parameters_after=self.parameters_after,
            flops_per_token_before=self.flops_per_token_before,
            flops_per_token_after=self.flops_per_token_after,
            exactness=self.contract.exactness,
            config_changes=self.config_changes,
            done=done,
            **(measured or {}),
        )

    def extra_bytes(self, *, bytes_per_value: int = 4, moments: int = 2) -> int:
        """Memory held only while growing: old copies of weights, and of their moments."""
        return self.entries_held * bytes_per_value * (1 + moments)


def plan_growth(
    model: PreTrainedModel,
    *operators: Operator,
    context: int = 1024,
    seed: int = 0,
    check_batch: Tensor | None = None,
) -> GrowthPlan:
    """Plan a growth event.

    Args:
        model: the model as it is, real or on the meta device; it is only looked at.
        operators: applied in order, as one event.
        context: tokens per sequence, for the count of operations.
        seed: of what operators choose at random.
        check_batch: (B, T) token ids, for operators that choose layers by a measured gain; by default 32
            random tokens. On the meta device nothing can be measured: they then take the topmost layers.

    Raises:
        GrowthError: illegal for this model; the message says why and what would do.
    """
    if not operators:
        raise GrowthError("nothing to do: name at least one operator, for example WidenFFN(factor=1.5)")
    refuse_wrapped(model)
    if isinstance(operators[0], PartOperator) and len(operators) == 1:
        return _plan_part(model, operators[0], context)
    if Routed.on(model) is not None:
        raise GrowthError(
            "Parts stand beside this model, and what they add has its present shape: grow it before the "
            "first Part, or add another Part (AddLoraExpert)"
        )
    body = body_of(model)
    gains = None
    if any(operator.needs_gains for operator in operators) and model.device.type != "meta":
        gains = layer_gains(model, random_batch(model, seed) if check_batch is None else check_batch)
    shape = _shape_of(model, seed, gains)
    in_layers = _in_layers(shape)
    steps: list[ParamMap] = []
    layers: list[int | None] = list(range(shape.num_layers))
    after, sizes = model, body.config
    for operator in operators:
        step = operator.step(shape)
        layers = [None if i is None else layers[i] for i in step.layers]
        after = _checked(body, step.config, shape, step.params, operator)
        sizes = step.config
        # A layer that has just been born has no gain yet: nothing hears it.
        known = None if gains is None else [0.0 if i is None else gains[i] for i in layers]
        shape = _shape_of(after, seed, known)
        steps.append(step.params)
    ways = lineages(steps, shape.shapes)
    _refuse_encoded(model, ways)
    return GrowthPlan(
        operators=operators,
        contract=_weakest([operator.contract for operator in operators]),
        after=after,
        layers=tuple(layers),
        lineages=ways,
        config_changes=changed_fields(body.config, sizes),
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(after),
        layer_parameters=(in_layers, _in_layers(shape)),
        entries_held=_entries_held(model, ways),
        flops_per_token_before=flops_per_token(model, context),
        flops_per_token_after=flops_per_token(after, context),
    )


def _plan_part(model: PreTrainedModel, operator: PartOperator, context: int) -> GrowthPlan:
    before, added = operator.sizes(model)
    each = flops_per_token(model, context)
    return GrowthPlan(
        operators=(operator,),
        contract=operator.contract,
        after=model,
        layers=tuple(range(model.config.num_hidden_layers)),
        lineages={},
        config_changes={},
        parameters_before=before,
        parameters_after=before + added,
        layer_parameters=(before, before + added),
        entries_held=0,
        flops_per_token_before=each,
        # One Part answers a token, and each of its parameters multiplies once, forward and back.
        flops_per_token_after=each + 6.0 * added,
    )


def refuse_wrapped(model: Any) -> None:
    """Refuse what is no model of transformers, bare or with adapters.

    Raises:
        GrowthError: a wrapper, which might keep the old parameters.
    """
    if isinstance(model, PreTrainedModel) or lora_layers(model):
        return
    raise GrowthError(
        f"{type(model).__name__} is no model of transformers: give the model inside it (model.module, "
        "model._orig_mod), and where the wrapper keeps parameters of its own, as DistributedDataParallel and "
        "FSDP do, grow before wrapping"
    )


def _refuse_encoded(model: PreTrainedModel, ways: Mapping[str, Lineage]) -> None:
    """Refuse to grow weights that are stored quantised or spread over processes."""
    read = {way.origin for way in ways.values() if not way.is_same}
    method = getattr(model.config, "quantization_config", None)
    for name, parameter in model.named_parameters():
        if name not in read:
            continue
        kind = type(parameter.data)
        if method is not None or not parameter.is_floating_point() or kind is not Tensor:
            what = f"{parameter.dtype} {kind.__name__}".removeprefix("torch.")
            raise GrowthError(
                f"{name!r} is quantised or sharded ({what}) and cannot grow: load the model unquantised "
                "(dtype=torch.bfloat16), grow, and quantise or shard it again; LoRA adapters on it can grow "
                "(WidenLoraRank)"
            )


def _in_layers(shape: Shape) -> int:
    """Parameters of the layers, or of all where the table of the model knows no layers."""
    sizes = {name: math.prod(size) for name, size in shape.shapes.items()}
    inside = sum(count for name, count in sizes.items() if shape.table.layer_of(name) is not None)
    return inside or sum(sizes.values())


def _entries_held(model: PreTrainedModel, ways: Mapping[str, Lineage]) -> int:
    old = dict(model.named_parameters())
    replaced = [(old[w.origin], w) for w in ways.values() if w.origin and w.inherits and not w.is_same]
    one_by_one = [p.numel() for p, way in replaced if way.is_reversible(p.shape)]
    kept = [p.numel() for p, way in replaced if not way.is_reversible(p.shape)]
    return max(one_by_one, default=0) + sum(kept)


def layer_gains(model: PreTrainedModel, batch: Tensor) -> list[float]:
    """How large a gradient one more unit in each layer's feed-forward part would get.

    New units with random readers are like old ones to the loss, so the mean squared gradient of what old
    units write with is what a new unit's writer, which starts at zero, can expect. (GradMax, Evci et al.
    2022, arXiv:2201.05125, grows where that gradient is largest; it also chooses the readers.)

    Args:
        batch: (B, T) token ids.

    Returns:
        One value for each layer; 0 where the layer is frozen.
    """
    body = body_of(model)
    sizes = body.config
    gains = dict.fromkeys(range(sizes.num_hidden_layers), 0.0)
    for layer, gradient in loss_gradients(model, batch, "ffn").items():
        units = per_layer(body.table.size(sizes, "intermediate_size"), len(gains))[layer]
        gains[layer] = gradient.double().pow(2).sum().item() / units
    return list(gains.values())


def loss_gradients(model: PreTrainedModel, batch: Tensor, dimension: str) -> dict[int, Tensor]:
    """For each layer the gradient of the loss on a batch by what reads a dimension there.

    Nothing of the model is touched: no dropout, and `grad` stays as it is. Frozen layers are left out.
    """
    table = body_of(model).table
    readers: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        axes, layer = table.axes(name), table.layer_of(name)
        reads = axes.read is not None and axes.names[axes.read] == dimension
        if layer is not None and reads and parameter.requires_grad:
            readers[layer] = parameter
    with evaluating(model):
        ids = batch.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        found = torch.autograd.grad(loss, list(readers.values())) if readers else ()
    return dict(zip(readers, found, strict=True))


def random_batch(model: PreTrainedModel, seed: int) -> Tensor:
    """(2, 16) token ids, for a check where nobody gave text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (2, 16), generator=generator).to(model.device)


def _shape_of(model: PreTrainedModel, seed: int, gains: Sequence[float] | None) -> Shape:
    body = body_of(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Shape(body.config, shapes, body.table, gains, seed)


def _checked(
    body: Body,
    config: PreTrainedConfig,
    before: Shape,
    params: ParamMap,
    operator: Operator,
) -> PreTrainedModel:
    """The grown model on meta; the map must give exactly its tensors."""
    try:
        after = body.like(config)
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
    said = {contract.exactness for contract in contracts}
    weakest = next(each for each in ("none", "old tokens", "tolerance") if each in said)
    rescales = any(contract.rescales for contract in contracts)
    return Contract(weakest, alive_within=waiting, rescales=rescales)


def describe(operator: Operator) -> dict[str, Any]:
    """An operator's name and the settings that were given."""
    settings = {name: value for name, value in vars(operator).items() if value is not None}
    return {"type": type_name(type(operator), OPERATORS), **settings}
