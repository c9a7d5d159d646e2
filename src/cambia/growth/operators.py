"""Operators: each changes a model's shape once.

An operator is pure arithmetic. Given a model's config and the shapes of its parameters it answers with
the config afterwards and a `ParamMap`; it touches no weight. `grow` and `plan_growth` do the rest, the
same for every operator.

    WidenFFN(factor=1.5)                     more units in the feed-forward layers
    AddLayers(add=2, where="interpose")      more layers

Width is in `cambia.growth.widen`, depth in `cambia.growth.depth`. To add one: subclass `Operator`, say in
`contract` what it keeps, and return a `Step`. The rows of `cambia.models.architectures` say which tensors a
dimension runs through.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig

from cambia.config import Spelled
from cambia.errors import ConfigError, GrowthError
from cambia.models.architectures import Architecture
from cambia.nn.param_map import ParamMap

OPERATORS: dict[str, str] = {
    "widen_ffn": "cambia.growth.widen:WidenFFN",
    "add_layers": "cambia.growth.depth:AddLayers",
}


@dataclass(frozen=True)
class Contract:
    """What an operator promises; the law tests hold it to this."""

    exactness: Literal["tolerance", "none"]
    """tolerance: same logits up to rounding; none: a jump is part of the method."""
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
        assert self.factor is not None
        rounded = round(size * self.factor / multiple_of) * multiple_of
        return rounded if rounded > size else (size // multiple_of + 1) * multiple_of


OLD_AMOUNTS = {"growth_factor": "factor", "add_hidden": "add", "new_d_ff": "to", "layers_per_event": "add"}
"""How the five systems spelled amounts."""
