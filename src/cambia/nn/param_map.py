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

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEW = -1  # the source position of an entry that did not exist before


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis of a tensor after growth."""

    index: Tensor
    """(new size,) int64: the old position that each position takes, or `NEW`."""
    scale: Tensor | None = None
    """(new size,) float64: what old values along this axis are multiplied by; None means 1."""
    gradient: Tensor | None = None
    """(new size,) float64: what gradients along this axis are multiplied by; None means 1 / scale."""

    @classmethod
    def lengthened(cls, old: int, new: int) -> AxisMap:
        """Old positions first, new ones behind them."""
        index = torch.arange(new)
        index[old:] = NEW
        return cls(index)

    def factor(self, power: int) -> Tensor | None:
        """(new size,): what something that goes with the weight to this power is multiplied by."""
        if power < 0 and self.gradient is not None:
            return self.gradient.pow(-power)
        return None if self.scale is None else self.scale.pow(power)

    @property
    def is_new(self) -> Tensor:
        """(new size,) bool."""
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

    def draw(self, shape: Sequence[int], *, like: Tensor | None, seed: int) -> Tensor:
        """Values of the given shape in float32 or float64, drawn on the CPU so that devices agree."""
        dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
        if self.kind == "zeros":
            return torch.zeros(*shape, dtype=dtype)
        if self.kind == "ones":
            return torch.ones(*shape, dtype=dtype)
        rms = 0.0 if like is None or like.numel() == 0 else like.double().pow(2).mean().sqrt().item()
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=dtype) * (rms or self.std)


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
        new = self.new_mask(old)
        if new is not None:
            drawn = self.fill.draw(grown.shape, like=old, seed=seed).to(grown)
            grown = torch.where(new, drawn, grown)
        return grown

    def carry(self, state: Tensor, *, power: int, new: float = 0.0) -> Tensor:
        """A per-element state of the old tensor, in the form of the new one.

        Args:
            state: same shape as the old tensor.
            power: 1 for weights and averages of them, -1 for first moments, -2 for second moments.
            new: what new positions get.
        """
        carried = self._gather(state, power=power)
        is_new = self.new_mask(state)
        return carried if is_new is None else carried.masked_fill(is_new, new)

    def new_mask(self, like: Tensor) -> Tensor | None:
        """Which positions are new: bool, broadcastable to the new shape; None if none is.

        Args:
            like: any tensor of the old shape, for its number of dimensions and its device.
        """
        masks = [_along(axis.is_new, dim, like) for dim, axis in self.axes.items() if bool(axis.is_new.any())]
        if not masks:
            return None
        mask = masks[0]
        for other in masks[1:]:
            mask = mask | other
        return mask

    def _gather(self, old: Tensor, *, power: int) -> Tensor:
        result = old
        for dim, axis in self.axes.items():
            result = result.index_select(dim, axis.index.clamp_min(0).to(old.device))
            factor = axis.factor(power)
            if factor is not None and power != 0:
                result = result * _along(factor.to(old.dtype), dim, old)
        # A tensor that no axis changed is a copy nevertheless: nobody shares memory by accident.
        return result if self.axes else old.clone()


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
    def inherits(self) -> bool:
        """Whether it is the same parameter, so that optimizer state goes along."""
        return self.origin is not None and all(m.inherits for m in self.maps)

    def values(self, old: Tensor | None, *, seed: int) -> Tensor:
        """The tensor after all operators; random values depend on `seed` and the name alone."""
        result = old
        for step, tensor_map in enumerate(self.maps):
            result = tensor_map.values(result, seed=_seed_of(seed, self.name, step))
        assert result is not None
        return result

    def carry(self, state: Tensor, *, power: int, new: float = 0.0) -> Tensor:
        """Per-element state through all operators; see `TensorMap.carry`."""
        for tensor_map in self.maps:
            state = tensor_map.carry(state, power=power, new=new)
        return state

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
