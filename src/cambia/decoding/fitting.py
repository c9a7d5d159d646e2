"""Fitting a policy to a reward: prompts, budget, search or gradients, and what came of it.

>>> fitted = DecodingFit(tokens=200_000).run(policy, model, tokenizer, texts, MatchReward())
>>> fitted.policy.parameters, fitted.tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia.config import Member
from cambia.decoding.learners import GradientLearner, PolicyLearner, SearchLearner, TextLearner, Update
from cambia.decoding.likelihood import LikelihoodFit
from cambia.decoding.parameters import SEARCHED, DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards.reward import Reward
from cambia.decoding.rollouts import Rollouts
from cambia.decoding.score_function import LEARNED, ScoreFunction
from cambia.decoding.searching import SEARCHES, CmaSearch, ProcessSearch, Search, Space, Tried
from cambia.errors import MissingExtraError, RewardError

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
    parameters: tuple[str, ...] | None = None
    """What is learned; null: temperature, top-p and repetition penalty by search, and otherwise what
    `gradient.learns` and `likelihood.learns` say."""
    search: Annotated[Search, Member(SEARCHES, "search", default="process")] = field(
        default_factory=ProcessSearch
    )
    gradient: ScoreFunction = field(default_factory=ScoreFunction)
    likelihood: LikelihoodFit = field(default_factory=LikelihoodFit)
    tokens: Annotated[int, Gt(0)] = 200_000
    """That are written for it, at most, calibration aside; a grid writes what it takes. Beside the weights
    the steps of the run decide."""
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
            RewardError: the reward is constant or not a number; its `policy` is what was learned until then.
            ConfigError: a setting does not fit.
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
        while self._goes_on(learner):
            try:
                update = learner.step()
            except RewardError as error:
                error.policy = learner.chosen
                raise
            if told is not None:
                told(update)
        return FittedPolicy(learner.chosen, learner.tokens, learner.tried)

    @property
    def steps(self) -> int:
        """Steps within its tokens, where there are as many prompts as it asks for."""
        if self.by == "likelihood":
            return self.likelihood.steps
        texts = self.prompts
        if self.by == "search":
            if (rounds := self._rounds) is not None:
                return rounds
            texts *= self.search.population
        return max(1, self.tokens // (texts * self.new_tokens))

    @property
    def searched(self) -> tuple[str, ...]:
        """What a search looks for."""
        return SEARCHED if self.parameters is None else self.parameters

    @property
    def _rounds(self) -> int | None:
        return self.search.rounds(Space(self.searched, DecodingParameters()))

    def _goes_on(self, learner: PolicyLearner) -> bool:
        """Whether another step is to be taken: within the tokens, but always a first one."""
        if learner.finished:
            return False
        counts = self.by == "gradient" or (self.by == "search" and self._rounds is None)
        within = learner.tokens + learner.step_tokens <= self.tokens
        return within or not counts or not learner.updates

    def learner(self, rollouts: Rollouts, reward: Reward) -> PolicyLearner:
        """One that takes a step at a time.

        Args:
            rollouts: that writes; its policy is where it begins.

        Raises:
            ConfigError, DataError, MissingExtraError: as `run`.

        Warns:
            UserWarning: CMA-ES is not installed, and the score function learns in its place.
        """
        given = {} if self.parameters is None else {"learns": self.parameters}
        if self.by == "likelihood":
            return TextLearner(rollouts, replace(self.likelihood, **given))
        if self.by == "gradient":
            return GradientLearner(rollouts, reward, replace(self.gradient, **given), prompts=self.prompts)
        try:
            return SearchLearner(rollouts, reward, self.search, self.searched, prompts=self.prompts)
        except MissingExtraError as error:
            if not isinstance(self.search, CmaSearch):
                raise
            warnings.warn(f"{error}; until then it learns by gradients (--by gradient)", stacklevel=2)
            by_gradient = replace(self.gradient, learns=tuple(n for n in self.searched if n in LEARNED))
            return GradientLearner(rollouts, reward, by_gradient, prompts=self.prompts)
