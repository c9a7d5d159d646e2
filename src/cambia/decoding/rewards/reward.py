"""What makes a continuation good: the interface of rewards, and what they are shown.

A reward looks at many continuations at once, since much of what is good about a text, that it is as varied as
what people write, is not to be seen in one of them. It gives one value for all, which decoding parameters are
searched by, and to each continuation its share in that value, which gradients are estimated from.

    >>> reward = LengthReward(weight=0.5)
    >>> reward.begin(material)                      # once: what people wrote, what the model writes by itself
    >>> score = reward.score(samples)
    >>> score.value, score.parts, score.each        # (), {name: ()}, (N,)
"""

# N continuations

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from cambia.errors import ConfigError


@dataclass(frozen=True)
class Samples:
    """Continuations, and what they continue."""

    prompts: Sequence[str]
    """N prompts."""
    texts: Sequence[str]
    """What was written behind each of them."""
    tokens: Sequence[Sequence[int]]
    """The same as the model's tokens."""
    human: Sequence[str]
    """How the document that a prompt is from really goes on."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Material:
    """What rewards are calibrated on, before anything is learned."""

    human: Samples
    """What people wrote, as if it had been generated: `texts` are the documents' own continuations."""
    plain: Samples
    """What the model writes behind the same prompts with temperature 1 and nothing cut off."""
    features: Callable[[Sequence[str]], Tensor]
    """Texts -> (N, D): what a frozen model makes of them."""


@dataclass(frozen=True, eq=False)
class Score:
    """How good continuations are."""

    value: float
    """Of all together; what is maximised."""
    parts: Mapping[str, float]
    """What it consists of, on the same scale: they add up to it."""
    each: Tensor
    """(N,) float64: the share of each continuation. Its mean is the value, where the value is a mean; of a
    value that all have together it is its influence: by how much, times N, the value would rise with one
    more continuation like this one."""


@dataclass
class Reward(ABC):
    """What is maximised; a sum of several is one, too (`total`)."""

    weight: Annotated[float, Gt(0)] = 1.0
    """How much it counts."""

    def begin(self, material: Material) -> None:  # noqa: B027 (most have nothing to look at)
        """Look at what people wrote, and at what the model writes by itself."""

    @abstractmethod
    def measure(self, samples: Samples) -> Score:
        """Score continuations, without the weight."""

    def score(self, samples: Samples) -> Score:
        """Score continuations.

        Raises:
            ConfigError: the reward is not a number.
        """
        found = self.measure(samples)
        if not math.isfinite(found.value) or not bool(torch.isfinite(found.each).all()):
            raise ConfigError(
                f"the reward {type(self).__name__} gave {found.value} for {len(samples)} continuations, the "
                f"first of them {samples.texts[0][:60]!r}: it has to be a finite number for every text, an "
                "empty one too"
            )
        parts = {name: self.weight * part for name, part in found.parts.items()}
        return Score(self.weight * found.value, parts, self.weight * found.each.double())
