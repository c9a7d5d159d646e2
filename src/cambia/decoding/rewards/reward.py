"""What makes a continuation good: the interface of rewards, and what they are shown.

A reward looks at many continuations at once, since much of what is good about a text, that it is as varied as
what people write, is not to be seen in one of them. It gives one value for all, which decoding parameters are
searched by, and to each continuation its share in that value, which gradients are estimated from.

    >>> reward = LengthReward(40, weight=0.5)
    >>> reward.begin(material)                      # once: what people wrote, what the model writes by itself
    >>> score = reward.score(samples)
    >>> score.value, score.parts, score.each        # (), {name: ()}, (N,)

What `begin` finds out follows from the material alone: after a restart the same material gives the same
reward.
"""

# N continuations

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from cambia.decoding.prompts import parted
from cambia.errors import ConfigError, RewardError

REWARDS: dict[str, str] = {
    "match": "cambia.decoding.rewards.match:MatchReward",
    "fluency": "cambia.decoding.rewards.fluency:FluencyReward",
    "length": "cambia.decoding.rewards.length:LengthReward",
    "diversity": "cambia.decoding.rewards.diversity:DiversityReward",
    "style": "cambia.decoding.rewards.style:StyleReward",
    "pattern": "cambia.decoding.rewards.verifiable:PatternReward",
    "function": "cambia.decoding.rewards.verifiable:FunctionReward",
}


@dataclass(frozen=True)
class Samples:
    """Continuations, and what they continue.

    Raises:
        ConfigError: there is none, or the lists are not of one length.
    """

    prompts: Sequence[str]
    """N prompts."""
    texts: Sequence[str]
    """What was written behind each of them."""
    tokens: Sequence[Sequence[int]]
    """The same as the model's tokens."""
    human: Sequence[str]
    """How the document that a prompt is from really goes on."""

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in vars(self).items()}
        if not self.texts or len(set(sizes.values())) > 1:
            raise ConfigError(
                f"continuations that are scored together: expected as many of each, got {sizes}"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, places: Sequence[int]) -> Samples:
        """Some of them."""
        return Samples(*([value[place] for place in places] for value in vars(self).values()))


@dataclass(frozen=True)
class Material:
    """What rewards are calibrated on, before anything is learned."""

    human: Samples
    """What people wrote, as if it had been generated: `texts` are the documents' own continuations."""
    plain: Samples
    """What the model writes behind the same prompts with temperature 1 and nothing cut off."""
    features: Callable[[Sequence[str]], Tensor]
    """Texts -> (N, D): what a frozen model makes of them. It is not asked about empty ones."""
    documents: Sequence[int] = ()
    """The number of the document that each is from; empty: each is from one of its own."""

    def __post_init__(self) -> None:
        if list(self.human.prompts) != list(self.plain.prompts):
            raise ConfigError(
                "material: what people wrote and what the model writes have to continue the same prompts, in "
                "the same order"
            )

    def parted(self) -> tuple[Material, Material]:
        """What is compared with; and of other documents what says how much a distance from that is worth.

        Raises:
            ConfigError: it is too little.
        """
        halves = parted(self.documents or range(len(self.human)), 0.5)
        if min(map(len, halves)) < 2:
            raise ConfigError(
                f"a reward is calibrated on {len(self.human)} texts of people, which do not fall into two "
                "parts with two each: take more prompts"
            )
        compared, held = (
            Material(self.human.chosen(half), self.plain.chosen(half), self.features) for half in halves
        )
        return compared, held


@dataclass(frozen=True, eq=False)
class Score:
    """How good continuations are."""

    value: float
    """Of all together; what is maximised."""
    parts: Mapping[str, float]
    """What it consists of, on the same scale: they add up to it. Empty where it is one thing."""
    each: Tensor
    """(N,) float64: the share of each continuation; their mean is the value. Of a value that is a mean it is
    what each of them scores. Of a value that all have together it is that value and each one's influence: by
    how much, times N, the value would rise with one more continuation like this one."""


Parts = Callable[[Tensor], Mapping[str, Tensor]]
"""(N,) how much each continuation counts -> the parts, () each; differentiable."""


def mean_of(each: Tensor) -> Score:
    """The score that is the mean over continuations of what each of them scores, (N,)."""
    each = each.detach().double().cpu()
    return Score(each.mean().item(), {}, each)


def score_of(parts: Parts, number: int) -> Score:
    """The score of what N continuations have together."""
    weights = torch.ones(number, dtype=torch.float64, requires_grad=True)
    found = parts(weights)
    value = torch.stack([*found.values()]).sum()
    (slopes,) = torch.autograd.grad(value, weights)
    each = value.detach() + number * slopes
    return Score(value.item(), {name: part.item() for name, part in found.items()}, each)


@dataclass
class Reward(ABC):
    """What is maximised; a sum of several is one, too (`total`)."""

    weight: Annotated[float, Gt(0)] = field(default=1.0, kw_only=True)
    """How much it counts."""

    def begin(self, material: Material) -> None:  # noqa: B027 (some have nothing to look at)
        """Look at what people wrote, and at what the model writes by itself."""

    @abstractmethod
    def measure(self, samples: Samples) -> Score:
        """Score continuations, without the weight."""

    def score(self, samples: Samples) -> Score:
        """Score continuations.

        Raises:
            RewardError: the reward is not a number.
        """
        found = self.measure(samples)
        wrong = (~found.each.isfinite()).nonzero().flatten().tolist()
        if wrong or not math.isfinite(found.value):
            place = wrong[0] if wrong else 0
            raise RewardError(
                f"the reward {type(self).__name__} gave {found.each[place].item()} for the continuation "
                f"{samples.texts[place][:60]!r} and {found.value} for all {len(samples)}: it has to be a "
                "finite number for every text, an empty one too"
            )
        parts = {name: self.weight * part for name, part in found.parts.items()}
        return Score(self.weight * found.value, parts, self.weight * found.each.double())


def unfitted(reward: Reward) -> ConfigError:
    """The error of a reward that scores before it has seen any material."""
    return ConfigError(
        f"{type(reward).__name__} measures against what people wrote: call begin(material) first"
    )
