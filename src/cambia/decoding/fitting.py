"""Fitting a policy to a reward: prompts, budget, search or gradients, and what came of it.

>>> fitted = DecodingFit(tokens=200_000).run(policy, model, tokenizer, texts, MatchReward())
>>> fitted.policy.parameters, fitted.tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia.config import Member
from cambia.decoding.learners import GradientLearner, PolicyLearner, SearchLearner, TextLearner, Update
from cambia.decoding.likelihood import LikelihoodFit
from cambia.decoding.parameters import SEARCHED
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards.reward import Reward
from cambia.decoding.rollouts import Rollouts
from cambia.decoding.score_function import ScoreFunction
from cambia.decoding.searching import SEARCHES, CmaSearch, Search, Tried
from cambia.errors import MissingExtraError

Told = Callable[[Update], None]
"""Called after each step."""


@dataclass(frozen=True)
class FittedPolicy:
    """What a fit came to."""

    policy: DecodingPolicy
    tokens: int
    """Written while it was sought, or read."""
    tried: Sequence[Tried]
    """All candidates, in their order."""


@dataclass
class DecodingFit:
    """How decoding parameters are fitted to a reward, or to text."""

    by: Literal["search", "gradient", "likelihood"] = "search"
    """search: the parameters as a whole, by what they are worth · gradient: the score function, which also
    reaches the head for each token · likelihood: of held-out text, by exact gradients, which also reach the
    weights of layers and heads; it asks no reward."""
    parameters: tuple[str, ...] = SEARCHED
    """What is searched."""
    search: Annotated[Search, Member(SEARCHES, "search", default="cma")] = field(default_factory=CmaSearch)
    gradient: ScoreFunction = field(default_factory=ScoreFunction)
    likelihood: LikelihoodFit = field(default_factory=LikelihoodFit)
    tokens: Annotated[int, Gt(0)] = 200_000
    """That are written for it, at most, calibration aside."""
    prompts: Annotated[int, Gt(3)] = 64
    """That each candidate continues."""
    prompt_tokens: Annotated[int, Gt(0)] = 32
    new_tokens: Annotated[int, Gt(0)] = 48
    seed: Annotated[int, Ge(0)] = 0

    def run(
        self,
        policy: DecodingPolicy,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str] | Prompts,
        reward: Reward,
        *,
        writer: Any = None,
        told: Told | None = None,
    ) -> FittedPolicy:
        """Fit a policy; the one that is given stays as it is, and the model too.

        Args:
            texts: documents, in no order: the first half calibrates the reward, the others are continued.
            reward: what is maximised.
            writer: whose `generate` writes, as in `DecodingPolicy.generate`.
            told: is told what came of each step.

        Raises:
            ConfigError: the reward is constant or not a number, or a setting does not fit.
            DataError: the texts are too few or too short, or longer than the model's context.
            MissingExtraError: the search needs a package.
        """
        if not isinstance(texts, Prompts):
            texts = Prompts.of(
                texts,
                tokenizer,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                context=getattr(model.config, "max_position_embeddings", None),
            )
        rollouts = Rollouts(
            model,
            tokenizer,
            texts,
            new_tokens=self.new_tokens,
            policy=policy,
            writer=writer,
            seed=self.seed,
        )
        learner = self.learner(rollouts, reward)
        while self.goes_on(learner):
            update = learner.step()
            if told is not None:
                told(update)
        return FittedPolicy(learner.chosen, learner.tokens, learner.tried)

    @property
    def steps(self) -> int:
        """Steps within its tokens, where there are as many prompts as it asks for."""
        if self.by == "likelihood":
            return self.likelihood.steps
        return max(1, self.tokens // self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """That a step writes at most."""
        return self.prompts * (self.search.population if self.by == "search" else 1) * self.new_tokens

    def goes_on(self, learner: PolicyLearner) -> bool:
        """Whether another step is to be taken: within the tokens, but always a first one."""
        if learner.finished:
            return False
        within = self.by == "likelihood" or learner.tokens + learner.step_tokens <= self.tokens
        return within or not learner.updates

    def learner(self, rollouts: Rollouts, reward: Reward) -> PolicyLearner:
        """One that takes a step at a time.

        Args:
            rollouts: that writes; its policy is where it begins.

        Raises:
            ConfigError, DataError, MissingExtraError: as `run`.
        """
        if self.by == "likelihood":
            return TextLearner(rollouts, self.likelihood)
        if self.by == "gradient":
            return GradientLearner(rollouts, reward, self.gradient, prompts=self.prompts)
        try:
            return SearchLearner(rollouts, reward, self.search, self.parameters, prompts=self.prompts)
        except MissingExtraError as error:
            raise MissingExtraError(
                f"{error}; or learn by gradients, which needs none: --by gradient"
            ) from None
