"""How like what people write: the default reward.

    value = (1 - m) n_grams + m mauve + repetition

* `n_grams`: by the distributions of runs of 2 to `order` bytes;
* `mauve`: by the distribution over clusters of features (`rewards.clusters`);
* `repetition`: below 0 where texts repeat themselves more than people do, as the likeliest text does
  (Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751), 0 otherwise.

The first two are 1 for what people wrote, in documents other than those that are compared with, and 0 for
what the model writes with temperature 1 and nothing cut off. Their distances have no bias
(`rewards.distance`): from few texts a value is noisier, not another. With stories260K, calibrated on 431
continuations of 48 tokens and scoring some behind prompts of other documents, 64 draws:

    value (one standard deviation)  people        T = 1         T = 0.85       T = 0.7        T = 0.5
    n_grams,  16 texts              1.04 (0.63)    0.02 (0.75)  -0.58 (0.74)  -1.55 (0.95)  -3.30 (1.47)
              64 texts              1.10 (0.19)   -0.10 (0.21)  -0.51 (0.32)  -1.45 (0.41)  -3.23 (0.57)
             192 texts              1.09 (0.06)   -0.20 (0.12)  -0.51 (0.13)  -1.49 (0.15)  -3.29 (0.22)
    mauve,    64 texts              1.00 (0.35)    0.35 (0.60)  -0.52 (0.82)  -1.38 (0.90)  -2.71 (1.13)
             192 texts              1.00 (0.17)    0.41 (0.31)  -0.55 (0.41)  -1.50 (0.45)  -2.69 (0.54)

So m is as large as features are sure, by default. A model that has learned its text well is calibrated: with
temperature 1 its runs of bytes are as frequent as people's, and little is to be won by other parameters.
"""

# N continuations

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from cambia.decoding.rewards.calibration import Measure
from cambia.decoding.rewards.clusters import Clusters
from cambia.decoding.rewards.distance import HistogramDistance, Histograms, Likeness
from cambia.decoding.rewards.grams import Grams
from cambia.decoding.rewards.reward import Material, Parts, Reward, Samples, Score, score_of, unfitted
from cambia.errors import ConfigError

FEWEST = 8
"""Texts of people: four to compare with, four to calibrate on."""
_SHORTEST = 2
"""Bytes of the shortest runs: single ones hardly differ."""
_RARE_RUN, _RARE_CLUSTER = 1e-3, 0.02
"""The share of runs of one length, and of texts, below which a kind counts no more for being rarer."""


@dataclass
class MatchReward(Reward):
    """Match to what people write: 1 like people, 0 like the model with temperature 1 and top-p 1.

    Half of the material's texts is compared with, the other half, of other documents, calibrates. Prompts
    that are scored later should be of others still.
    """

    order: Annotated[int, Ge(2)] = 4
    """Bytes of the longest runs that are compared."""
    clusters: Annotated[int, Ge(2)] = 8
    """Of features; no more than a quarter of the texts that they are made of."""
    mauve_share: float | Literal["auto"] = "auto"
    """m, 0 to 1: how much of the value is by features; 0 spares the model's reading of the texts. With auto
    it is as much as they are sure by, beside the runs, and half at most."""
    repetition: Annotated[float, Ge(0)] = 2.0
    """What a text loses that is nothing but repetition."""
    repetition_tokens: Annotated[int, Ge(1)] = 4
    """Tokens of the runs whose repetition is counted."""

    def __post_init__(self) -> None:
        if self.mauve_share != "auto" and not 0 <= self.mauve_share <= 1:
            raise ConfigError(f"mauve_share={self.mauve_share}: expected 0 to 1, or auto")
        self._n_grams: _RunMatch | None = None
        self._mauve: _FeatureMatch | None = None
        self._share, self._repeated = 0.0, 0.0

    def begin(self, material: Material) -> None:
        number = len(material.human)
        if number < FEWEST:
            raise ConfigError(
                f"a match with what people write is calibrated on {number} of their texts; expected at least "
                f"{FEWEST}, better some hundreds: take more prompts"
            )
        compared, held = material.parted()
        sides = (compared.human, compared.plain, held.human, held.plain)
        runs = self._n_grams = _RunMatch(sides, self.order)
        features = self._mauve = None
        if self.mauve_share:
            features = self._mauve = _FeatureMatch(sides, material.features, self.clusters)
        if self.mauve_share != "auto":
            self._share = self.mauve_share
        elif features is not None:
            self._share = min(0.5, _surest([runs.unsureness, features.unsureness])[1].item())
        self._repeated = self._repeats(material.human).mean().item()

    def measure(self, samples: Samples) -> Score:
        return score_of(self.weighed(samples), len(samples))

    def weighed(self, samples: Samples) -> Parts:
        """The parts as functions of how much each continuation counts."""
        if self._n_grams is None:
            raise unfitted(self)
        runs = self._n_grams.of(samples)
        features = self._mauve.of(samples) if self._mauve is not None else None
        repeats = self._repeats(samples)

        def parts(weights: Tensor) -> dict[str, Tensor]:
            found = {"n_grams": (1 - self._share) * runs(weights)}
            if features is not None:
                found["mauve"] = self._share * features(weights)
            excess = ((weights * repeats).sum() / weights.sum() - self._repeated).clamp_min(0)
            return found | {"repetition": -self.repetition * excess / max(1 - self._repeated, 1e-9)}

        return parts

    def _repeats(self, samples: Samples) -> Tensor:
        return Grams.up_to(samples.tokens, self.repetition_tokens)[-1].repeated


# ---- what is compared ----------------------------------------------------------------------------

_Sides = tuple[Samples, Samples, Samples, Samples]
"""What is compared with, people's texts and plain ones; and other documents' that calibrate, as well."""


def _surest(unsureness: Sequence[float]) -> Tensor:
    """The weights of measures whose sum is surest: as the inverse of their variances; they add up to 1."""
    weights = torch.tensor(unsureness, dtype=torch.float64) ** -2
    return weights / weights.sum()


class _RunMatch:
    """Match of the distributions of runs of bytes, the surest mean over their lengths."""

    def __init__(self, sides: _Sides, order: int):
        self._order = order
        self._lengths = [
            Likeness(HistogramDistance(theirs, usual, rare=_RARE_RUN), human, plain)
            for theirs, usual, human, plain in zip(*map(self._histograms, sides), strict=True)
        ]
        unsure = [each.ends.unsureness for each in self._lengths]
        self._weights = _surest(unsure)
        self.unsureness = (self._weights @ torch.tensor(unsure, dtype=torch.float64)).item()

    def of(self, samples: Samples) -> Measure:
        each = [one.of(runs) for one, runs in zip(self._lengths, self._histograms(samples), strict=True)]
        return lambda weights: self._weights @ torch.stack([measure(weights) for measure in each])

    def _histograms(self, samples: Samples) -> list[Histograms]:
        grams = Grams.up_to([text.encode() for text in samples.texts], self._order)
        return [each.histograms() for each in grams[_SHORTEST - 1 :]]


class _FeatureMatch:
    """Match of the distributions of features, sorted into clusters."""

    def __init__(self, sides: _Sides, features: Callable[[Sequence[str]], Tensor], clusters: int):
        made_of = [text for samples in sides[:2] for text in samples.texts if text]
        if not made_of:
            raise ConfigError("the material of a match has no text in it: its continuations are all empty")
        self._features = features
        self._clusters = Clusters.of(self._features(made_of), max(2, min(clusters, len(made_of) // 4)))
        theirs, usual, human, plain = map(self._histograms, sides)
        self._likeness = Likeness(HistogramDistance(theirs, usual, rare=_RARE_CLUSTER), human, plain)
        self.unsureness = self._likeness.ends.unsureness

    def of(self, samples: Samples) -> Measure:
        return self._likeness.of(self._histograms(samples))

    def _histograms(self, samples: Samples) -> Histograms:
        """The cluster of each text; the last for empty ones, and those that are like no other."""
        found = torch.full((len(samples),), len(self._clusters))
        written = [place for place, text in enumerate(samples.texts) if text]
        if written:
            features = self._features([samples.texts[place] for place in written])
            found[written] = self._clusters.assign(features)
        return Histograms.of_labels(found)
