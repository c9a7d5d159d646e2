"""Decoding parameters by exact gradients of the likelihood of held-out text.

Temperature, penalties, weights of layers and scales of heads say what the odds of each token are, so how
likely a text is has a gradient to all of them; the model itself stays frozen. What cuts tokens off (top-p,
min-p, top-k) has none: it makes text that it would not write impossible.
"""

# N rows, B rows of a batch, T time, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.decoding.learned import LearnedParameters
from cambia.decoding.odds import History, Knobs, warped
from cambia.decoding.policy import DecodingPolicy
from cambia.errors import ConfigError, DataError
from cambia.nn.modes import evaluating

SMOOTH = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Parameters that the likelihood of a text has a gradient to."""
_MOST_ODDS = 1 << 25
"""Numbers of one tensor of odds; more rows are read in parts."""


@dataclass(frozen=True)
class Fitted:
    """What came of a fit."""

    policy: DecodingPolicy
    before: float
    """Nats per token on the rows that were held out, before."""
    after: float
    curve: Sequence[float]
    """The same at each look."""


@dataclass
class LikelihoodFit:
    """Adam on a policy; what does best on held-out rows is taken."""

    learns: tuple[str, ...] = ("temperature",)
    """Parameters that are learned, beside the weights that the policy has."""
    steps: Annotated[int, Gt(0)] = 100
    batch_size: Annotated[int, Gt(0)] = 16
    rate: Annotated[float, Gt(0)] = 0.02
    look_steps: Annotated[int, Gt(0)] = 10
    """Steps between looks at the held-out rows."""

    def run(
        self, policy: DecodingPolicy, model: PreTrainedModel, rows: Tensor, held: Tensor, *, seed: int = 0
    ) -> Fitted:
        """Fit a policy to text; the one that is given stays as it is.

        Args:
            rows: (N, T) that it is fitted to.
            held: (M, T) others, by which is decided when it is best.
            seed: of the order in which rows are read.

        Raises:
            ConfigError: a parameter has no gradient, or the policy cuts tokens off.
            DataError: there are no rows, or they have fewer than two tokens.
        """
        self._check(policy, rows, held)
        learned = _Learned.of(policy, self.learns)
        optimizer = torch.optim.Adam(learned.tensors(), lr=self.rate)
        generator = torch.Generator().manual_seed(seed)
        with _frozen(model):
            curve = [learned.loss(model, held)]
            best, chosen = curve[0], learned.policy()
            for step in range(1, self.steps + 1):
                some = torch.randperm(len(rows), generator=generator)[: self.batch_size]
                optimizer.zero_grad()
                learned.backward(model, rows[some])
                optimizer.step()
                if step % self.look_steps == 0 or step == self.steps:
                    curve.append(learned.loss(model, held))
                    if curve[-1] < best:
                        best, chosen = curve[-1], learned.policy()
        return Fitted(chosen, curve[0], best, curve)

    def _check(self, policy: DecodingPolicy, rows: Tensor, held: Tensor) -> None:
        wrong = [name for name in self.learns if name not in SMOOTH]
        if wrong:
            raise ConfigError(
                f"{wrong[0]!r} cannot be learned from likelihood; {', '.join(SMOOTH)} can, and the others "
                "by a reward"
            )
        cuts = [name for name in policy.parameters.changed if name in ("top_p", "min_p", "top_k")]
        if cuts or policy.parameters.is_greedy:
            raise ConfigError(
                f"{cuts[0] if cuts else 'temperature 0'} makes some text impossible, so there is no "
                "likelihood to fit: leave it neutral here"
            )
        if policy.context is not None:
            raise ConfigError("the head for each token is learned from a reward, not from likelihood")
        if not self.learns and not policy.listens:
            raise ConfigError("nothing is learned: name parameters, or make a policy with layers or heads")
        if not len(rows) or not len(held) or rows.shape[1] < 2:
            raise DataError(f"{len(rows)} rows to fit to and {len(held)} held out: give longer text")


@dataclass(frozen=True, eq=False)
class _Learned:
    """The tensors of a fit."""

    start: DecodingPolicy
    parameters: LearnedParameters
    layers: Tensor | None
    heads: Sequence[Tensor] | None

    @classmethod
    def of(cls, policy: DecodingPolicy, names: Sequence[str]) -> _Learned:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().clone().float().requires_grad_()

        layers = None if policy.layer_weights is None else leaf(policy.layer_weights)
        heads = None if policy.head_weights is None else [leaf(scale) for scale in policy.head_weights]
        return cls(copy.deepcopy(policy), LearnedParameters(policy.parameters, names), layers, heads)

    def tensors(self) -> list[Tensor]:
        layers = [] if self.layers is None else [self.layers]
        return [*self.parameters.tensors(), *layers, *(self.heads or [])]

    def listening(self) -> DecodingPolicy:
        """The policy with the tensors themselves, so that gradients reach them."""
        return replace(self.start, layer_weights=self.layers, head_weights=self.heads)

    def policy(self) -> DecodingPolicy:
        """As it is now, within the ranges of its parameters."""
        layers = None if self.layers is None else self.layers.detach().clone()
        heads = None if self.heads is None else [scale.detach().clone() for scale in self.heads]
        moved = self.start.with_parameters(**self.parameters.values())
        return replace(moved, layer_weights=layers, head_weights=heads)

    def _losses(self, model: PreTrainedModel, rows: Tensor) -> Generator[tuple[Tensor, int]]:
        """Nats of all tokens of some rows, and how many these are."""
        listening, vocabulary = self.listening(), model.config.vocab_size
        at_once = max(1, _MOST_ODDS // (rows.shape[1] * vocabulary))
        for some in rows.split(at_once):
            ids = some.to(model.device)
            with listening.heard(model):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            yield token_losses(logits, ids, self.parameters.knobs()).sum(), ids[:, 1:].numel()

    def backward(self, model: PreTrainedModel, rows: Tensor) -> None:
        count = rows[:, 1:].numel()
        for loss, _ in self._losses(model, rows):
            (loss / count).backward()

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, rows: Tensor) -> float:
        """Nats per token."""
        found = [(float(loss), count) for loss, count in self._losses(model, rows)]
        return sum(loss for loss, _ in found) / sum(count for _, count in found)


def token_losses(logits: Tensor, ids: Tensor, knobs: Knobs) -> Tensor:
    """Nats of each token of a text but the first, (B, T - 1), as if it had been written token after token.

    Args:
        logits: (B, T - 1, V), the model's for each next token.
        ids: (B, T). The first token is a prompt, the others count as written.
    """
    history = past_of(ids, logits.shape[-1]) if knobs.reads_history else None
    logs = warped(logits, knobs, history).log_softmax(-1)
    return -logs.gather(-1, ids[:, 1:, None])[..., 0]


def past_of(ids: Tensor, vocabulary: int, prompt_tokens: int = 1) -> History:
    """What stands before each token of a text (B, T) behind its prompt: (B, T - prompt_tokens, V)."""
    stood = nn.functional.one_hot(ids[:, :-1], vocabulary).cumsum(1)[:, prompt_tokens - 1 :]
    return History(stood > 0, (stood - stood[:, :1]).float())


def mean_loss(policy: DecodingPolicy, model: PreTrainedModel, rows: Tensor) -> float:
    """Nats per token that a policy gives rows (N, T)."""
    with _frozen(model):
        return _Learned.of(policy, ()).loss(model, rows)


@contextmanager
def _frozen(model: PreTrainedModel) -> Generator[None]:
    """Inside the block the model is evaluated, and its weights collect no gradients."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
