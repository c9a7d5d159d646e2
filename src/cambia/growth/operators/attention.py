"""Attention: more heads, more key/value groups, larger heads.

H query heads share K keys and values, H / K to a group; all of size D. Along "query" and "attended" run
H D entries, along "key" and "value" K D, head by head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.models.architectures import uniform
from cambia.nn.param_map import NEW, AxisMap, Fill, ParamMap, TensorMap

ALIVE = Contract(exactness="tolerance", alive_within=2)


@dataclass(frozen=True)
class AddHeads(Amount, Operator):
    """More query heads in every key/value group: exact, since what reads them starts at zero.

    The new heads ask with random queries for the keys and values that their group has already. (Head
    addition: Gesmundo and Maile 2023, arXiv:2308.06103; here for grouped queries.)
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    @property
    def contract(self) -> Contract:
        return ALIVE

    def step(self, shape: Shape) -> Step:
        _refuse_tied_heads(shape)
        heads, groups, size = _heads(shape)
        after = [self._legal(shape, h, g) for h, g in zip(heads, groups, strict=True)]
        queries = {
            i: _blocks([_grown(h // g, a // g) for _ in range(g)], stride=h // g, size=size)
            for i, (h, g, a) in enumerate(zip(heads, groups, after, strict=True))
        }
        config = shape.with_sizes(num_attention_heads=uniform(after), head_dim=size)
        params = _mapped(shape, {"query": queries, "attended": queries}, silent=("attended",))
        return Step(config, params, list(range(shape.num_layers)))

    def _legal(self, shape: Shape, heads: int, groups: int) -> int:
        return self.legal_after(
            heads,
            lambda n: n % groups == 0 and _divides_hidden(shape, n),
            what=f"heads come in multiples of the {groups} key/value heads{_and_divide(shape)}",
        )


@dataclass(frozen=True)
class AddKVHeads(Amount, Operator):
    """More key/value heads, each with as many query heads as the old ones have: exact in the same way."""

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    @property
    def contract(self) -> Contract:
        return ALIVE

    def step(self, shape: Shape) -> Step:
        _refuse_tied_heads(shape)
        heads, groups, size = _heads(shape)
        after = [self._legal(shape, h // g, g) for h, g in zip(heads, groups, strict=True)]
        wider = [h // g * a for h, g, a in zip(heads, groups, after, strict=True)]
        queries = {i: AxisMap.lengthened(heads[i] * size, w * size) for i, w in enumerate(wider)}
        keys = {i: AxisMap.lengthened(groups[i] * size, a * size) for i, a in enumerate(after)}
        config = shape.with_sizes(
            num_attention_heads=uniform(wider), num_key_value_heads=uniform(after), head_dim=size
        )
        along = {"query": queries, "attended": queries, "key": keys, "value": keys}
        return Step(config, _mapped(shape, along, silent=("attended",)), list(range(shape.num_layers)))

    def _legal(self, shape: Shape, each: int, groups: int) -> int:
        return self.legal_after(
            groups,
            lambda n: _divides_hidden(shape, each * n),
            what=f"key/value heads come with {each} heads each{_and_divide(shape)}",
        )


@dataclass(frozen=True)
class WidenHeadDim(Operator):
    """Heads of a multiple of their size: exact.

    Rotary positions turn dimension i of a head together with i + D/2 at a speed that depends on i / D, so
    old dimension i goes to `factor` i, where the speed is the same. Scores are divided by the root of
    the head's size, so queries are multiplied by the root of `factor`. New dimensions have random queries
    and keys of zero; new values are random, and nothing reads them yet.

    Where queries and keys are normalised per head (Qwen3), each old dimension is repeated `factor` times, so
    that its root mean square stays, and the gain of the new keys is zero.
    """

    factor: int = 2
    """By how much; under rotary positions only whole numbers are exact."""

    def __post_init__(self) -> None:
        if self.factor < 2 or self.factor != int(self.factor):
            raise ConfigError(f"factor={self.factor}: heads grow by a whole number of times, at least 2")

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance", alive_within=2, rescales=True)

    def step(self, shape: Shape) -> Step:
        _refuse_tied_heads(shape)
        _refuse_rope(shape)
        heads, groups, size = _heads(shape)
        factor = int(self.factor)
        _refuse_large(size, factor)
        turned, louder = _spread(size, factor), math.sqrt(factor)
        normed = any("query_head" in axes.names for axes in shape.table.inside.values())
        if normed:
            turned = turned.clone()
            half, wide = size // 2, size * factor // 2
            for first, start in ((0, 0), (half, wide)):
                turned[start : start + wide] = first + torch.arange(wide) // factor
        beside = AxisMap.lengthened(size, size * factor).index
        scale = None if normed else torch.full((1,), louder, dtype=torch.float64)

        def every(counts: list[int], head: Tensor, by: Tensor | None = None) -> dict[int, AxisMap]:
            return {i: _repeated(head, count, size, by) for i, count in enumerate(counts)}

        along = {
            "query": every(heads, turned, scale),
            "key": every(groups, turned),
            "value": every(groups, beside),
            "attended": every(heads, beside),
        }
        silent = ("attended",) if normed else ("attended", "key")
        params = dict(_mapped(shape, along, silent=silent).tensors)
        if normed:
            params |= self._norms(shape, turned, _spread(size, factor), louder)
        config = shape.with_sizes(head_dim=size * factor)
        return Step(config, ParamMap(params), list(range(shape.num_layers)))

    def _norms(self, shape: Shape, repeated: Tensor, spread: Tensor, louder: float) -> dict[str, TensorMap]:
        """The gains of normalised queries and keys: the queries' louder, the new keys' zero."""
        scale = torch.full((len(repeated),), louder, dtype=torch.float64)
        maps = {}
        for name in shape.shapes:
            along = shape.table.axes(name).names
            if along == ("query_head",):
                maps[name] = TensorMap(name, {0: AxisMap(repeated, scale=scale)})
            elif along == ("key_head",):
                maps[name] = TensorMap(name, {0: AxisMap(spread)}, fill=Fill.zeros())
        return maps


# ---- index arithmetic ----------------------------------------------------------------------------


def _grown(old: int, new: int) -> list[int]:
    """Heads of one group: the old ones by number, then `NEW`."""
    return [*range(old), *[NEW] * (new - old)]


def _blocks(groups: list[list[int]], *, stride: int, size: int) -> AxisMap:
    """Entries of heads that stand in groups; `stride` old heads are in a group."""
    index = []
    for number, group in enumerate(groups):
        for head in group:
            first = (number * stride + head) * size
            index.append(torch.full((size,), NEW) if head == NEW else torch.arange(first, first + size))
    return AxisMap(torch.cat(index))


def _spread(size: int, factor: int) -> Tensor:
    """(factor size,): old dimension i of each half of a head at place factor i of the larger half."""
    index = torch.full((size * factor,), NEW)
    half, wide = size // 2, size * factor // 2
    index[0:wide:factor] = torch.arange(half)
    index[wide::factor] = torch.arange(half, size)
    return index


def _repeated(head: Tensor, count: int, size: int, scale: Tensor | None) -> AxisMap:
    """The same map of one head's dimensions for every head."""
    starts = torch.arange(count)[:, None] * size
    index = torch.where(head == NEW, NEW, head + starts).flatten()
    return AxisMap(index, scale=None if scale is None else scale.expand(len(index)).clone())


def _mapped(shape: Shape, along: Mapping[str, Mapping[int, AxisMap]], *, silent: tuple[str, ...]) -> ParamMap:
    """Maps of all parameters along which one of the dimensions runs.

    Args:
        along: dimension -> layer -> its map.
        silent: dimensions whose new entries are zero.
    """
    std = shape.config.initializer_range
    tensors = {}
    for name in shape.shapes:
        axes, layer = shape.table.axes(name), shape.table.layer_of(name)
        changed = {dim: d for dim, d in enumerate(axes.names) if d in along}
        if layer is None or not changed:
            tensors[name] = TensorMap(name)
            continue
        is_random = axes.read is not None and not any(d in silent for d in changed.values())
        tensors[name] = TensorMap(
            name,
            {dim: along[d][layer] for dim, d in changed.items()},
            fill=Fill.normal(std) if is_random else Fill.zeros(),
        )
    return ParamMap(tensors)


# ---- what is legal -------------------------------------------------------------------------------


def _heads(shape: Shape) -> tuple[list[int], list[int], int]:
    """For each layer its heads and its key/value heads; and the size of a head."""
    return shape.each("num_attention_heads"), shape.each("num_key_value_heads"), int(shape.size("head_dim"))


def _refuse_tied_heads(shape: Shape) -> None:
    shape.need("query")
    if not shape.table.head_dim_apart:
        raise GrowthError(
            f"heads times their size are a {shape.table.name} model's hidden size, so neither can grow "
            "alone: WidenHidden adds heads along with width"
        )


def _divides_hidden(shape: Shape, heads: int) -> bool:
    # Stock configs insist on it, although head_dim says how large a head is.
    return shape.table.uneven or shape.config.hidden_size % heads == 0


def _and_divide(shape: Shape) -> str:
    if shape.table.uneven:
        return ""
    return (
        f" and must divide the hidden size {shape.config.hidden_size} in a stock {shape.table.name} config "
        "(WidenHidden changes that)"
    )


LARGEST_HEAD = 256
"""FlashAttention and the other fused kernels take heads up to this size."""


def _refuse_large(size: int, factor: int) -> None:
    if size * factor > LARGEST_HEAD >= size:
        most = LARGEST_HEAD // size
        hint = f"the largest factor that fits is {most}" if most > 1 else "AddHeads adds attention instead"
        raise GrowthError(
            f"heads of {size * factor} are larger than any fused attention kernel takes ({LARGEST_HEAD}); "
            f"{hint}"
        )


def _refuse_rope(shape: Shape) -> None:
    parameters = getattr(shape.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default") if isinstance(parameters, Mapping) else "default"
    if kind not in ("default", "linear", "llama3"):
        raise GrowthError(
            f"rotary positions of type {kind!r} turn a larger head at other speeds (yarn 17 %, dynamic 5 % "
            "off), so WidenHeadDim is not exact: train with type default, linear or llama3"
        )
