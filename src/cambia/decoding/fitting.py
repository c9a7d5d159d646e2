"""Fitting a policy to a reward: prompts, budget, search or gradients, and what came of it.

>>> fitted = DecodingFit(tokens=200_000).run(policy, model, tokenizer, texts, MatchReward())
>>> fitted.policy.parameters, fitted.tokens
"""

# N prompts, P tokens of a prompt

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia.config import Member
from cambia.decoding.parameters import SEARCHED, DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.rewards.reward import Material, Reward, Score
from cambia.decoding.rewards.sums import refuse_constant
from cambia.decoding.rollouts import Prompts, Rollouts, text_features
from cambia.decoding.score_function import ScoreFunction
from cambia.decoding.searching import SEARCHES, CmaSearch, Search, Space, Tried
from cambia.errors import DataError, MissingExtraError

Told = Callable[[int, int, DecodingParameters, float], None]
"""(tokens written, of how many, parameters, their reward): called after each round."""
_CALIBRATION = 0.5
"""Of the prompts that rewards are calibrated on; parameters are searched on the others."""


@dataclass(frozen=True)
class FittedPolicy:
    """What a fit came to."""

    policy: DecodingPolicy
    tokens: int
    """Written while it was sought."""
    tried: Sequence[Tried]
    """All candidates, in their order."""


@dataclass
class DecodingFit:
    """How decoding parameters are fitted to a reward."""

    by: Literal["search", "gradient"] = "search"
    """search: the parameters as a whole, by what they are worth · gradient: the score function, which also
    reaches the head for each token."""
    parameters: tuple[str, ...] = SEARCHED
    """What is fitted."""
    search: Annotated[Search, Member(SEARCHES, "search")] = field(default_factory=CmaSearch)
    gradient: ScoreFunction = field(default_factory=ScoreFunction)
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
        texts: Sequence[str],
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
            told: is told how far it is.

        Raises:
            ConfigError: the reward is constant or not a number, or a setting does not fit.
            DataError: the texts are too few or too short, or longer than the model's context.
            MissingExtraError: the search needs a package.
        """
        prompts = Prompts.of(
            texts,
            tokenizer,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            context=getattr(model.config, "max_position_embeddings", None),
        )
        rollouts = Rollouts(
            model,
            tokenizer,
            prompts,
            new_tokens=self.new_tokens,
            policy=policy,
            writer=writer,
            seed=self.seed,
        )
        half = int(len(prompts) * _CALIBRATION)
        calibrate(reward, rollouts, range(half))
        places = list(range(half, len(prompts)))
        if not places:
            raise DataError(f"{len(prompts)} prompts are too few to calibrate and to search: give more text")
        if self.by == "gradient":
            return self._by_gradient(rollouts, reward, places, told)
        return self._by_search(rollouts, reward, places, told)

    def _by_search(
        self,
        rollouts: Rollouts,
        reward: Reward,
        places: list[int],
        told: Told | None,
    ) -> FittedPolicy:
        begun = rollouts.tokens
        size = min(self.prompts, len(places))
        rounds = max(1, self.tokens // (self.search.population * size * self.new_tokens))
        some = _Draws(places, size, self.seed)

        def worth(candidates: Sequence[DecodingParameters], number: int) -> list[float]:
            scores = scored(reward, rollouts, candidates, some.draw(), number)
            if number == 0:
                refuse_constant(scores)
            values = [score.value for score in scores]
            if told is not None:
                best = max(range(len(values)), key=values.__getitem__)
                told(rollouts.tokens - begun, self.tokens, candidates[best], values[best])
            return values

        space = Space(self.parameters, rollouts.policy.parameters)
        try:
            found = self.search.run(worth, space, rounds=rounds, seed=self.seed)
        except MissingExtraError as error:
            raise MissingExtraError(
                f"{error}; or learn by gradients, which needs none: --by gradient"
            ) from None
        best = rollouts.policy.with_parameters(
            **{name: getattr(found.best, name) for name in self.parameters}
        )
        return FittedPolicy(best, rollouts.tokens - begun, found.tried)

    def _by_gradient(
        self,
        rollouts: Rollouts,
        reward: Reward,
        places: list[int],
        told: Told | None,
    ) -> FittedPolicy:
        learner = self.gradient.learner(rollouts.policy, rollouts.model, seed=self.seed)
        copies = self.gradient.texts
        size = max(1, min(self.prompts, len(places)) // copies)
        some = _Draws(places, size, self.seed)
        written, tried = 0, []
        while written < self.tokens:
            chosen = some.draw()
            repeated = [place for place in chosen for _ in range(copies)]
            scores: list[Score] = []

            def worth(rows: Tensor, repeated: list[int] = repeated, scores: list[Score] = scores) -> Tensor:
                scores.append(reward.score(rollouts.read(rows[:, self.prompt_tokens :].tolist(), repeated)))
                return scores[0].each

            ids = torch.tensor([list(rollouts.prompts.rows[i]) for i in chosen], device=rollouts.model.device)
            update = learner.step(ids, worth, new_tokens=self.new_tokens)
            if learner.updates == 1:
                refuse_constant([scores[0]] * 2)
            written += update.tokens
            tried.append(Tried(learner.policy.parameters, scores[0].value, learner.updates))
            if told is not None:
                told(written, self.tokens, tried[-1].parameters, tried[-1].worth)
        return FittedPolicy(learner.policy, written, tried)


class _Draws:
    """Some of the prompts, others each time."""

    def __init__(self, places: Sequence[int], size: int, seed: int):
        self._places, self._size = places, size
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> list[int]:
        order = torch.randperm(len(self._places), generator=self._generator)
        return [self._places[i] for i in order[: self._size].tolist()]


def calibrate(reward: Reward, rollouts: Rollouts, places: Sequence[int]) -> None:
    """Show a reward what people wrote behind some prompts, and what the model writes by itself."""
    (plain,) = rollouts.write([DecodingParameters()], places, -1)

    def features(texts: Sequence[str]) -> Tensor:
        return text_features(rollouts.model, rollouts.tokenizer, texts)

    reward.begin(Material(rollouts.human(places), plain, features))


def scored(
    reward: Reward,
    rollouts: Rollouts,
    candidates: Sequence[DecodingParameters],
    places: Sequence[int],
    round_: int,
) -> list[Score]:
    """What candidates are worth behind the same prompts, with the same noise."""
    return [reward.score(samples) for samples in rollouts.write(candidates, places, round_)]
