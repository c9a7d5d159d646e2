"""Operators: each changes a model's shape once.

An operator is pure arithmetic. Given a model's config and the shapes of its parameters it answers with
the config afterwards and a `ParamMap`; it touches no weight. `grow` and `plan_growth` do the rest, the
same for every operator.

    WidenFFN(factor=1.5)                     more units in the feed-forward layers
    AddLayers(add=2, where="interpose")      more layers

Each dimension has a file beside this one. To add an operator: subclass `Operator`, say in `contract` what it
keeps, and return a `Step`. The rows of `cambia.models.architectures` say which tensors a dimension runs
through.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.config import Spelled
from cambia.errors import ConfigError, GrowthError
from cambia.models.architectures import Architecture, per_layer
from cambia.nn.param_map import ParamMap

OPERATORS: dict[str, str] = {
    "widen_ffn": "cambia.growth.operators.widen:WidenFFN",
    "add_layers": "cambia.growth.operators.depth:AddLayers",
    "add_heads": "cambia.growth.operators.attention:AddHeads",
    "add_kv_heads": "cambia.growth.operators.attention:AddKVHeads",
    "widen_head_dim": "cambia.growth.operators.attention:WidenHeadDim",
    "widen_hidden": "cambia.growth.operators.hidden:WidenHidden",
    "add_tokens": "cambia.growth.operators.tokens:AddTokens",
    "widen_lora_rank": "cambia.growth.operators.adapters:WidenLoraRank",
    "add_lora_expert": "cambia.growth.parts:AddLoraExpert",
}


@dataclass(frozen=True)
class Contract:
    """What an operator promises; the law tests hold it to this."""

    exactness: Literal["bits", "tolerance", "old tokens", "none"]
    """bits: the very same logits · tolerance: the same up to rounding · old tokens: those of the tokens that
    were there · none: a jump is part of the method."""
    alive_within: int
    """Steps after which every new tensor has had a gradient that is not zero."""
    rescales: bool = False
    """Whether old entries are multiplied, so that their moments are too; otherwise they keep their bits."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What an operator sees of a model."""

    config: PreTrainedConfig
    shapes: Mapping[str, torch.Size]
    """Every parameter's shape by name, tied ones once."""
    table: Architecture
    """What each axis of each parameter is."""
    gains: Sequence[float] | None = None
    """For each layer how much one more unit there would help, as measured; None where nobody measured."""
    seed: int = 0
    """Of what is chosen at random."""

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def need(self, dimension: str) -> None:
        """Refuse a model of which only some modules are known, and not this dimension.

        Raises:
            GrowthError: saying what can grow.
        """
        if self.table.grows and dimension not in self.table.grows:
            raise GrowthError(self.table.why_not)

    def size(self, name: str) -> Any:
        """A size, by `LlamaConfig`'s name."""
        return self.table.size(self.config, name)

    def each(self, name: str) -> list[int]:
        """A size that may differ per layer, for each layer."""
        return per_layer(self.size(name), self.num_layers)

    def with_sizes(self, **sizes: Any) -> PreTrainedConfig:
        """A copy of the config with other sizes, by `LlamaConfig`'s names."""
        config = copy.deepcopy(self.config)
        for name, value in sizes.items():
            self.table.set_size(config, name, value)
        return config


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

    @property
    def needs_gains(self) -> bool:
        """Whether it chooses by measured gains, so that somebody must measure them."""
        return False

    @abstractmethod
    def step(self, shape: Shape) -> Step:
        """The model afterwards.

        Raises:
            GrowthError: it cannot be done to this model; the message says why and what can.
        """


@dataclass(frozen=True)
class PartOperator(Operator):
    """Adds a Part beside a model, whose own shape stays (see `cambia.growth.parts`)."""

    like: str | None = None
    """Begin as a copy of the Part of this id, and not as nothing."""

    @property
    def contract(self) -> Contract:
        # What it writes is zero, so what it reads with has its first gradient one step later.
        return Contract("bits", alive_within=2)

    def step(self, shape: Shape) -> Step:
        raise GrowthError(
            f"{self} stands beside a model and is an event of its own: call grow() for it alone"
        )

    @abstractmethod
    def sizes(self, model: PreTrainedModel) -> tuple[int, int]:
        """Parameters of the model and its Parts, and of the one that would be added.

        Raises:
            ConfigError: there is nothing in the model that it can stand beside.
        """

    @abstractmethod
    def add(self, beside: Any) -> Any:
        """Make it; the Part."""


@dataclass(frozen=True)
class Amount:
    """How much: one of three ways to say it, or none for the smallest step that is legal."""

    factor: float | None = None
    """Multiply the size by this, above 1."""
    add: int | None = None
    """Add this many."""
    to: int | None = None
    """Grow to this size."""

    def __post_init__(self) -> None:
        given = [name for name in ("factor", "add", "to") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{type(self).__name__} takes one of factor=, add= and to=, got {given}")
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 1):
            raise ConfigError(
                f"factor={self.factor} does not grow anything; it must be above 1 (cambia.growth.prune makes "
                "feed-forward layers narrower)"
            )
        if self.add is not None and self.add < 1:
            raise ConfigError(f"add={self.add} does not grow anything; it must be at least 1")

    def after(self, size: int, *, multiple_of: int = 1) -> int:
        """The size after growth; a factor is rounded to a multiple, but grows by at least one."""
        if self.add is not None:
            return size + self.add
        if self.to is not None:
            if self.to <= size:
                raise GrowthError(
                    f"to={self.to} is not larger than the present size {size}; cambia.growth.prune makes "
                    "feed-forward layers narrower"
                )
            return self.to
        rounded = round(size * (self.factor or 1.0) / multiple_of) * multiple_of
        return rounded if rounded > size else (size // multiple_of + 1) * multiple_of

    def legal_after(self, size: int, is_legal: Callable[[int], bool], *, what: str) -> int:
        """The size after growth where not every size is legal.

        A factor leads to the nearest legal size above the present one, no amount to the first.

        Args:
            what: a legal size in words, for the message.

        Raises:
            GrowthError: add= or to= leads to a size that is not, with the nearest ones; or there is none.
        """
        wanted = self.after(size)
        legal = [n for n in range(size + 1, 8 * max(size, wanted) + 1) if is_legal(n)]
        if not legal:
            raise GrowthError(f"{what}, and above {size} there is no such number")
        nearest = min(legal, key=lambda n: (abs(n - wanted), n))
        if (self.add is not None or self.to is not None) and nearest != wanted:
            around = [*[n for n in legal if n < wanted][-1:], *[n for n in legal if n > wanted][:1]]
            near = " or ".join(f"to={n}" for n in around)
            raise GrowthError(f"{what}, and {wanted} is no such number; the nearest above {size}: {near}")
        return nearest


OLD_AMOUNTS = {"growth_factor": "factor", "add_hidden": "add", "new_d_ff": "to", "layers_per_event": "add"}
"""How the five systems spelled amounts."""
