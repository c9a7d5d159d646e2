"""Decoding parameters by exact gradients of the likelihood of held-out text.

Temperature, penalties, weights of layers and scales of heads say what the odds of each token are, so how
likely a text is has a gradient to all of them; the model itself stays frozen. What cuts tokens off (top-p,
min-p, top-k) has none: it makes text that it would not write impossible.
"""

# N rows, B rows of a batch, T time, P tokens of prompts, V vocabulary

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor
from transformers import PreTrainedModel

from cambia.decoding.drawing import seed_of
from cambia.decoding.learned import LearnedParameters, load_optimizer_state, optimizer_state
from cambia.decoding.odds import History, RowParameters, warped
from cambia.decoding.policy import DecodingPolicy
from cambia.errors import ConfigError, DataError
from cambia.nn.modes import evaluating

SMOOTH = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Parameters that the likelihood of a text has a gradient to."""
_MOST_ODDS = 1 << 25
"""Numbers of one tensor of odds; more rows are read in parts."""


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of text that is made likelier."""

    ids: Tensor
    """(N, T)."""
    prompt_tokens: int = 1
    """P, at the beginning of each row: they are read, and how likely they are does not count."""
    mask: Tensor | None = None
    """(N, T) bool: what is text; None: all. Padding stands before a prompt or behind the rest."""

    def __len__(self) -> int:
        return len(self.ids)

    def chosen(self, places: Tensor | Sequence[int]) -> Text:
        """Some of the rows."""
        return Text(self.ids[places], self.prompt_tokens, None if self.mask is None else self.mask[places])

    def parts(self, rows: int) -> Iterator[Text]:
        """All of them, so many at a time."""
        for places in torch.arange(len(self)).split(rows):
            yield self.chosen(places)

    @property
    def counted(self) -> Tensor:
        """(N, T - P) bool: whose likelihood counts."""
        mask = torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()
        return mask[:, self.prompt_tokens :]


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
        self, policy: DecodingPolicy, model: PreTrainedModel, text: Text, held: Text, *, seed: int = 0
    ) -> Fitted:
        """Fit a policy to text; the one that is given stays as it is.

        Args:
            text: that it is fitted to.
            held: other text, by which is decided when it is best.
            seed: of the order in which rows are read.

        Raises:
            ConfigError: a parameter has no gradient, or the policy cuts tokens off.
            DataError: there are no rows, or they have fewer than two tokens.
        """
        learner = self.learner(policy, model, text, held, seed=seed)
        for _ in range(self.steps):
            learner.step()
        learner.look()
        return Fitted(learner.best, learner.curve[0], min(learner.curve), learner.curve)

    def learner(
        self, policy: DecodingPolicy, model: PreTrainedModel, text: Text, held: Text, *, seed: int = 0
    ) -> LikelihoodLearner:
        """One at work; arguments and errors as those of `run`."""
        self._check(policy, text, held)
        return LikelihoodLearner(self, policy, model, text, held, seed)

    def _check(self, policy: DecodingPolicy, text: Text, held: Text) -> None:
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
        if not len(text) or not len(held) or not text.counted.any() or not held.counted.any():
            raise DataError(f"{len(text)} rows to fit to and {len(held)} held out: give longer text")


class LikelihoodLearner:
    """A policy that learns from text, its optimizer, and the best that it has been.

    Args:
        settings: how it learns.
        policy: where it begins.
        model: whose odds they are.
        text: that it learns from.
        held: other text, by which is decided when it is best.
        seed: of the order in which rows are read.
    """

    def __init__(
        self,
        settings: LikelihoodFit,
        policy: DecodingPolicy,
        model: PreTrainedModel,
        text: Text,
        held: Text,
        seed: int = 0,
    ):
        self.settings, self.model, self.text, self.held, self.seed = settings, model, text, held, seed
        self._learned = _Learned.of(policy, settings.learns)
        self.optimizer = torch.optim.Adam(self._learned.tensors(), lr=settings.rate)
        self.updates = 0
        self.best = self._learned.policy()
        """What did best at a look."""
        self.curve: list[float] = []
        """Nats per token on the text that is held out, at each look."""
        self._looked = -1
        self.processed = 0
        """Tokens that have gone through the model, one way; the way back counts as one more."""

    @property
    def policy(self) -> DecodingPolicy:
        """As it is now."""
        return self._learned.policy()

    def step(self) -> int:
        """Learn from some rows; returns how many tokens that were."""
        if not self.curve:
            self.look()
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.updates))
        some = torch.randperm(len(self.text), generator=generator)[: self.settings.batch_size]
        self.optimizer.zero_grad()
        text = self.text.chosen(some)
        with frozen(self.model):
            self._learned.backward(self.model, text)
        self.optimizer.step()
        self._learned.parameters.stay_inside()
        self.processed += 2 * text.ids.numel()
        self.updates += 1
        if self.updates % self.settings.look_steps == 0:
            self.look()
        return int(text.counted.sum())

    def look(self) -> None:
        """Measure what it is worth on the text that is held out, once after each step."""
        if self._looked == self.updates:
            return
        self._looked = self.updates
        with frozen(self.model):
            self.curve.append(self._learned.loss(self.model, self.held))
        self.processed += self.held.ids.numel()
        if self.curve[-1] <= min(self.curve):
            self.best = self._learned.policy()

    def state_dict(self) -> dict[str, Any]:
        return {
            "tensors": [tensor.detach().clone() for tensor in self._learned.tensors()],
            "optimizer": optimizer_state(self.optimizer),
            "updates": self.updates,
            "looked": self._looked,
            "processed": self.processed,
            "curve": list(self.curve),
            "best": self.best.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        with torch.no_grad():
            for tensor, value in zip(self._learned.tensors(), state["tensors"], strict=True):
                tensor.copy_(value)
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.updates, self._looked = state["updates"], state["looked"]
        self.processed = state["processed"]
        self.curve, self.best = list(state["curve"]), DecodingPolicy.from_dict(state["best"])


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

    def _losses(self, model: PreTrainedModel, text: Text) -> Generator[Tensor]:
        """Nats of all tokens that count, of some rows after the other."""
        listening, vocabulary = self.listening(), model.config.vocab_size
        at_once = max(1, _MOST_ODDS // (text.ids.shape[1] * vocabulary))
        for some in text.parts(at_once):
            ids, first = some.ids.to(model.device), text.prompt_tokens
            given = self.parameters.row_parameters(model.device)
            mask = None if some.mask is None else some.mask.to(model.device)
            with listening.heard(model):
                logits = logits_of(model, ids, mask)[:, first - 1 : -1].float()
            losses = token_losses(logits, ids, given, prompt_tokens=first, mask=mask)
            yield losses.masked_fill(~some.counted.to(losses.device), 0.0).sum()

    def backward(self, model: PreTrainedModel, text: Text) -> None:
        count = int(text.counted.sum())
        for loss in self._losses(model, text):
            (loss / count).backward()

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, text: Text) -> float:
        """Nats per token."""
        return sum(float(loss) for loss in self._losses(model, text)) / int(text.counted.sum())


def token_losses(
    logits: Tensor, ids: Tensor, given: RowParameters, *, prompt_tokens: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Nats of each token of a text behind its prompt, (B, T - P), as if it had been written token by token.

    Args:
        logits: (B, T - P, V), the model's for each next token.
        ids: (B, T).
        prompt_tokens: P.
        mask: (B, T), 0 where a row is padded.
    """
    history = past_of(ids, logits.shape[-1], prompt_tokens, mask) if given.reads_history else None
    logs = warped(logits, given, history).log_softmax(-1)
    return -logs.gather(-1, ids[:, prompt_tokens:, None])[..., 0]


def past_of(ids: Tensor, vocabulary: int, prompt_tokens: int = 1, mask: Tensor | None = None) -> History:
    """What stands before each token of a text (B, T) behind its prompt: (B, T - P, V)."""
    before = ids[:, :-1, None]
    stands = torch.zeros(*before.shape[:2], vocabulary, device=ids.device)
    real = 1.0 if mask is None else mask[:, :-1, None].to(stands)
    stood = stands.scatter_(2, before, real).cumsum(1)[:, prompt_tokens - 1 :]
    return History(stood > 0, stood - stood[:, :1])


def mean_loss(policy: DecodingPolicy, model: PreTrainedModel, text: Text) -> float:
    """Nats per token that a policy gives text; infinite where it cuts off what stands there."""
    with frozen(model):
        return _Learned.of(policy, ()).loss(model, text)


def logits_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The model's logits (B, T, V) of rows (B, T) that may be padded on the left, as when it writes."""
    if mask is None or bool(mask.all()):
        return model(input_ids=ids, use_cache=False).logits
    given = {"attention_mask": mask.long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return model(input_ids=ids, use_cache=False, **given).logits


@contextmanager
def frozen(model: PreTrainedModel) -> Generator[None]:
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
