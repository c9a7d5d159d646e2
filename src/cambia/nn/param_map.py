"""Where every tensor of a grown model comes from: the one description of a growth step.

Growing a model makes its tensors longer along some axes, or adds tensors. A `TensorMap` says, for one
tensor after growth, which tensor it was, which of its positions are old ones (and which), by what old
values were multiplied, and what new positions hold. A `ParamMap` is one growth operator's map of all
tensors. From it follow the new weights *and* the new form of everything that is kept per parameter:

    weights, averages of weights     w' = c w
    first moments (momentum)         m' = m / c      because the gradient is divided by c
    second moments, Fisher           v' = v / c^2

(Staged Training, Shen et al. 2022, arXiv:2203.06211, maps moments this way; its c is 1/2.) Where growth
changes the gradient in another way, as splitting a unit does, an `AxisMap` says so in `gradient`.

    >>> grown = TensorMap("w", {0: AxisMap.lengthened(2, 3)}, fill=Fill.zeros())
    >>> grown.values(torch.ones(2, 2), seed=0)
    tensor([[1., 1.],
            [1., 1.],
            [0., 0.]])
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cambia.nn.blocks import blocks_of, mean_along, root_mean_square, row_blocks

NEW = -1  # the source position of an entry that did not exist before
MEAN = -2  # of one that did not exist before either, and starts as the mean of all old ones along its axis


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis of a tensor after growth."""

    index: Tensor
    """(new size,) int64: the old position that each position takes, or `NEW` or `MEAN`."""
    scale: Tensor | None = None
    """(new size,) float64: what old values along this axis are multiplied by; None means 1."""
    gradient: Tensor | None = None
    """(new size,) float64: what gradients along this axis are multiplied by; None means 1 / scale."""
    groups: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """New position at `MEAN` -> the old ones whose mean it is, where not all of them are meant."""

    @classmethod
    def lengthened(cls, old: int, new: int) -> AxisMap:
        """Old positions first, new ones behind them."""
        index = torch.arange(new)
        index[old:] = NEW
        return cls(index)

    @classmethod
    def averaged(cls, old: int, new: int) -> AxisMap:
        """Old positions first, behind them new ones that hold the mean of the old ones."""
        index = torch.arange(new)
        index[old:] = MEAN
        return cls(index)

    def factor(self, power: int) -> Tensor | None:
        """(new size,): what something that goes with the weight to this power is multiplied by."""
        if power < 0 and self.gradient is not None:
            return self.gradient.pow(-power)
        return None if self.scale is None else self.scale.pow(power)

    def places(self) -> Tensor:
        """(old size,): where each old entry stands now; of several places one."""
        old = self.index[~self.is_new]
        places = torch.full((int(old.max()) + 1 if len(old) else 0,), NEW)
        places[old] = (~self.is_new).nonzero().squeeze(1)
        return places

    @property
    def is_new(self) -> Tensor:
        """(new size,) bool."""
        return self.index < 0

    @property
    def is_filled(self) -> Tensor:
        """(new size,) bool: which hold what a `Fill` says."""
        return self.index == NEW


@dataclass(frozen=True)
class Fill:
    """What new positions of a tensor hold."""

    kind: str
    std: float = 0.0
    """Standard deviation of normal values, used where the old tensor cannot tell one."""

    @classmethod
    def zeros(cls) -> Fill:
        return cls("zeros")

    @classmethod
    def ones(cls) -> Fill:
        return cls("ones")

    @classmethod
    def normal(cls, std: float) -> Fill:
        """Normal values with the root mean square of the old ones, so that new units speak as loudly.

        Keeping the scale is what makes widening in mid-training work (SPARKLING, arXiv:2602.02472).
        Where there are no old values, or they are all zero, `std` is used.
        """
        return cls("normal", std)

    @classmethod
    def level(cls, times: float = 1.0) -> Fill:
        """The root mean square of the old values, times a number; `times` itself where there are none."""
        return cls("level", times)

    def draw(self, shape: Sequence[int], *, like: Tensor | None, seed: int) -> Tensor:
        """Values of the given shape in float32 or float64, drawn on the CPU so that devices agree."""
        rms = 0.0
        if like is not None and self.needs_level:
            rms = root_mean_square(blocks_of(like))
        return self.drawing(rms=rms, dtype=None if like is None else like.dtype, seed=seed)(shape)

    @property
    def needs_level(self) -> bool:
        """Whether the values depend on the root mean square of the old ones."""
        return self.kind in ("normal", "level")

    def drawing(
        self, *, rms: float, dtype: torch.dtype | None, seed: int
    ) -> Callable[[Sequence[int]], Tensor]:
        """A function that gives values of a shape, and the next ones when it is called again.

        Drawn in the blocks of `row_blocks`, one after the other, they are those that are drawn at once.

        Args:
            rms: root mean square of the old values; 0 where there are none.
            dtype: of the old values; float64 is filled with float64, all else with float32.
        """
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(seed)

        def values(shape: Sequence[int]) -> Tensor:
            if self.kind == "normal":
                return torch.randn(*shape, generator=generator, dtype=kind) * (rms or self.std)
            constants = {"zeros": 0.0, "ones": 1.0, "level": (rms or 1.0) * self.std}
            return torch.full(tuple(shape), constants[self.kind], dtype=kind)

        return values


@dataclass(frozen=True, eq=False)
class TensorMap:
    """One tensor after growth, told by what it was before."""

    source: str | None
    """Name before growth of the tensor whose values it takes; None: all of it is new."""
    axes: Mapping[int, AxisMap] = field(default_factory=dict)
    """Axes that changed, by dimension."""
    fill: Fill = Fill("zeros")
    shape: tuple[int, ...] | None = None
    """Shape of a tensor without a source."""
    inherits: bool = True
    """It is the same parameter, grown. False for a copy, which starts with a state of its own."""
    sibling: str | None = None
    """Name before growth of the parameter that a new one is trained like (its optimizer group)."""
    fade_in: float = 0.0
    """The share of its sibling's values that a new tensor comes up to while it warms up."""

    @property
    def is_same(self) -> bool:
        """Values and parameter are untouched; at most the name is another."""
        return self.source is not None and self.inherits and not self.axes

    def values(self, old: Tensor | None, *, seed: int) -> Tensor:
        """The tensor after growth, from the tensor before (None where there is no source)."""
        if self.source is None:
            assert self.shape is not None
            return self.fill.draw(self.shape, like=None, seed=seed)
        assert old is not None
        grown = self._gather(old, power=1)
        if self.is_filled:
            rms = root_mean_square(blocks_of(old)) if self.fill.needs_level else 0.0
            draw = self.fill.drawing(rms=rms, dtype=old.dtype, seed=seed)
            # Block by block: what is drawn would take as much memory as the tensor, which may be the largest.
            for first, last in row_blocks(grown.shape):
                rows = grown[first:last]
                self.of_rows(first, last).fill_in(rows, draw(rows.shape))
        return grown

    @property
    def is_filled(self) -> bool:
        """Whether any position holds what `fill` says."""
        return self.source is None or any(bool(axis.is_filled.any()) for axis in self.axes.values())

    def shape_after(self, before: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor after growth; `before` is that of its source."""
        if self.source is None:
            assert self.shape is not None
            return self.shape
        return tuple(len(self.axes[dim].index) if dim in self.axes else n for dim, n in enumerate(before))

    def applied(self, old: Tensor, drawn: Tensor | None) -> Tensor:
        """The tensor after growth, from its source and what its fill drew (None where nothing is filled)."""
        grown = self._gather(old, power=1)
        if drawn is not None:
            self.fill_in(grown, drawn)
        return grown

    def fill_in(self, grown: Tensor, drawn: Tensor) -> None:
        """Put what was drawn, of the grown shape, to the positions that hold what `fill` says."""
        filled = [_along(a.is_filled, dim, grown) for dim, a in self.axes.items() if bool(a.is_filled.any())]
        if filled:
            mask = functools.reduce(torch.logical_or, filled)
            grown.copy_(torch.where(mask, drawn.to(grown), grown))

    def of_rows(self, first: int, last: int) -> TensorMap:
        """The map of some rows after growth, of which each stands already where it will be."""
        if 0 not in self.axes:
            return self
        axis = self.axes[0]
        kept = torch.where(axis.index[first:last] == NEW, NEW, torch.arange(last - first))
        scale = None if axis.scale is None else axis.scale[first:last]
        return replace(self, axes={**self.axes, 0: AxisMap(kept, scale)})

    def carry(self, state: Tensor, *, power: int, new: float = 0.0) -> Tensor:
        """A per-element state of the old tensor, in the form of the new one.

        Args:
            state: same shape as the old tensor.
            power: 1 for weights and averages of them, -1 for first moments, -2 for second moments.
            new: what new positions get.
        """
        carried = self._gather(state, power=power)
        is_new = self.new_mask(state)
        return carried if is_new is None else carried.masked_fill_(is_new, new)

    def take_back(self, grown: Tensor) -> Tensor:
        """What the old tensor was, read from the new one at the places of the old entries.

        Only where no old entry was dropped or multiplied: see `Lineage.is_reversible`.
        """
        for dim, axis in self.axes.items():
            grown = grown.index_select(dim, axis.places().to(grown.device))
        return grown

    def new_mask(self, like: Tensor) -> Tensor | None:
        """Which positions are new: bool, broadcastable to the new shape; None if none is.

        Args:
            like: any tensor of the old shape, for its number of dimensions and its device.
        """
        masks = [_along(a.is_new, dim, like) for dim, a in self.axes.items() if bool(a.is_new.any())]
        return functools.reduce(torch.logical_or, masks) if masks else None

    def _gather(self, old: Tensor, *, power: int) -> Tensor:
        result = old
        for dim, axis in sorted(self.axes.items()):
            before = result
            result = before.index_select(dim, axis.index.clamp_min(0).to(old.device))
            averaged = axis.index == MEAN
            if bool(averaged.any()):
                places = averaged.nonzero().squeeze(1)
                result.index_copy_(dim, places.to(old.device), self._means(before, dim, places.tolist()))
            factor = axis.factor(power)
            if factor is not None and power != 0:
                result = result * _along(factor.to(old.dtype), dim, old)
        # A tensor that no axis changed is a copy nevertheless: nobody shares memory by accident.
        return result if self.axes else old.clone()

    def _means(self, before: Tensor, dim: int, places: Sequence[int]) -> Tensor:
        """What stands at the given new places along an axis: means of old entries."""
        groups = self.axes[dim].groups
        shape = [len(places) if d == dim else size for d, size in enumerate(before.shape)]
        means = mean_along(blocks_of(before), dim).expand(shape).clone()
        for i, place in enumerate(places):
            if place in groups:
                group = torch.tensor(list(groups[place]), device=before.device)
                means.narrow(dim, i, 1).copy_(mean_along([before.index_select(dim, group)], dim))
        return means


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return vector.to(like.device).view(shape)


@dataclass(frozen=True, eq=False)
class ParamMap:
    """One operator's effect on all tensors of a model: name after growth -> `TensorMap`."""

    tensors: Mapping[str, TensorMap]


@dataclass(frozen=True, eq=False)
class Lineage:
    """The way of one tensor through all operators of a growth event, oldest first."""

    name: str
    """Its name after growth."""
    origin: str | None
    """Its name before growth; None if it is all new."""
    maps: tuple[TensorMap, ...]
    """From the first map that has a source in the old model (or creates the tensor) to the last."""
    sibling: str | None
    """Name before growth of the parameter that it is trained like: itself, or what it resembles."""

    @property
    def is_same(self) -> bool:
        return all(m.is_same for m in self.maps)

    @property
    def fade_in(self) -> float:
        """The share of its sibling's values that it comes up to while it warms up."""
        return max(m.fade_in for m in self.maps)

    @property
    def inherits(self) -> bool:
        """Whether it is the same parameter, so that optimizer state goes along."""
        return self.origin is not None and all(m.inherits for m in self.maps)

    def values(self, old: Tensor | None, *, seed: int) -> Tensor:
        """The tensor after all operators; random values depend on `seed` and the name alone."""
        result = old
        for tensor_map, number in self.steps(seed):
            result = tensor_map.values(result, seed=number)
        assert result is not None
        return result

    def steps(self, seed: int) -> list[tuple[TensorMap, int]]:
        """Each map with the seed of its random values, which the growth's seed and the name decide."""
        return [(each, _seed_of(seed, self.name, step)) for step, each in enumerate(self.maps)]

    def carry(self, state: Tensor, *, power: int, new: float = 0.0) -> Tensor:
        """Per-element state through all operators; see `TensorMap.carry`."""
        for tensor_map in self.maps:
            state = tensor_map.carry(state, power=power, new=new)
        return state

    def is_reversible(self, shape: Sequence[int], *, power: int = 1) -> bool:
        """Whether the old tensor can be read back from the new one, bit by bit.

        Args:
            shape: of the old tensor.
            power: of what goes with the weights; see `carry`.
        """
        sizes = list(shape)
        for tensor_map in self.maps:
            for dim, axis in tensor_map.axes.items():
                kept = axis.index[~axis.is_new].unique()
                if len(kept) < sizes[dim] or axis.factor(power) is not None:
                    return False
                sizes[dim] = len(axis.index)
        return self.origin is not None

    def take_back(self, grown: Tensor) -> Tensor:
        """The tensor before all operators, where `is_reversible`."""
        for tensor_map in reversed(self.maps):
            grown = tensor_map.take_back(grown)
        return grown

    def new_mask(self, old: Tensor) -> Tensor:
        """Which positions are new, of the new shape: True there.

        A copied or fresh parameter is new throughout; `old` is then any tensor of the *new* shape.
        """
        if not self.inherits:
            return torch.ones_like(old, dtype=torch.bool)
        return self.carry(torch.zeros_like(old, dtype=torch.float32), power=0, new=1.0).bool()


def _seed_of(seed: int, name: str, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def lineages(steps: Sequence[ParamMap], names: Iterable[str]) -> dict[str, Lineage]:
    """Follow each named tensor of the grown model back through the operators' maps."""
    result = {}
    for name in names:
        maps: list[TensorMap] = []
        origin: str | None = name
        for step in reversed(steps):
            tensor_map = step.tensors[origin]
            maps.append(tensor_map)
            origin = tensor_map.source
            if origin is None:
                break
        result[name] = Lineage(name, origin, tuple(reversed(maps)), _sibling(steps, name))
    return result


def _sibling(steps: Sequence[ParamMap], name: str) -> str | None:
    # A map names the sibling as it was called before that one step, so go back through all of them.
    sibling: str | None = name
    for step in reversed(steps):
        if sibling is None:
            break
        tensor_map = step.tensors[sibling]
        sibling = tensor_map.sibling or tensor_map.source
    return sibling
