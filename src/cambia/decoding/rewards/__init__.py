"""Rewards: what decoding is learned for.

    reward: [{type: match}, {type: length, weight: 0.1}]      # or one's own, {type: "my_module:MyReward"}

>>> from cambia.decoding.rewards import MatchReward, LengthReward, total
>>> reward = total([MatchReward(), LengthReward(40, weight=0.1)])
>>> reward.begin(material)
>>> reward.score(samples).parts        # match.n_grams, match.mauve, match.repetition, length
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cambia.decoding.rewards.reward import REWARDS, Material, Reward, Samples, Score, mean_of

_HOME = {target.partition(":")[2]: target.partition(":")[0] for target in REWARDS.values()} | {
    name: "cambia.decoding.rewards.sums" for name in ("Total", "refuse_constant", "total")
}

__all__ = ["REWARDS", "Material", "Reward", "Samples", "Score", "mean_of", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.decoding.rewards' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
