"""Width: more units in the feed-forward layers, where, how many in each, and what they start as."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cambia.config import resolve_function
from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.models.architectures import uniform
from cambia.nn.param_map import AxisMap, Fill, ParamMap, TensorMap


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
    tensors = {name: TensorMap(name) for name in shape.shapes}
    for name, dim, after in _along(shape, dimension, sizes):
        read = shape.table.axes(name).read
        is_random = read is not None and read != dim
        tensors[name] = TensorMap(
            name,
            {dim: AxisMap.lengthened(shape.shapes[name][dim], after)},
            fill=Fill.normal(std) if is_random else Fill.zeros(),
        )
    return ParamMap(tensors)


SPLIT = 0.7
"""Share of a split unit's output that the old unit keeps. Halves would never part: equal clones get equal
gradients. With this split clones part, but slowly under Adam, which divides by the size of the gradient:
their readers have a cosine of 0.33 after 1,500 steps on a toy problem, and of 0.9999 after 200 steps of a
trained model (benchmarks/growth_peers.json)."""


def split(shape: Shape, dimension: str, sizes: Mapping[int, int]) -> ParamMap:
    """The map that lengthens one dimension inside layers by splitting units in two, exactly.

    A clone reads what its original reads, and both write shares of what the original wrote (Net2Net,
    Chen et al. 2016, arXiv:1511.05641; the uneven shares are ours). What a unit writes with sees the
    gradient that it saw before, and what it reads with sees its share of it.
    """
    tensors = {name: TensorMap(name) for name in shape.shapes}
    for name, dim, after in _along(shape, dimension, sizes):
        index, shares = split_in_shares(shape.shapes[name][dim], after)
        if shape.table.axes(name).read == dim:
            axis = AxisMap(index, scale=shares, gradient=torch.ones_like(shares))
        else:
            axis = AxisMap(index, gradient=shares)
        tensors[name] = TensorMap(name, {dim: axis})
    return ParamMap(tensors)


def _along(shape: Shape, dimension: str, sizes: Mapping[int, int]) -> Iterator[tuple[str, int, int]]:
    """Parameters of the layers that grow along which the dimension runs: name, axis, size afterwards."""
    for name in shape.shapes:
        names, layer = shape.table.axes(name).names, shape.table.layer_of(name)
        if layer is not None and layer in sizes and dimension in names:
            yield name, names.index(dimension), sizes[layer]


def split_in_shares(size: int, after: int) -> tuple[Tensor, Tensor]:
    """For each unit afterwards the old one that it was and its share of what that one wrote."""
    born = after - size
    if born <= size:
        originals, generation = torch.arange(born) * size // born, torch.ones(born)  # spread evenly
    else:
        originals, generation = torch.arange(born) % size, torch.arange(born) // size + 1
    clones = torch.bincount(originals, minlength=size)
    # 0.7 | 0.3, and with more clones 0.7 | 0.21 | 0.09: no two shares of one unit are equal.
    last = generation == clones[originals]
    one, kept_share = torch.ones((), dtype=torch.float64), torch.tensor(SPLIT, dtype=torch.float64)
    shares = (1 - kept_share) ** generation.double() * torch.where(last, one, kept_share)
    kept = torch.where(clones > 0, kept_share, one)
    return torch.cat([torch.arange(size), originals]), torch.cat([kept, shares])


EACH: dict[str, Callable[[int, int], float]] = {
    "deeper": lambda layer, depth: (2 * layer + 1) / depth,
    "shallower": lambda layer, depth: (2 * (depth - layer) - 1) / depth,
}
"""Multipliers by name, from (layer, number of layers); each is 1 on average."""

_CHOICES = ("all", "top", "bottom", "middle", "random", "gradient")


@dataclass(frozen=True)
class WidenFFN(Amount, Operator):
    """More units in the feed-forward layers: exact, and alive from the second step on."""

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {**OLD_AMOUNTS, "layer_selection": "layers"}

    layers: Literal["all", "top", "bottom", "middle", "random", "gradient"] | list[int] = "all"
    """Which layers: places from the bottom, or a way to choose `count` of them. gradient takes those where
    one more unit would get the largest gradient, measured on the check batch. Only a native model's layers
    may differ in width."""
    count: int = 1
    """How many layers, where `layers` is a way to choose."""
    each: list[float] | str | None = None
    """How the amount differs from layer to layer: a multiplier of what is added for each layer of the
    model, or the name of a function that gives it: deeper, shallower, or "my_module:function" of (layer,
    number of layers)."""
    multiple_of: int = 8
    """A factor is rounded to a multiple of this, which matrix kernels like."""
    initial: Literal["random", "split"] = "random"
    """What new units are. random: new readers, and writers of zero · split: clones of old units, which
    share what their originals wrote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of={self.multiple_of} must be at least 1")
        if self.count < 1:
            raise ConfigError(f"count={self.count} must be at least 1 layer")
        if not (isinstance(self.layers, list) or self.layers in _CHOICES):
            raise ConfigError(f"layers={self.layers!r}: expected places, or one of {', '.join(_CHOICES)}")
        if self.each is not None and self.to is not None:
            raise ConfigError("each= multiplies what is added, and to= says where to end: give one of them")
        if isinstance(self.each, list) and (not self.each or min(self.each) < 0 or max(self.each) == 0):
            raise ConfigError(f"each={self.each} must hold multipliers of at least 0, and one above it")

    @property
    def contract(self) -> Contract:
        # Writers' zero columns get a gradient at the first step, readers' rows once those have moved.
        is_split = self.initial == "split"
        return Contract(exactness="tolerance", alive_within=1 if is_split else 2, rescales=is_split)

    @property
    def needs_gains(self) -> bool:
        return self.layers == "gradient"

    def step(self, shape: Shape) -> Step:
        shape.need("ffn")
        widths = shape.each("intermediate_size")
        sizes = self._sizes(shape, widths)
        wider = uniform(sizes.get(i, width) for i, width in enumerate(widths))
        config = shape.with_sizes(intermediate_size=wider)
        if self.initial == "split":
            params = split(shape, "ffn", sizes)
        else:
            params = lengthened(shape, "ffn", sizes, std=config.initializer_range)
        return Step(config, params, list(range(shape.num_layers)))

    def _sizes(self, shape: Shape, widths: Sequence[int]) -> dict[int, int]:
        """Layer -> width afterwards, of the layers that grow."""
        multipliers = self._multipliers(shape.num_layers)
        if not shape.table.uneven and len(set(multipliers)) > 1:
            raise GrowthError(_one_width(shape))
        sizes = {}
        for i in self._chosen(shape):
            added = self.after(widths[i], multiple_of=self.multiple_of) - widths[i]
            if multipliers[i] != 1:
                unit = self.multiple_of if self.factor is not None else 1
                added = round(added * multipliers[i] / unit) * unit
            if added > 0:
                sizes[i] = widths[i] + added
        if not sizes:
            raise GrowthError(
                f"{self}: the amount comes to nothing in every chosen layer; raise it, or lower multiple_of"
            )
        return sizes

    def _multipliers(self, depth: int) -> list[float]:
        if self.each is None:
            return [1.0] * depth
        if isinstance(self.each, str):
            function = EACH.get(self.each) or resolve_function(self.each, EACH, "function of the layer")
            return [float(function(i, depth)) for i in range(depth)]
        if len(self.each) != depth:
            raise GrowthError(f"each= holds {len(self.each)} multipliers, the model has {depth} layers")
        return self.each

    def _chosen(self, shape: Shape) -> list[int]:
        every = list(range(shape.num_layers))
        if self.layers == "all" or (isinstance(self.layers, list) and sorted(self.layers) == every):
            return every
        if isinstance(self.layers, list):
            wrong = [i for i in self.layers if i not in every]
            if wrong or not self.layers:
                raise GrowthError(f"layers={wrong} are not there: the model has layers 0 to {every[-1]}")
        chosen = self._named(shape, every) if isinstance(self.layers, str) else sorted(self.layers)
        if not shape.table.uneven and chosen != every:
            raise GrowthError(_one_width(shape))
        return chosen

    def _named(self, shape: Shape, every: list[int]) -> list[int]:
        count = min(self.count, len(every))
        if self.layers == "bottom":
            return every[:count]
        if self.layers == "middle":
            first = (len(every) - count) // 2
            return every[first : first + count]
        if self.layers == "random":
            return sorted(random.Random(shape.seed).sample(every, count))
        if self.layers == "gradient" and shape.gains is not None:
            gains = shape.gains
            return sorted(sorted(every, key=lambda i: (-gains[i], i))[:count])
        return every[len(every) - count :]


def _one_width(shape: Shape) -> str:
    return (
        f"a stock {shape.table.name} model has one FFN width for all layers: use layers='all' without each= "
        "(a native model may be uneven)"
    )
