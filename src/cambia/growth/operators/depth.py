"""Depth: more layers, copies of old ones or fresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.models.architectures import layer_ids, per_layer, uniform
from cambia.nn.param_map import Fill, ParamMap, TensorMap


@dataclass(frozen=True)
class AddLayers(Amount, Operator):
    """More layers, copies of old ones or fresh; exact, since what they write with starts at zero.

    A silent layer is slow to find a voice of its own. A copy that is faded in gets that of its original, by
    and by, and the loss has no jump: it then learns as fast as one that writes from the start.

    Sources: Gong et al. 2019 (stacking), G_stack, NeurIPS 2024 (arXiv:2405.15319; `where="stack"` with
    `preserve=False`), MIDAS, NeurIPS 2024 (arXiv:2409.19044; "middle"), orthogonal growth (interposing,
    arXiv:2510.08008), LLaMA-Pro (zero writers, arXiv:2401.02415), fading new layers in (Karras et al. 2018,
    arXiv:1710.10196, who mix their output in; here their weights come up).
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    where: Literal["append", "interpose", "stack", "middle"] = "interpose"
    """append: copies of the top layers on top · interpose: each copy next to its original, spread evenly
    · stack: the whole stack again on top, from its bottom · middle: the middle layers again behind
    themselves."""
    initial: Literal["copy", "random"] = "copy"
    """What a new layer starts as: a copy of the old layer it stands for, or random weights."""
    preserve: bool = True
    """Zero the new layers' o_proj and down_proj, so that nothing changes at first. False keeps the
    copies' own: the loss jumps, and the event says so."""
    fade_in: Annotated[float, Ge(0)] = 0.0
    """What silent copies come up to while they warm up (`rewarm_steps`), besides what they learn: 1 is all
    that their originals write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fade_in and (self.initial != "copy" or not self.preserve):
            raise ConfigError(
                f"fade_in={self.fade_in:g} brings silent copies up to what their originals write: it goes "
                'with initial="copy" and preserve=True'
            )

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance" if self.preserve else "none", alive_within=2)

    def step(self, shape: Shape) -> Step:
        shape.need("layers")
        if not shape.num_layers:
            raise GrowthError(
                "the model has no layer that new ones could be like: build it with at least one"
            )
        if getattr(shape.config, "scale_attn_by_inverse_layer_idx", False):
            raise GrowthError(
                "scale_attn_by_inverse_layer_idx divides attention scores by a layer's place, which new "
                "layers move: such a model cannot get more layers exactly"
            )
        count = self.after(shape.num_layers) - shape.num_layers
        order = self._order(shape.num_layers, count)
        config = shape.with_sizes(num_hidden_layers=len(order))
        ids = layer_ids(shape.config)
        fresh = iter(range(max(ids) + 1, max(ids) + 1 + count))
        config.layer_ids = [next(fresh) if place.is_new else ids[place.like] for place in order]
        for name in shape.table.per_layer_fields:
            old = per_layer(getattr(shape.config, name), shape.num_layers)
            each = [old[place.like] for place in order]
            # Sizes may be told as one number, kinds of layers (Qwen's layer_types) are always a list.
            setattr(config, name, uniform(each) if isinstance(each[0], int) else each)
        if getattr(config, "max_window_layers", 0) >= shape.num_layers:  # Qwen: no layer has a window
            config.max_window_layers = len(order)
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
                tensors[new_name] = TensorMap(
                    None, fill=Fill.zeros(), shape=tuple(old), sibling=name, fade_in=self.fade_in
                )
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
        return Fill.ones() if shape.table.axes(name).is_gain else Fill.zeros()


@dataclass(frozen=True)
class Place:
    """One place in the new order of layers."""

    like: int
    """The old layer that stands here, or that a new one is modelled on."""
    is_new: bool = field(default=False)
