"""Policies side by side, on prompts that none of them has seen.

>>> judge = Judge(model, tokenizer, calibration, held, MatchReward(), new_tokens=48)
>>> row = judge.row("T 1", DecodingPolicy(), tokens=0)
>>> row.reward, row.spread, row.parts, row.repeated
"""

# N prompts

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia.decoding.learners import calibrate, text_of
from cambia.decoding.likelihood import mean_loss
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards.grams import Grams
from cambia.decoding.rewards.reward import Reward, Samples
from cambia.decoding.rollouts import Rollouts

_RUN = 4
"""Tokens of the runs whose repetition is shown."""
_DRAW = 1_000_000
"""Rounds of noise that no search has had."""


@dataclass(frozen=True)
class JudgedRow:
    """What a policy is worth."""

    name: str
    parameters: str
    tokens: int
    """Written to find it."""
    reward: float
    """The mean over draws; one calibration and one set of prompts for all rows, and the same noise."""
    spread: float
    """Standard deviation over draws."""
    parts: Mapping[str, float]
    repeated: float
    """The share of runs of four tokens that stood in the same text before, 0 to 1."""
    distinct: float
    """Different runs of two tokens over all runs, of all texts of a draw together."""
    length: float
    """Tokens of a continuation."""
    nats_per_token: float | None
    """Of how the documents really go on; None where the policy cuts off what stands there."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Scores policies behind the same prompts with the same noise.

    Args:
        model: that writes.
        calibration: prompts that the reward is calibrated on.
        held: prompts that no policy has seen, of other documents.
        reward: what they are compared by; calibrated here.
        new_tokens: at most so many are written behind each.
        draws: sets of continuations of each policy.
        writer: whose `generate` writes, as in `DecodingPolicy.generate`.
        seed: of the noise.

    Raises:
        ConfigError: the reward cannot be calibrated on so few prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Prompts,
        held: Prompts,
        reward: Reward,
        *,
        new_tokens: int,
        draws: int = 3,
        writer: Any = None,
        seed: int = 0,
    ):
        self._model, self._reward, self._draws = model, reward, draws

        def behind(prompts: Prompts) -> Rollouts:
            return Rollouts(model, tokenizer, prompts, new_tokens=new_tokens, writer=writer, seed=seed)

        calibrate(reward, behind(calibration), range(len(calibration)))
        self._rollouts = behind(held)
        self._text = text_of(self._rollouts)

    def samples(self, policy: DecodingPolicy, draw: int = 0, places: Sequence[int] | None = None) -> Samples:
        """What a policy writes behind the held-out prompts, or some of them."""
        chosen = range(len(self._rollouts.prompts)) if places is None else places
        return self._rollouts.with_policy(policy).write([policy.parameters], chosen, _DRAW + draw)[0]

    def row(self, name: str, policy: DecodingPolicy, *, tokens: int) -> JudgedRow:
        """Score one.

        Args:
            tokens: written to find it.
        """
        draws = 1 if policy.parameters.is_greedy else self._draws
        found = [self.samples(policy, draw) for draw in range(draws)]
        scores = [self._reward.score(samples) for samples in found]
        values = torch.tensor([score.value for score in scores], dtype=torch.float64)
        grams = [Grams.up_to(samples.tokens, _RUN) for samples in found]
        lengths = [len(row) for samples in found for row in samples.tokens]
        return JudgedRow(
            name,
            str(policy.parameters),
            tokens,
            float(values.mean()),
            float(values.std()) if draws > 1 else 0.0,
            {part: sum(score.parts[part] for score in scores) / draws for part in scores[0].parts},
            sum(float(each[-1].repeated.mean()) for each in grams) / draws,
            sum(len(each[1].places[0]) / max(1, int(each[1].lengths.sum())) for each in grams) / draws,
            sum(lengths) / len(lengths),
            self._likelihood(policy),
        )

    def _likelihood(self, policy: DecodingPolicy) -> float | None:
        if policy.context is not None:
            return None  # its parameters differ from token to token
        found = mean_loss(policy, self._model, self._text)
        return found if math.isfinite(found) else None
