"""Several rewards as one, and the check that a reward tells texts apart at all."""

# N continuations

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from cambia.config import Member
from cambia.decoding.rewards.reward import REWARDS, Material, Reward, Samples, Score
from cambia.errors import ConfigError, RewardError


@dataclass
class Total(Reward):
    """The sum of rewards, each times its weight; every part is to be seen: `match.n_grams`, `length`."""

    rewards: list[Annotated[Reward, Member(REWARDS, "reward")]]
    """What is added; each has its own settings."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("a total of no rewards: expected at least one, as [{type: match}]")

    @property
    def names(self) -> list[str]:
        """What each is called: its type, numbered from the second of its kind on."""
        kinds = [_kind(reward) for reward in self.rewards]
        before = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
        return [f"{kind}_{count + 1}" if count else kind for kind, count in zip(kinds, before, strict=True)]

    def begin(self, material: Material) -> None:
        for reward in self.rewards:
            reward.begin(material)

    def measure(self, samples: Samples) -> Score:
        scores = [reward.score(samples) for reward in self.rewards]
        parts: dict[str, float] = {}
        for name, score in zip(self.names, scores, strict=True):
            inside = score.parts or {"": score.value}
            parts |= {f"{name}.{part}" if part else name: value for part, value in inside.items()}
        each = torch.stack([score.each for score in scores]).sum(0)
        return Score(sum(score.value for score in scores), parts, each)


def _kind(reward: Reward) -> str:
    target = f"{type(reward).__module__}:{type(reward).__qualname__}"
    return next((name for name, value in REWARDS.items() if value == target), type(reward).__name__)


def total(rewards: Sequence[Reward]) -> Total:
    """The sum of rewards, as one."""
    return Total(list(rewards))


def refuse_constant(scores: Sequence[Score]) -> None:
    """Stop a search that would lead nowhere.

    Args:
        scores: of several sets of continuations that differ, as those of different decoding parameters do.

    Raises:
        RewardError: they are all the same, and so is the share of every continuation.
    """
    values = torch.cat([torch.cat([score.each, torch.tensor([score.value]).double()]) for score in scores])
    if len(scores) > 1 and bool((values - values[0]).abs().max() <= 1e-12 * (1 + values[0].abs())):
        parts = ", ".join(f"{name} {value:g}" for name, value in scores[0].parts.items()) or "no parts"
        raise RewardError(
            f"the reward is {scores[0].value:g} for all of {len(scores)} sets of continuations that differ, "
            f"and for every continuation in them ({parts}): nothing can be learned from it; give another "
            "reward, or add one"
        )
