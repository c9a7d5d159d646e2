"""How decoding learns in a run: where it begins, what for, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge
from transformers import PreTrainedModel

from cambia.config import Member
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.parameters import DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.rewards.match import MatchReward
from cambia.decoding.rewards.reward import REWARDS, Reward
from cambia.errors import ConfigError


@dataclass
class DecodingConfig:
    """How the model is decoded from, and how that learns."""

    engine_update_freq: Annotated[int, Ge(0)] = 10
    """Batches from one step of the policy to the next; 0: it stays as it begins."""
    start: DecodingParameters = field(default_factory=DecodingParameters)
    """Where it begins."""
    layers: bool = False
    """Give the hidden states of all layers a weight in what the head is given; learned by likelihood."""
    heads: bool = False
    """Give each attention head a scale; learned by likelihood."""
    context: bool = False
    """A small head sets temperature and top-p for each token; learned by gradients."""
    rewards: list[Annotated[Reward, Member(REWARDS, "reward", default="match")]] = field(
        default_factory=lambda: [MatchReward(mauve_share=0)]
    )
    """What it learns for; several are added. docs/decoding.md."""
    fit: DecodingFit = field(default_factory=DecodingFit)
    """How it learns."""

    @property
    def made_for_one_shape(self) -> bool:
        """Whether a part of it has the model's shape."""
        return self.layers or self.heads or self.context

    def policy(self, model: PreTrainedModel) -> DecodingPolicy:
        """Where it begins, for a model.

        Raises:
            ConfigError: heads of a model of whose attention nothing is known, or a part that `fit` cannot
                learn.
        """
        by = self.fit.by
        for name, way in (("layers", "likelihood"), ("heads", "likelihood"), ("context", "gradient")):
            if getattr(self, name) and by != way:
                raise ConfigError(f"decoding.{name} is not learned by {by}: --decoding.fit.by {way}")
        return DecodingPolicy.of(
            model, self.start, layers=self.layers, heads=self.heads, context=self.context
        )
