"""Probes measure a model without training it.

>>> bits_per_byte(model, evaluation_batches(corpus.splits["valid"], batch_size=16, sequence_length=256))
Likelihood(nats=81234.1, tokens=33010, bytes=32768)
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


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How surprising a text was to a model: the negative log-likelihood alone, no penalty in it."""

    nats: float
    """Summed over all predicted tokens."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Bytes of UTF-8 text that these tokens stand for; 0 where nobody counted them."""

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


def bits_per_byte(model: PreTrainedModel, batches: Iterable[Batch]) -> Likelihood:
    """Score text, each token once, in evaluation mode and without touching the model's state.

    Args:
        model: any causal language model.
        batches: for example from `cambia.data.batches.evaluation_batches`.
    """
    nats, tokens, num_bytes = 0.0, 0, 0
    for batch, losses in token_losses(model, batches):
        nats += losses.sum().item()
        tokens += int((batch.targets != IGNORED).sum())
        num_bytes += batch.num_bytes
    return Likelihood(nats, tokens, num_bytes)


def token_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the loss of each of its targets: (B, T), nats, 0 where a target is left out."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
                targets = batch.targets.to(logits.device)
                # (B, T, V) -> (B T, V); in float32 at least, since bfloat16 sums lose the digits that count.
                flat = logits.flatten(0, 1)
                flat = flat if flat.dtype == torch.float64 else flat.float()
                losses = nn.functional.cross_entropy(flat, targets.flatten(), reduction="none")
            yield batch, losses.view(targets.shape)
    finally:
        model.train(was_training)


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
