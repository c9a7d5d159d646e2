"""How varied continuations are: within each text, and from text to text.

* `distinct`: different runs of tokens over all runs, of all texts together (distinct-n of Li et al. 2016, A
  Diversity-Promoting Objective Function for Neural Conversation Models, arXiv:1510.03055), averaged over n;
* `repeated`: the share of a text's runs that came in it before (Welleck et al. 2019, Neural Text Generation
  with Unlikelihood Training, arXiv:1908.04319);
* `self_bleu`: how well a text is put together from runs of the others (Zhu et al. 2018, Texygen: A
  Benchmarking Platform for Text Generation Models, arXiv:1802.01886).

All three depend on how many texts there are, and text at temperature 1 is more varied than people's.
"""

# N continuations, G different n-grams of each text together, K of all texts

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from cambia.decoding.rewards.calibration import Measure, Ruler
from cambia.decoding.rewards.grams import Grams
from cambia.decoding.rewards.reward import Material, Reward, Samples, Score, unfitted

_BLEU = 4
"""Tokens of the longest runs of BLEU."""
_LEAST = 0.02
"""The smallest difference of a measure, 0 to 1, that is worth anything: people hardly repeat themselves, nor
does the model with temperature 1."""


@dataclass
class DiversityReward(Reward):
    """How varied: three measures, a third each.

    With `human` each is 1 where it is what people's texts have, and 0 where it is as far off, above or below,
    as that of what the model writes with temperature 1, or by 0.02 where that is less. With `most` they are
    distinct-n, less the repeated share and less self-BLEU, as they are.
    """

    target: Literal["human", "most"] = "human"
    """As varied as what people write, or as varied as can be."""
    order: Annotated[int, Ge(1)] = 3
    """Tokens of the longest runs of distinct-n."""
    repetition_tokens: Annotated[int, Ge(1)] = 4
    """Tokens of the runs whose repetition is counted."""

    def __post_init__(self) -> None:
        self._rulers: dict[str, Ruler] = {}

    def begin(self, material: Material) -> None:
        human, plain = self._measures(material.human), self._measures(material.plain)
        number = len(material.human)
        self._rulers = {name: Ruler(human[name].of, plain[name].of, number, least=_LEAST) for name in human}

    def measure(self, samples: Samples) -> Score:
        if self.target == "human" and not self._rulers:
            raise unfitted(self)
        everything = torch.ones(len(samples), dtype=torch.float64)
        parts, each = {}, torch.zeros_like(everything)
        for name, found in self._measures(samples).items():
            value = found.of(everything).requires_grad_()
            scaled = self._scaled(name, value, len(samples)) / 3
            (slope,) = torch.autograd.grad(scaled, value)
            parts[name] = scaled.item()
            each += scaled.detach() + slope * found.influence()
        return Score(sum(parts.values()), parts, each)

    def _scaled(self, name: str, value: Tensor, number: int) -> Tensor:
        if self.target == "human":
            return self._rulers[name].at(number).likeness(value)
        return value * (1 if name == "distinct" else -1)

    def _measures(self, samples: Samples) -> dict[str, _Measured]:
        grams = Grams.up_to(samples.tokens, max(self.order, self.repetition_tokens, _BLEU))
        repeated = grams[self.repetition_tokens - 1].repeated
        return {
            "distinct": _distinct(grams[: self.order]),
            "repeated": _Measured(
                lambda weights: (weights * repeated).sum() / weights.sum(), lambda: repeated - repeated.mean()
            ),
            "self_bleu": _overlap(grams[:_BLEU]),
        }


@dataclass(frozen=True, eq=False)
class _Measured:
    """A measure of some texts, and what each of them does to it."""

    of: Measure
    influence: Callable[[], Tensor]
    """(N,), their mean is 0."""


def _distinct(grams: Sequence[Grams]) -> _Measured:
    def of(weights: Tensor) -> Tensor:
        there = (weights > 0).numpy()
        shares = [
            len(np.unique(each.keys[there[each.texts]])) / max(1, each.lengths[there].sum()) for each in grams
        ]
        return torch.tensor(shares, dtype=torch.float64).mean()

    return _Measured(of, lambda: torch.stack([_left_out(each) for each in grams]).mean(0))


def _left_out(grams: Grams) -> Tensor:
    """(N,): what leaving a text out takes from distinct-n, times N - 1 (the jackknife)."""
    keys, places = grams.places
    alone = np.bincount(places, minlength=len(keys))[places] == 1  # what no other text has
    own = np.bincount(grams.texts, alone, minlength=grams.num_texts)
    total = grams.lengths.sum()
    without = (len(keys) - own) / np.maximum(total - grams.lengths, 1)
    change = torch.from_numpy((len(keys) / max(1, total) - without) * (grams.num_texts - 1))
    return change - change.mean()


def _overlap(grams: Sequence[Grams]) -> _Measured:
    def influence() -> Tensor:
        found = self_bleu(grams)
        return found - found.mean()

    return _Measured(lambda weights: self_bleu(grams, (weights > 0).numpy()).mean(), influence)


def self_bleu(grams: Sequence[Grams], there: np.ndarray | None = None) -> Tensor:
    """BLEU of each text with the others as references, 0 to 1: (N,) float64.

    Precisions of runs longer than one token are smoothed by one (Lin and Och 2004, ORANGE), runs that a text
    is too short for are left out, nothing is taken off for brevity. An empty text has 1, a lone one 0.

    Args:
        grams: of n = 1, 2, ...
        there: (N,) bool, the texts that count, of which the result is; all of them by default.
    """
    there = np.ones(grams[0].num_texts, dtype=bool) if there is None else there
    if there.sum() == 1:
        return torch.zeros(1, dtype=torch.float64)
    logs, orders = np.zeros(len(there)), np.zeros(len(there))
    for n, each in enumerate(grams):
        more = 1 if n else 0
        found = np.bincount(each.texts, _clipped(each, there), minlength=len(there))
        precision = np.maximum(found + more, 1e-12) / np.maximum(each.lengths + more, 1)
        logs += np.where(each.lengths > 0, np.log(precision), 0.0)
        orders += each.lengths > 0
    return torch.from_numpy(np.exp(logs / np.maximum(orders, 1))[there])


def _clipped(grams: Grams, there: np.ndarray) -> np.ndarray:
    """(G,): how often an n-gram comes, but no oftener than in that other text that has it most often."""
    if not len(grams.counts):
        return np.zeros(0)
    counts = np.where(there[grams.texts], grams.counts, 0)
    _, places = grams.places
    order = np.lexsort((counts, places))
    sorted_places, sorted_counts = places[order], counts[order]
    last = np.append(sorted_places[1:] != sorted_places[:-1], True)
    # The largest of each n-gram has the next smaller one beside it, every other entry has the largest.
    beside = np.where(np.append(False, ~last[:-1]), np.append(0, sorted_counts[:-1]), 0)
    largest = sorted_counts[last][np.cumsum(np.append(0, last[:-1]))]
    clipped = np.empty(len(counts))
    clipped[order] = np.minimum(sorted_counts, np.where(last, beside, largest))
    return clipped
