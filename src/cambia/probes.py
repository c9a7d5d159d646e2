"""Probes measure a model without training it.

>>> bits_per_byte(model, evaluation_batches(corpus.splits["valid"], batch_size=16, sequence_length=256))
Likelihood(nats=81234.1, tokens=33010, bytes=32768)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from cambia.data.batches import Batch


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How surprising a text was to a model: the negative log-likelihood alone, no penalty in it."""

    nats: float
    """Summed over all predicted tokens."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Bytes of UTF-8 text that these tokens stand for."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, since text has as many bytes whatever it is cut into."""
        return self.nats_per_byte / math.log(2)


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, batches: Iterable[Batch]) -> Likelihood:
    """Score text, each token once, in evaluation mode and without touching the model's state.

    Args:
        model: any causal language model.
        batches: for example from `cambia.data.batches.evaluation_batches`.
    """
    was_training = model.training
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    try:
        for batch in batches:
            logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
            targets = batch.targets.to(logits.device)
            # (B, T, V) -> (B T, V); in float32 at least, since bfloat16 sums lose the digits that count.
            flat = logits.flatten(0, 1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            nats += nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum").item()
            tokens += int((targets != -100).sum())
            num_bytes += batch.num_bytes
    finally:
        model.train(was_training)
    return Likelihood(nats, tokens, num_bytes)
