"""How likely continuations are to another model, one that does not learn.

What the writing model itself finds likely must not be a reward: its likeliest text is a loop (Holtzman et al.
2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751), and a frozen model of other data falls
for loops as well, if less. So what is rewarded is to be as likely as people's text, not to be likely.
"""

# N continuations, B rows that are read at once, T tokens of the longest of them

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cambia.data.batches import IGNORED, Batch
from cambia.data.tokenizers import Tokenizer
from cambia.decoding.rewards.distance import Likeness, LineDistance
from cambia.decoding.rewards.reward import (
    Material,
    Reward,
    Samples,
    Score,
    mean_of,
    score_of,
    unfitted,
)
from cambia.errors import ConfigError
from cambia.models.saved import load_model, load_tokenizer
from cambia.probes import token_losses

EMPTY = math.log(256)
"""Nats per byte of a text without any: those of random bytes."""
_BATCH = 16


@dataclass
class FluencyReward(Reward):
    """How likely a frozen reference model finds the text.

    With `human`: 1 where the texts' nats per byte are distributed as people's are, 0 where they are as far
    from that as the model's with temperature 1 (`rewards.distance`). With `lowest`: less the nats per byte;
    it rewards repetition, and is here for comparison.
    """

    reference: str
    """A model folder, safetensors, with its tokenizer: trained on other data than the model that writes."""
    target: Literal["human", "lowest"] = "human"
    """As likely as what people write, or as likely as can be."""

    def __post_init__(self) -> None:
        if not self.reference:
            raise ConfigError("a fluency reward needs `reference`: a model folder")
        self._model: PreTrainedModel | None = None
        self._tokenizer: Tokenizer | None = None
        self._likeness: Likeness[Tensor] | None = None

    def begin(self, material: Material) -> None:
        """Open the reference, and measure what people wrote by it.

        Raises:
            CheckpointError: there is no model or no tokenizer that can be opened safely.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(self.reference).to(device)
        self._tokenizer = Tokenizer(load_tokenizer(self.reference))
        if self.target == "human":
            compared, held = material.parted()
            distance = LineDistance(self._read(compared.human))
            self._likeness = Likeness(distance, self._read(held.human), self._read(held.plain))

    def measure(self, samples: Samples) -> Score:
        found = self._read(samples)
        if self._likeness is None:
            return mean_of(-found)
        likeness = self._likeness.of(found)
        return score_of(lambda weights: {"likeness": likeness(weights)}, len(samples))

    def _read(self, samples: Samples) -> Tensor:
        if self._model is None or self._tokenizer is None:
            raise unfitted(self)
        return nats_per_byte(self._model, self._tokenizer, samples.prompts, samples.texts)


def nats_per_byte(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str]
) -> Tensor:
    """How surprising each text is behind its prompt: (N,) float64. An empty text has ln 256.

    A token that begins in the prompt and ends in the text is counted to the text. Where both together are
    longer than the model reads, the prompt loses its beginning; of a text that is too long its beginning is
    judged.
    """
    wholes = tokenizer.encode_batch([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    begun = tokenizer.encode_batch(prompts)
    opening = tokenizer.opening.tolist() or [tokenizer.eos_id]  # one token
    longest = model.config.max_position_embeddings
    rows, starts, read = [], [], []
    for whole, prompt in zip(wholes, begun, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), None)
        start = min(len(whole), len(prompt)) if shared is None else shared
        ids = opening + whole.tolist()
        cut = max(0, min(len(ids) - longest - 1, start))  # of the prompt, the token before the text never
        rows.append(ids[cut:][: longest + 1])
        starts.append(1 + start - cut)
        read.append((len(rows[-1]) - starts[-1]) / max(1, len(whole) - start))
    batches = [_batch(rows[i : i + _BATCH], starts[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
    nats = torch.cat([losses.double().sum(1).cpu() for _, losses in token_losses(model, batches)])
    sizes = torch.tensor(read, dtype=torch.float64) * torch.tensor([len(text.encode()) for text in texts])
    return torch.where(sizes > 0, nats / sizes.clamp_min(1e-9), EMPTY)


def _batch(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
    """Rows of which the tokens from `starts` on are predicted; they are filled up on the right."""
    width = max(2, *map(len, rows)) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[place, : len(row) - 1] = torch.tensor(row[:-1], dtype=torch.int64)
        targets[place, start - 1 : len(row) - 1] = torch.tensor(row[start:], dtype=torch.int64)
    return Batch(ids, targets, num_bytes=0)
