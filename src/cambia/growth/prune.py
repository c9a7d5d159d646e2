"""Pruning, the inverse of widening: feed-forward units that matter least are dropped from a live model.

    >>> event = prune(model, factor=0.75, optimizer=optimizer, batch=ids)
    >>> event.loss_before, event.loss_after
    (2.1134, 2.1187)

It goes through the same barrier as growth, so the optimizer keeps what it knows of the units that stay.
Nothing about it is exact: the event says by how much the loss changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cambia.errors import ConfigError, GrowthError
from cambia.growth.barrier import grow
from cambia.growth.carry import Holder
from cambia.growth.operators import Contract, Operator, Shape, Step
from cambia.growth.plan import loss_gradients, random_batch
from cambia.models.architectures import per_layer, uniform
from cambia.models.bodies import body_of
from cambia.nn.param_map import AxisMap, ParamMap, TensorMap
from cambia.records import GrowthEvent

Score = Literal["norm", "taylor"]


@dataclass(frozen=True)
class KeepUnits(Operator):
    """Keeps the named feed-forward units and drops the others."""

    kept: Mapping[int, Sequence[int]]
    """Layer -> places of the units that stay, in their order; layers that are not named stay whole."""

    @property
    def contract(self) -> Contract:
        return Contract(exactness="none", alive_within=1)

    def step(self, shape: Shape) -> Step:
        widths = shape.each("intermediate_size")
        left = uniform(len(self.kept.get(i, range(w))) for i, w in enumerate(widths))
        config = shape.with_sizes(intermediate_size=left)
        tensors = {}
        for name in shape.shapes:
            axes, layer = shape.table.axes(name), shape.table.layer_of(name)
            if layer is not None and layer in self.kept and "ffn" in axes.names:
                index = torch.tensor(self.kept[layer])
                tensors[name] = TensorMap(name, {axes.names.index("ffn"): AxisMap(index)})
            else:
                tensors[name] = TensorMap(name)
        return Step(config, ParamMap(tensors), list(range(shape.num_layers)))


def prune(
    model: PreTrainedModel,
    *,
    factor: float | None = None,
    remove: int | None = None,
    to: int | None = None,
    layers: Literal["all"] | Sequence[int] = "all",
    score: Score = "norm",
    batch: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    holders: Sequence[Holder] = (),
    context: int = 1024,
) -> GrowthEvent:
    """Drop the feed-forward units that matter least, in place.

    Args:
        model: any model with an architecture table.
        factor, remove, to: keep this share of each layer's units, drop this many, or keep this many.
        layers: which layers; only a native model's may differ in width.
        score: what a unit is worth. norm: the product of the norms of what it reads and writes with ·
            taylor: the change of the loss on `batch` that its absence promises to first order, the weight
            of its writer times the gradient (Molchanov et al. 2017, arXiv:1611.06440).
        batch: (B, T) token ids for the taylor score, and on which the change in loss is told; by default
            32 random tokens.
        optimizer: keeps its state of the units that stay.
        holders: whatever else keeps state per parameter.
        context: tokens per sequence, for the count of operations.

    Returns:
        What was done and what it cost in loss.

    Raises:
        ConfigError: not exactly one amount, or one that prunes nothing.
        GrowthError: a layer would lose all of its units, or is not there.
    """
    given = [
        name for name, value in (("factor", factor), ("remove", remove), ("to", to)) if value is not None
    ]
    if len(given) != 1:
        raise ConfigError(f"prune takes exactly one of factor=, remove= and to=, got {given or 'none'}")
    body = body_of(model)
    widths = per_layer(body.table.size(body.config, "intermediate_size"), body.config.num_hidden_layers)
    chosen = list(range(len(widths))) if layers == "all" else sorted(layers)
    if wrong := [i for i in chosen if not 0 <= i < len(widths)]:
        raise GrowthError(f"layers={wrong} are not there: the model has layers 0 to {len(widths) - 1}")
    if not body.table.uneven and len(chosen) < len(widths):
        raise GrowthError("a stock model has one FFN width for all layers: prune all of them")
    batch = random_batch(model, 0) if batch is None else batch
    worth = unit_scores(model, score, batch)
    kept = {}
    for i in chosen:
        count = _left(widths[i], factor=factor, remove=remove, to=to)
        best = torch.argsort(worth[i], descending=True, stable=True)[:count]
        kept[i] = sorted(best.tolist())
    return grow(
        model,
        KeepUnits(kept),
        optimizer=optimizer,
        holders=holders,
        check_batch=batch,
        reason=f"pruned by {score}",
        context=context,
    )


def _left(width: int, *, factor: float | None, remove: int | None, to: int | None) -> int:
    if factor is not None:
        if not 0 < factor < 1:
            raise ConfigError(f"factor={factor} prunes nothing that could be left: it lies between 0 and 1")
        count = math.ceil(width * factor)
    else:
        count = width - remove if remove is not None else to or 0
    if not 0 < count <= width:
        raise GrowthError(f"a layer of {width} units cannot be left with {count}: keep at least one")
    return count


def unit_scores(model: PreTrainedModel, score: Score, batch: Tensor) -> list[Tensor]:
    """What each feed-forward unit is worth: for each layer (units,), float64."""
    if score not in ("norm", "taylor"):
        raise ConfigError(f"score={score!r}: expected norm or taylor")
    table = body_of(model).table
    gradients = loss_gradients(model, batch, "ffn") if score == "taylor" else {}
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        axes, layer = table.axes(name), table.layer_of(name)
        if layer is None or "ffn" not in axes.names or len(axes.names) < 2:
            continue
        dim = axes.names.index("ffn")
        weight = parameter.detach().double()
        others = [d for d in range(weight.dim()) if d != dim]
        if axes.read != dim:
            norm = weight.pow(2).sum(others).sqrt()
            read[layer] = norm if layer not in read else read[layer] * norm
        elif score == "taylor":
            found = gradients.get(layer)
            change = torch.zeros_like(weight) if found is None else weight * found.double()
            written[layer] = change.sum(others).abs()
        else:
            written[layer] = weight.pow(2).sum(others).sqrt()
    if score == "taylor":
        return [written[i] for i in sorted(written)]
    return [read[i] * written[i] for i in sorted(written)]
