"""The numbers that say how a next token is drawn, their ranges, and the usual choices of them.

    >>> DecodingParameters(temperature=0.8, top_p=0.95)
    >>> PRESETS["greedy"].temperature
    0.0

They are applied in the order of `transformers`: penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Self

from annotated_types import Ge, Gt, Le, Lt

from cambia.config import FieldError, build, did_you_mean
from cambia.errors import ConfigError


@dataclass(frozen=True)
class DecodingParameters:
    """How a next token is drawn; by default at the model's own odds."""

    temperature: Annotated[float, Ge(0), Le(5)] = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """The likeliest tokens whose probabilities add up to this are left (nucleus; Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751)."""
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Tokens with at least this share of the likeliest one's probability are left (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082)."""
    top_k: Annotated[int, Ge(0)] = 0
    """So many of the likeliest tokens are left; 0: all."""
    repetition_penalty: Annotated[float, Ge(0.5), Le(3)] = 1.0
    """Of tokens that stand in the prompt or were written, positive logits are divided by this and negative
    ones multiplied (Keskar et al. 2019, https://arxiv.org/abs/1909.05858)."""
    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken off the logit of every token that was written."""
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken off the logit of a token for each time that it was written."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From names and numbers, checked.

        Raises:
            ConfigError: a name is unknown, or a number outside its range.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"there is no decoding parameter {name!r}{did_you_mean(name, names)}")
        try:
            return build(cls, values)
        except FieldError as error:
            raise ConfigError(f"decoding parameter {error}") from None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changed(self) -> dict[str, float]:
        """Those that are not neutral, by name."""
        return {name: value for name, value in asdict(self).items() if value != _NEUTRAL[name]}

    def __str__(self) -> str:
        if self.is_greedy:
            rest = {name: value for name, value in self.changed.items() if "penalty" in name}
            return "greedy" + "".join(f", {SHORT[name]} {value:.3g}" for name, value in rest.items())
        shown = {"temperature": self.temperature, **self.changed}
        return ", ".join(f"{SHORT[name]} {value:.3g}" for name, value in shown.items())


_NEUTRAL = asdict(DecodingParameters())
SHORT = {
    "temperature": "T",
    "top_p": "top-p",
    "min_p": "min-p",
    "top_k": "top-k",
    "repetition_penalty": "repetition",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
}
PRESETS = {
    "T 1": DecodingParameters(),
    "T 0.8, top-p 0.95": DecodingParameters(temperature=0.8, top_p=0.95),
    "min-p 0.05": DecodingParameters(min_p=0.05),
    "greedy": DecodingParameters(temperature=0.0),
}
"""What people use who do not tune."""


@dataclass(frozen=True)
class Span:
    """Where a parameter is looked for, as a line from 0 to 1."""

    low: float
    high: float
    log: bool = False
    """Equal steps on the line are equal factors."""

    def at(self, place: float) -> float:
        """The value at a place in [0, 1]."""
        place = min(1.0, max(0.0, place))
        if self.log:
            return min(self.high, max(self.low, self.low * (self.high / self.low) ** place))
        return self.low + (self.high - self.low) * place

    def place(self, value: float) -> float:
        """Where a value lies; of one outside, the nearer end."""
        value = min(self.high, max(self.low, value))
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


SPANS = {
    "temperature": Span(0.1, 1.9),  # 1, where nearly everybody begins, is the middle of any odd grid
    "top_p": Span(0.3, 1.0),
    "min_p": Span(0.0, 0.3),
    "repetition_penalty": Span(1.0, 1.6, log=True),
    "presence_penalty": Span(0.0, 1.5),
    "frequency_penalty": Span(0.0, 1.0),
}
"""Where each is looked for, unless one says otherwise."""
SEARCHED = ("temperature", "top_p", "repetition_penalty")
"""What is looked for by default."""
