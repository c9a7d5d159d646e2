"""How long continuations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cambia.decoding.rewards.reward import Material, Reward, Samples, Score, mean_of, unfitted
from cambia.errors import ConfigError


@dataclass
class LengthReward(Reward):
    """Nearness to a length: 1 where it is met, 0 for an empty text or one of twice the length."""

    target: int | Literal["human"] = "human"
    """The length; or the mean one of what people wrote."""
    unit: Literal["tokens", "bytes"] = "tokens"
    """What is counted."""

    def __post_init__(self) -> None:
        if isinstance(self.target, int) and self.target < 1:
            raise ConfigError(f"target={self.target} of a length reward: expected at least 1, or human")
        self._length = float(self.target) if isinstance(self.target, int) else 0.0

    def begin(self, material: Material) -> None:
        if self.target == "human":
            self._length = max(1.0, self._lengths(material.human).mean().item())

    def measure(self, samples: Samples) -> Score:
        if not self._length:
            raise unfitted(self)
        return mean_of(1 - (self._lengths(samples) - self._length).abs() / self._length)

    def _lengths(self, samples: Samples) -> torch.Tensor:
        counted: Sequence[Sequence[int] | bytes] = samples.tokens
        if self.unit == "bytes":
            counted = [text.encode() for text in samples.texts]
        return torch.tensor([len(each) for each in counted], dtype=torch.float64)
