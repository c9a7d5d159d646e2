"""Operators: each changes a model's shape once.

An operator is pure arithmetic. Given a model's config and the shapes of its parameters it answers with
the config afterwards and a `ParamMap`; it touches no weight. `grow` and `plan_growth` do the rest, the
same for every operator.

    WidenFFN(factor=1.5)                     more units in the feed-forward layers
    AddLayers(add=2, where="interpose")      more layers

To add one: subclass `Operator`, say in `contract` what it keeps, and return a `Step`. The rows of
`cambia.models.architectures` say which tensors a dimension runs through.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from cambia.config import Spelled
from cambia.errors import ConfigError, GrowthError
from cambia.models.architectures import Architecture, architecture_of, layer_ids, per_layer, uniform
from cambia.nn.param_map import AxisMap, Fill, ParamMap, TensorMap

OPERATORS: dict[str, str] = {
    "widen_ffn": "cambia.growth.operators:WidenFFN",
    "add_layers": "cambia.growth.operators:AddLayers",
}


@dataclass(frozen=True)
class Contract:
    """What an operator promises; the law tests hold it to this."""

    exactness: Literal["tolerance", "none"]
    """tolerance: same logits up to rounding; none: a jump is part of the method."""
    alive_within: int
    """Steps after which every new tensor has had a gradient that is not zero."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What an operator sees of a model."""

    config: PreTrainedConfig
    shapes: Mapping[str, torch.Size]
    """Every parameter's shape by name, tied ones once."""

    @property
    def table(self) -> Architecture:
        return architecture_of(self.config)

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def copied_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)


@dataclass(frozen=True, eq=False)
class Step:
    """An operator's answer."""

    config: PreTrainedConfig
    params: ParamMap
    layers: list[int | None]
    """For each layer afterwards the one it was, None where it is new."""


@dataclass(frozen=True)
class Operator(Spelled, ABC):
    """Changes a model's shape once."""

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this operator, with these settings, keeps."""

    @abstractmethod
    def step(self, shape: Shape) -> Step:
        """The model afterwards.

        Raises:
            GrowthError: it cannot be done to this model; the message says why and what can.
        """


@dataclass(frozen=True)
class Amount:
    """How much: exactly one of three ways to say it."""

    factor: float | None = None
    """Multiply the size by this, above 1."""
    add: int | None = None
    """Add this many."""
    to: int | None = None
    """Grow to this size."""

    def __post_init__(self) -> None:
        given = [name for name in ("factor", "add", "to") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{type(self).__name__} takes exactly one of factor=, add= and to=, got {given or 'none'}"
            )
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 1):
            raise ConfigError(f"factor={self.factor} does not grow anything; it must be above 1")
        if self.add is not None and self.add < 1:
            raise ConfigError(f"add={self.add} does not grow anything; it must be at least 1")

    def after(self, size: int, *, multiple_of: int = 1) -> int:
        """The size after growth; a factor is rounded to a multiple, but grows by at least one."""
        if self.add is not None:
            return size + self.add
        if self.to is not None:
            if self.to <= size:
                raise GrowthError(f"to={self.to} is not larger than the present size {size}")
            return self.to
        assert self.factor is not None
        rounded = round(size * self.factor / multiple_of) * multiple_of
        return rounded if rounded > size else (size // multiple_of + 1) * multiple_of


_OLD_AMOUNTS = {"growth_factor": "factor", "add_hidden": "add", "new_d_ff": "to", "layers_per_event": "add"}


def lengthened(shape: Shape, dimension: str, sizes: Mapping[int, int], *, std: float) -> ParamMap:
    """The map that lengthens one dimension inside layers, exactly.

    Whatever makes the dimension gets new random entries, whatever reads it gets zeros, so that the new
    units compute something but nothing hears them yet. The other way round they would never learn:
    with zeros on both sides each side's gradient is multiplied by the other's zero.
    (Gesmundo & Maile 2023, arXiv:2308.06103.)

    Args:
        sizes: layer index -> size afterwards.
        std: for new entries where the old ones are all zero.
    """
    tensors = {}
    for name, old in shape.shapes.items():
        axes = shape.table.axes(name)
        layer = shape.table.layer_of(name)
        if layer is None or layer not in sizes or dimension not in axes.names:
            tensors[name] = TensorMap(name)
            continue
        dim = axes.names.index(dimension)
        is_random = axes.read is not None and axes.read != dim
        tensors[name] = TensorMap(
            name,
            {dim: AxisMap.lengthened(old[dim], sizes[layer])},
            fill=Fill.normal(std) if is_random else Fill.zeros(),
        )
    return ParamMap(tensors)


@dataclass(frozen=True)
class WidenFFN(Amount, Operator):
    """More units in the feed-forward layers: exact, and alive from the second step on."""

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = _OLD_AMOUNTS

    layers: Literal["all"] | list[int] = "all"
    """Which layers, by place from the bottom; only a native model's layers may differ in width."""
    multiple_of: int = 8
    """A factor is rounded to a multiple of this, which matrix kernels like."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of={self.multiple_of} must be at least 1")

    @property
    def contract(self) -> Contract:
        # Writers' zero columns get a gradient at the first step, readers' rows once those have moved.
        return Contract(exactness="tolerance", alive_within=2)

    def step(self, shape: Shape) -> Step:
        widths = per_layer(shape.config.intermediate_size, shape.num_layers)
        chosen = self._chosen(shape)
        sizes = {i: self.after(widths[i], multiple_of=self.multiple_of) for i in chosen}
        config = shape.copied_config()
        config.intermediate_size = uniform(sizes.get(i, width) for i, width in enumerate(widths))
        params = lengthened(shape, "ffn", sizes, std=config.initializer_range)
        return Step(config, params, list(range(shape.num_layers)))

    def _chosen(self, shape: Shape) -> list[int]:
        every = list(range(shape.num_layers))
        if self.layers == "all" or sorted(self.layers) == every:
            return every
        if not shape.table.uneven:
            raise GrowthError(
                f"a stock {shape.table.name} model has one FFN width for all layers: use layers='all' "
                "(a native model may be uneven)"
            )
        wrong = [i for i in self.layers if i not in every]
        if wrong or not self.layers:
            raise GrowthError(f"layers={wrong} are not there: the model has layers 0 to {every[-1]}")
        return sorted(self.layers)


@dataclass(frozen=True)
class AddLayers(Amount, Operator):
    """More layers, copies of old ones or fresh; exact, since what they write with starts at zero.

    Sources: Gong et al. 2019 (stacking), G_stack, NeurIPS 2024 (arXiv:2405.15319; `where="stack"` with
    `preserve=False`), MIDAS, NeurIPS 2024 (arXiv:2409.19044; "middle"), orthogonal growth (interposing,
    arXiv:2510.08008), LLaMA-Pro (zero writers, arXiv:2401.02415).
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = _OLD_AMOUNTS

    where: Literal["append", "interpose", "stack", "middle"] = "interpose"
    """append: copies of the top layers on top · interpose: each copy next to its original, spread evenly
    · stack: the whole stack again on top, from its bottom · middle: the middle layers again behind
    themselves."""
    initial: Literal["copy", "random"] = "copy"
    """What a new layer starts as: a copy of the old layer it stands for, or random weights."""
    preserve: bool = True
    """Zero the new layers' o_proj and down_proj, so that nothing changes at first. False keeps the
    copies' own: the loss jumps, and the event says so."""

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance" if self.preserve else "none", alive_within=2)

    def step(self, shape: Shape) -> Step:
        if not shape.num_layers:
            raise GrowthError(
                "the model has no layer that new ones could be like: build it with at least one"
            )
        count = self.after(shape.num_layers) - shape.num_layers
        order = self._order(shape.num_layers, count)
        config = shape.copied_config()
        config.num_hidden_layers = len(order)
        ids = layer_ids(shape.config)
        fresh = iter(range(max(ids) + 1, max(ids) + 1 + count))
        config.layer_ids = [next(fresh) if place.is_new else ids[place.like] for place in order]
        for name in shape.table.per_layer_fields:
            sizes = per_layer(getattr(shape.config, name), shape.num_layers)
            setattr(config, name, uniform(sizes[place.like] for place in order))
        tensors = {name: TensorMap(name) for name in shape.shapes if shape.table.layer_of(name) is None}
        for i, place in enumerate(order):
            tensors.update(self._layer(shape, i, place))
        return Step(config, ParamMap(tensors), [None if place.is_new else place.like for place in order])

    def _order(self, depth: int, count: int) -> list[Place]:
        old = [Place(i) for i in range(depth)]
        if self.where == "append":
            return old + [Place(depth - min(count, depth) + i % depth, is_new=True) for i in range(count)]
        if self.where == "stack":
            return old + [Place(i % depth, is_new=True) for i in range(count)]
        if self.where == "middle":
            size = min(count, depth)
            first = (depth - size) // 2
            block = [Place(first + i % size, is_new=True) for i in range(count)]
            return old[: first + size] + block + old[first + size :]
        # Copies spread evenly: the i-th of `count` stands behind old layer floor((i + 1/2) depth / count).
        behind = [int((i + 0.5) * depth / count) for i in range(count)]
        return [p for i in range(depth) for p in [Place(i), *[Place(i, is_new=True)] * behind.count(i)]]

    def _layer(self, shape: Shape, index: int, place: Place) -> dict[str, TensorMap]:
        table = shape.table
        tensors = {}
        for name, old in shape.shapes.items():
            if table.layer_of(name) != place.like:
                continue
            new_name = table.renamed(name, index)
            if not place.is_new:
                tensors[new_name] = TensorMap(name)
                continue
            is_writer = any(f".{writer}." in name for writer in table.layer_writers)
            if is_writer and self.preserve:
                tensors[new_name] = TensorMap(None, fill=Fill.zeros(), shape=tuple(old), sibling=name)
            elif self.initial == "copy":
                tensors[new_name] = TensorMap(name, inherits=False, sibling=name)
            else:
                tensors[new_name] = TensorMap(
                    None, fill=self._random(shape, name), shape=tuple(old), sibling=name
                )
        return tensors

    def _random(self, shape: Shape, name: str) -> Fill:
        if shape.table.axes(name).read is not None:
            return Fill.normal(shape.config.initializer_range)
        # Vectors are norm gains, which start at one, and biases, which start at zero.
        return Fill.zeros() if name.endswith("bias") else Fill.ones()


@dataclass(frozen=True)
class Place:
    """One place in the new order of layers."""

    like: int
    """The old layer that stands here, or that a new one is modelled on."""
    is_new: bool = field(default=False)
