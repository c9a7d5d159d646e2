"""Decoding parameters, and the head for each token, by the score function (REINFORCE, Williams 1992).

What is drawn from has a gradient, so by how much a reward rises with the parameters can be estimated from
what was written and what it was worth:

    grad E[R] = E[(R - b) grad log p(text)]

with b the mean reward of the other texts behind the same prompt (leave one out; Kool et al. 2019). Top-p as
such has no gradient: its threshold is drawn anew for each token, and the distribution that this gives is the
one that texts are drawn from while it learns (`odds.soft_nucleus`). Two more terms keep it in place: the
divergence from what was drawn from at the start, and the entropy.
"""

# N prompts, G texts behind each, T time, V vocabulary, D hidden size

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from transformers import PreTrainedModel

from cambia.decoding.drawing import Noise, seed_of
from cambia.decoding.learned import LearnedParameters, load_optimizer_state, optimizer_state
from cambia.decoding.likelihood import logits_of, past_of
from cambia.decoding.odds import History, RowParameters, cooled, is_neutral, penalised, soft_nucleus
from cambia.decoding.policy import DecodingPolicy, last_states
from cambia.errors import ConfigError, RewardError
from cambia.generation import end_tokens
from cambia.nn.modes import evaluating

Worth = Callable[[Tensor], Tensor]
"""(N G, T) tokens, prompts included, texts behind one prompt together -> (N G,) what each is worth."""
LEARNED = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_MOST_ODDS = 1 << 24
"""Numbers of one tensor of odds, in float64; more rows are read in parts."""
_WIDTH = 0.25
"""Of the threshold's distribution, on the line of logits."""


@dataclass(frozen=True)
class GradientStep:
    """What came of one step."""

    reward: float
    """The mean over texts."""
    divergence: float
    """Nats per token from where it began."""
    entropy: float
    """Nats per token."""
    tokens: int
    """That were written for it."""


class Part(NamedTuple):
    """The loss of some of the texts of a step, and what it holds."""

    loss: Tensor
    """() with a gradient."""
    divergence: float
    """Nats per token of all texts."""
    entropy: float


@dataclass
class ScoreFunction:
    """How a policy learns from rewards; `ScoreFunctionLearner` is one at work."""

    learns: tuple[str, ...] = ("temperature", "top_p")
    """Parameters that are learned; the head for each token is, where the policy has one."""
    rate: Annotated[float, Gt(0)] = 0.03
    texts: Annotated[int, Gt(1)] = 4
    """G, behind each prompt."""
    divergence: Annotated[float, Ge(0)] = 0.0
    """What a nat per token of divergence from the start costs, in rewards."""
    entropy: Annotated[float, Ge(0)] = 0.0
    """What a nat per token of entropy is worth."""

    def learner(
        self, policy: DecodingPolicy, model: PreTrainedModel, *, seed: int = 0
    ) -> ScoreFunctionLearner:
        """One that begins with a policy, which stays as it is.

        Raises:
            ConfigError: a parameter has no gradient, or the policy has no gradient where it begins.
        """
        wrong = [name for name in self.learns if name not in LEARNED]
        if wrong:
            raise ConfigError(f"{wrong[0]!r} cannot be learned by gradients; {', '.join(LEARNED)} can")
        if policy.parameters.is_greedy or policy.parameters.top_k or policy.parameters.min_p:
            raise ConfigError(
                "gradients need temperature above 0 and no top-k or min-p: begin with DecodingParameters()"
            )
        if not self.learns and policy.context is None:
            raise ConfigError("nothing is learned: name parameters, or make a policy with context=True")
        return ScoreFunctionLearner(self, policy, model, seed)


class ScoreFunctionLearner:
    """A policy that learns, its optimizer, and where it began.

    Args:
        settings: how it learns.
        policy: where it begins.
        model: that writes.
        seed: of what is written.
    """

    def __init__(
        self, settings: ScoreFunction, policy: DecodingPolicy, model: PreTrainedModel, seed: int = 0
    ):
        self.settings, self.model, self.seed = settings, model, seed
        self._start = copy.deepcopy(policy)
        self._policy = copy.deepcopy(policy)
        held = () if policy.context is None else ("temperature", "top_p")
        self.parameters = LearnedParameters(policy.parameters, settings.learns, held)
        head = [] if self._policy.context is None else list(self._policy.context.parameters())
        self.optimizer = torch.optim.Adam([*self.parameters.tensors(), *head], lr=settings.rate)
        self.updates = 0
        self._began = replace(RowParameters.of(policy.parameters), **self.parameters.values())

    @property
    def policy(self) -> DecodingPolicy:
        """As it is now."""
        return copy.deepcopy(self._policy).with_parameters(**self.parameters.values())

    def step(
        self, prompts: Tensor, worth: Worth, *, new_tokens: int, mask: Tensor | None = None
    ) -> GradientStep:
        """Write behind prompts, and learn from what it was worth.

        Args:
            prompts: (N, P), padded on the left where they differ in length.
            worth: (N G, T) -> (N G,).
            mask: (N, P), 0 where a prompt is padded.

        Raises:
            RewardError: a reward is not a number.
        """
        rows = self.write(prompts, new_tokens, mask)
        rewards = worth(rows).double()
        if not bool(torch.isfinite(rewards).all()):
            raise RewardError(
                "a reward is not a number: it has to be finite for every text, an empty one too"
            )
        self.optimizer.zero_grad()
        divergence, entropy = 0.0, 0.0
        for part in self.losses(rows, rewards, prompts.shape[1], self._whole(mask, rows)):
            part.loss.backward()
            divergence, entropy = divergence + part.divergence, entropy + part.entropy
        self.optimizer.step()
        self.parameters.stay_inside()
        self.updates += 1
        written = int(self._before_end(rows[:, prompts.shape[1] :]).sum())
        return GradientStep(float(rewards.mean()), divergence, entropy, written)

    def _whole(self, mask: Tensor | None, rows: Tensor) -> Tensor | None:
        """The mask of prompts (N, P) as that of whole texts, (N G, T)."""
        if mask is None:
            return None
        repeated = mask.repeat_interleave(self.settings.texts, 0)
        new = rows.shape[1] - mask.shape[1]
        return torch.cat([repeated, torch.ones_like(repeated[:, :1]).expand(-1, new)], 1)

    def write(self, prompts: Tensor, new_tokens: int, mask: Tensor | None = None) -> Tensor:
        """G texts behind each prompt (N, P), drawn as it draws while it learns: (N G, P + new_tokens)."""
        repeated = prompts.repeat_interleave(self.settings.texts, 0)
        return self._policy.written(
            self.model,
            repeated,
            torch.ones_like(repeated) if mask is None else mask.repeat_interleave(self.settings.texts, 0),
            Noise(seed_of(self.seed, self.updates)),
            given=self.parameters.row_parameters(self.model.device),
            odds=soft_odds,
            max_new_tokens=new_tokens,
        )

    def losses(
        self, rows: Tensor, rewards: Tensor, prompt_tokens: int, mask: Tensor | None = None
    ) -> Generator[Part]:
        """What is minimised, as parts that add up to it, each of as many rows as fit into memory.

        The gradient of the reward is an estimate of that of its expectation. Those of divergence and entropy
        are taken token by token, behind what was written: that a token now changes what is written later is
        left out of them.

        Args:
            rows: (N G, T) prompts and what was written.
            rewards: (N G,).
            prompt_tokens: of each row.
            mask: (N G, T), 0 where a row is padded.
        """
        groups = rewards.unflatten(0, (-1, self.settings.texts))
        others = (groups.sum(1, keepdim=True) - groups) / (self.settings.texts - 1)
        advantage = (groups - others).flatten().to(rows.device)
        counts = self._before_end(rows[:, prompt_tokens:]).double()  # (N G, new)
        at_once = max(1, _MOST_ODDS // (rows.shape[1] * self.model.config.vocab_size))
        for some in torch.arange(len(rows), device=rows.device).split(at_once):
            here = None if mask is None else mask[some]
            chosen, divergence, entropy = self._written_again(rows[some], prompt_tokens, counts[some], here)
            gain = (advantage[some] * chosen).sum() / len(rows)
            divergence, entropy = divergence / counts.sum(), entropy / counts.sum()
            loss = -gain + self.settings.divergence * divergence - self.settings.entropy * entropy
            yield Part(loss, float(divergence.detach()), float(entropy.detach()))

    def _written_again(
        self, rows: Tensor, prompt_tokens: int, counts: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each text (N G,); divergence from the start and entropy, nats of all tokens."""
        model = self.model
        with torch.no_grad(), evaluating(model), self._policy.heard(model), last_states(model) as hidden:
            logits = logits_of(model, rows, mask)
        places = slice(prompt_tokens - 1, -1)
        logits, states = logits[:, places].double(), hidden[0][:, places]
        past = functools.partial(past_of, rows, logits.shape[-1], prompt_tokens, mask)
        now = self._odds(self._policy, states, logits, past, self.parameters.row_parameters(logits.device))
        with torch.no_grad():
            began = self._odds(self._start, states, logits, past, self._began)
        new, odds = rows[:, prompt_tokens:], now.exp()
        divergence = ((odds * (now - began)).sum(-1) * counts).sum()
        entropy = -((odds * now).sum(-1) * counts).sum()
        chosen = now.gather(-1, new[..., None])[..., 0] * counts
        return chosen.sum(1), divergence, entropy

    def _before_end(self, new: Tensor) -> Tensor:
        """Which tokens were drawn, (N G, new) bool: all up to the end of a text, itself included."""
        ends = torch.tensor(end_tokens(self.model), dtype=new.dtype, device=new.device)
        ended = torch.isin(new, ends).long().cumsum(1)
        return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1) == 0

    @staticmethod
    def _odds(
        policy: DecodingPolicy,
        states: Tensor,
        logits: Tensor,
        past: Callable[[], History],
        given: RowParameters,
    ) -> Tensor:
        history = past() if given.reads_history else None
        return soft_odds(logits, policy.in_context(states, given), history)

    # ---- what must survive a restart -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        context = self._policy.context
        return {
            "parameters": {name: line.detach().clone() for name, line in self.parameters.lines.items()},
            "context": None if context is None else {k: v.clone() for k, v in context.state_dict().items()},
            "optimizer": optimizer_state(self.optimizer),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters.lines[name].copy_(value)
        if self._policy.context is not None:
            self._policy.context.load_state_dict(state["context"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.updates = state["updates"]


def soft_odds(logits: Tensor, given: RowParameters, history: History | None) -> Tensor:
    """`odds.warped` with a threshold of top-p that is drawn for each token: log-probabilities (..., V)."""
    logits = cooled(penalised(logits, given, history), given.temperature)
    if is_neutral(given.top_p, 1.0):
        return logits.log_softmax(-1)
    top_p = torch.as_tensor(given.top_p, dtype=logits.dtype, device=logits.device)
    return soft_nucleus(logits, top_p.expand(logits.shape[:-1]), _WIDTH)
