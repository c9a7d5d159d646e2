"""The width of the residual stream.

Everything in a model writes into the residual stream or reads from it through a norm, so widening it is a
matter of what the norms make of the new channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.growth.operators.widen import split_in_shares
from cambia.models.architectures import Axes
from cambia.nn.param_map import AxisMap, Fill, ParamMap, TensorMap

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class WidenHidden(Amount, Operator):
    """A wider residual stream: exact, and alive from the second step on.

    Under a root-mean-square norm the new channels are zero: whatever writes has no weights for them yet.
    The mean square falls by d / d', so the gains and the root of epsilon are multiplied by its root. Under a
    LayerNorm every writer writes the mean of its old channels into the new ones; then the mean stays and
    what the norm makes of them is zero. What reads the new channels is random. (LEMON, Wang et al. 2024,
    arXiv:2310.07999, expands by averages under LayerNorm and by zeros under RMS norms.)

    Where queries and keys are normalised with the same epsilon (Qwen3), their projections are rescaled, so
    that it weighs as much as before. Where heads make up the hidden size (GPT-2), heads are added along
    with it.
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    initial: Literal["random", "clone"] = "random"
    """What new channels are. random: silent, and read by random readers · clone: a whole number of copies
    of the old ones, whose readers share what the old ones read (0.7 and 0.3)."""

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance", alive_within=2, rescales=True)

    def step(self, shape: Shape) -> Step:
        shape.need("hidden")
        old, size = shape.config.hidden_size, int(shape.size("head_dim"))
        new = self._legal(shape, old, size)
        changed: dict[str, Any] = {"hidden_size": new}
        if self.initial == "random":
            changed["rms_norm_eps"] = shape.size("rms_norm_eps") * old / new
        if shape.table.head_dim_apart:
            changed["head_dim"] = size
        else:
            changed["num_attention_heads"] = new // size
            # GPT-2 takes four times the hidden size where none is said.
            changed["intermediate_size"] = shape.size("intermediate_size")
        along = _Padded(shape, old, new) if self.initial == "random" else _Cloned(shape, old, new)
        params = {name: along.map(name, shape.table.axes(name)) for name in shape.shapes}
        return Step(shape.with_sizes(**changed), ParamMap(params), list(range(shape.num_layers)))

    def _legal(self, shape: Shape, old: int, size: int) -> int:
        """The hidden size afterwards."""
        heads, family = shape.size("num_attention_heads"), shape.table.name
        unit, what = 1, "any hidden size is legal"
        if not shape.table.head_dim_apart:
            unit, what = size, f"heads of {size} make up a {family} model's hidden size"
        elif not shape.table.uneven:
            unit, what = heads, f"a stock {family} config wants a hidden size that its {heads} heads divide"
        elif self.initial == "random" and self.add is None and self.to is None:
            unit = 8  # which matrix kernels like
        if self.initial == "clone":
            unit, what = old, f"clones take a multiple of the hidden size {old}"
        return self.legal_after(old, lambda n: n % unit == 0, what=what)


class _Along:
    """The maps of one widening of the hidden size, parameter by parameter."""

    def __init__(self, shape: Shape, old: int, new: int):
        self.shape, self.table = shape, shape.table
        self.old, self.new = old, new
        self.std = shape.config.initializer_range
        self.size = int(shape.size("head_dim"))
        # Where heads make up the hidden size their number grows with it.
        self.heads = None if shape.table.head_dim_apart else (old // self.size, new // self.size)

    def map(self, name: str, axes: Axes) -> TensorMap:
        maps = {dim: found for dim in range(len(axes.names)) if (found := self.axis(name, axes, dim))}
        return TensorMap(name, maps, fill=self.fill(axes)) if maps else TensorMap(name)

    def axis(self, name: str, axes: Axes, dim: int) -> AxisMap | None:
        """How one axis of a parameter changes, None where it does not."""
        dimension = axes.names[dim]
        if dimension == "hidden":
            return self.hidden(name, axes, reads=axes.read == dim)
        if self.heads is not None and dimension in ("query_key_value", "attended"):
            blocks = 3 if dimension == "query_key_value" else 1
            return _appended(blocks, *(heads * self.size for heads in self.heads))
        return None

    def hidden(self, name: str, axes: Axes, *, reads: bool) -> AxisMap:
        """How the axis of the residual stream changes."""
        raise NotImplementedError

    def fill(self, axes: Axes) -> Fill:
        """What new entries hold: readers of the stream are random, and what reads new heads is silent."""
        is_reader = axes.read is not None and axes.names[axes.read] == "hidden"
        return Fill.normal(self.std) if is_reader else Fill.zeros()


class _Padded(_Along):
    """New channels at the end that say nothing yet."""

    def __init__(self, shape: Shape, old: int, new: int):
        super().__init__(shape, old, new)
        self.quieter = math.sqrt(old / new)
        self.has_mean = shape.table.norm == "layer"
        self.normed = any("query_head" in axes.names for axes in shape.table.inside.values())
        self.gains = {name for name in shape.shapes if shape.table.axes(name).is_gain}

    def axis(self, name: str, axes: Axes, dim: int) -> AxisMap | None:
        is_bias = axes.read is None and axes.names[dim] in ("query", "key")
        if self.normed and is_bias:  # rescaled like the weights beside it
            length = self.shape.shapes[name][dim]
            return AxisMap(torch.arange(length), scale=self._quieter(length))
        return super().axis(name, axes, dim)

    def hidden(self, name: str, axes: Axes, *, reads: bool) -> AxisMap:
        is_norms_bias = f"{name.rpartition('.')[0]}.weight" in self.gains and not axes.is_gain
        if self.has_mean and not reads and not axes.is_gain and not is_norms_bias:
            return AxisMap.averaged(self.old, self.new)
        asks = axes.read is not None and bool({"query", "key"} & set(axes.names))
        rescaled = axes.is_gain or (self.normed and asks)
        index = AxisMap.lengthened(self.old, self.new).index
        return AxisMap(index, scale=self._quieter(self.new) if rescaled else None)

    def fill(self, axes: Axes) -> Fill:
        return Fill.level(self.quieter) if axes.is_gain else super().fill(axes)

    def _quieter(self, length: int) -> Tensor:
        return torch.full((length,), self.quieter, dtype=torch.float64)


class _Cloned(_Along):
    """Every channel several times over: norms see the same mean and variance, and readers take shares.

    (Net2Net, Chen et al. 2016, arXiv:1511.05641.) Where the head is the embedding transposed, it cannot take
    shares: the last norm does, which nothing else reads.
    """

    def __init__(self, shape: Shape, old: int, new: int):
        super().__init__(shape, old, new)
        self.index, self.shares = split_in_shares(old, new)
        self.even = torch.full((new,), old / new, dtype=torch.float64)
        readers = [shape.table.axes(name) for name in shape.shapes]
        self.is_tied = not any(axes.read is not None and "vocab" in axes.names for axes in readers)

    def hidden(self, name: str, axes: Axes, *, reads: bool) -> AxisMap:
        if reads:
            return AxisMap(self.index, scale=self.shares, gradient=torch.ones_like(self.shares))
        if self.is_tied and len(axes.names) == 1 and self.table.layer_of(name) is None:
            return AxisMap(self.index, scale=self.even, gradient=torch.ones_like(self.even))
        return AxisMap(self.index, gradient=self.shares)


def _appended(blocks: int, old: int, new: int) -> AxisMap:
    """Several blocks of one length, each lengthened: queries, keys and values side by side."""
    index = AxisMap.lengthened(old, new).index
    return AxisMap(torch.cat([torch.where(index < 0, index, index + i * old) for i in range(blocks)]))
