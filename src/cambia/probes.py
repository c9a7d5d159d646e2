"""Probes measure a model without training it.

>>> bits_per_byte(model, evaluation_batches(corpus.splits["valid"], batch_size=16, sequence_length=256))
Likelihood(nats=81234.1, tokens=33010, bytes=32768, exact=0, examples=0)
>>> bits_per_byte(model, question_batches, exact=True).accuracy
0.713
>>> slice_losses(model, batches, [TokenSlice(name="digits", tokens=[*range(48, 58)])])
{'slice_loss/digits': 2.31, 'rest_loss/digits': 1.62}
"""

# B batch (rows), T time (sequence length), V vocabulary

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.config import resolve_function
from cambia.data.batches import IGNORED, Batch
from cambia.nn.modes import evaluating


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How surprising a text was to a model: the negative log-likelihood alone, no penalty in it."""

    nats: float
    """Summed over all predicted tokens."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Bytes of UTF-8 text that these tokens stand for; 0 where nobody counted them."""
    exact: int = 0
    """Answers of which every token was the model's first choice."""
    examples: int = 0
    """Answers; 0 where nobody counted them."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes if self.bytes else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, since text has as many bytes whatever it is cut into."""
        return self.nats_per_byte / math.log(2)

    @property
    def accuracy(self) -> float | None:
        """The share of answers that are exactly right; None where nobody counted them."""
        return self.exact / self.examples if self.examples else None


def bits_per_byte(model: PreTrainedModel, batches: Iterable[Batch], *, exact: bool = False) -> Likelihood:
    """Score text, each token once, in evaluation mode and without touching the model's state.

    Args:
        model: any causal language model.
        batches: for example from `cambia.data.batches.evaluation_batches`.
        exact: also count the answers that are exactly right, in the same pass. This is for text of which
            only answers are trained on, in rows of whole documents: an answer is a stretch of targets among
            others that are left out, the token that ends it included. A target by itself is no answer: it is
            what ends a chat whose last turn has ended already. That each token is the model's first choice
            after the true ones before it is the same as that the model writes the answer when it decodes
            greedily, since both read the same until one goes wrong.
    """
    nats, tokens, num_bytes, right, examples = 0.0, 0, 0, 0, 0
    with evaluating(model):
        for batch in batches:
            logits = _logits(model, batch)
            nats += _losses(logits, batch).sum().item()
            tokens += int((batch.targets != IGNORED).sum())
            num_bytes += batch.num_bytes
            if exact:
                some = _answers(logits, batch)
                right, examples = right + some[0], examples + some[1]
    return Likelihood(nats, tokens, num_bytes, right, examples)


def token_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the loss of each of its targets: (B, T), nats, 0 where a target is left out."""
    with evaluating(model):
        for batch in batches:
            yield batch, _losses(_logits(model, batch), batch)


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, T, V), in float32 at least, since bfloat16 sums lose the digits that count."""
    logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    """Of each target, (B, T), nats."""
    targets = batch.targets.to(logits.device)
    flat = logits.flatten(0, 1)  # (B, T, V) -> (B T, V)
    return nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)


def _answers(logits: Tensor, batch: Batch) -> tuple[int, int]:
    """Answers that are exactly right, and all of them."""
    targets = batch.targets.to(logits.device)
    counted = targets != IGNORED  # (B, T)
    left = nn.functional.pad(counted, (1, 0))[:, :-1]
    right = nn.functional.pad(counted, (0, 1))[:, 1:]
    begins = counted & ~left & right
    number = begins.flatten().cumsum(0)  # (B T,): of the answer that a target belongs to
    wrong = (counted & (left | right) & (logits.argmax(-1) != targets)).flatten()
    answers = int(begins.sum())
    return answers - len(number[wrong].unique()), answers


# ---- slices: a part of the data against the rest --------------------------------------------------

SLICES: dict[str, str] = {
    "length": "cambia.probes:LengthSlice",
    "domain": "cambia.probes:DomainSlice",
    "tokens": "cambia.probes:TokenSlice",
    "function": "cambia.probes:FunctionSlice",
}


@dataclass(frozen=True)
class Slice(ABC):
    """A part of the data that is measured on its own, against the rest."""

    name: str
    """What its measurements are called: slice_loss/NAME and rest_loss/NAME."""

    @abstractmethod
    def mask(self, batch: Batch) -> Tensor:
        """Which targets belong to it: (B, T), bool."""


@dataclass(frozen=True)
class LengthSlice(Slice):
    """Targets with much text before them."""

    at_least: Annotated[int, Gt(0)] = 128
    """Tokens that stand before the target in its row."""

    def mask(self, batch: Batch) -> Tensor:
        before = torch.arange(1, batch.targets.shape[1] + 1)
        return (before >= self.at_least).expand(batch.targets.shape)


@dataclass(frozen=True)
class DomainSlice(Slice):
    """Text of one task of the stream."""

    task: str = ""
    """The task's name; the slice's own where it is empty."""

    def mask(self, batch: Batch) -> Tensor:
        return torch.full(batch.targets.shape, batch.source == (self.task or self.name))


@dataclass(frozen=True)
class TokenSlice(Slice):
    """Targets that are one of a set of tokens."""

    tokens: list[int]
    """Token ids; of the byte tokenizer they are the bytes' values."""

    def mask(self, batch: Batch) -> Tensor:
        return torch.isin(batch.targets, torch.tensor(self.tokens))


@dataclass(frozen=True)
class FunctionSlice(Slice):
    """Whatever a function of one's own says."""

    function: str
    """Its name, "my_module:function"; it takes a `Batch` and returns a mask, (B, T)."""

    def mask(self, batch: Batch) -> Tensor:
        return resolve_function(self.function, (), "function")(batch)


def slice_losses(
    model: PreTrainedModel, batches: Iterable[Batch], slices: Sequence[Slice]
) -> dict[str, float]:
    """Mean loss on each slice and on the rest, nats per token; what has no target is left out."""
    totals = {(item.name, inside): [0.0, 0] for item in slices for inside in (True, False)}
    for batch, losses in token_losses(model, batches):
        counted = batch.targets != IGNORED
        for item in slices:
            mask = item.mask(batch)
            for inside in (True, False):
                chosen = (mask if inside else ~mask) & counted
                total = totals[item.name, inside]
                total[0] += losses[chosen.to(losses.device)].sum().item()
                total[1] += int(chosen.sum())
    return {
        f"{'slice' if inside else 'rest'}_loss/{name}": nats / count
        for (name, inside), (nats, count) in totals.items()
        if count
    }
