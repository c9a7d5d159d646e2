"""How like what people write: the default reward.

    value = (1 - m) n_grams + m mauve + repetition

* `n_grams`: by the distributions of runs of 2 to `order` bytes, compared by Jensen-Shannon divergence;
* `mauve`: by clustered features, compared by the area under the divergence frontier (`rewards.frontier`);
* `repetition`: below 0 where texts repeat themselves more than people do, as the likeliest text does
  (Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv:1904.09751), 0 otherwise.

The first two are 1 for what people wrote, in documents other than those that are compared with, and 0 for
what the model writes with temperature 1 and nothing cut off. Divergences are overestimated from few texts, so
both ends are measured with as many texts as are scored (`Ruler`). What lies between them is still flattered
where text is less varied, the more so the rarer the runs: that is why they end at 4 bytes. With stories260K,
continuations of 48 tokens, 128 texts compared with, 16 draws:

    value (one standard deviation)      people        T = 1         T = 0.85      T = 0.7       greedy
    runs of 3 bytes,  64 texts          1.00 (0.09)   0.00 (0.15)   0.00 (0.13)  -0.22 (0.09)  -3.57 (0.37)
                     192 texts          1.00 (0.03)   0.00 (0.04)  -0.04 (0.04)  -0.31 (0.04)  -3.32 (0.11)
    runs of 5 bytes,  64 texts          1.00 (0.09)   0.00 (0.16)   0.27 (0.14)   0.33 (0.11)  -1.25 (0.21)
                     192 texts          1.00 (0.04)   0.00 (0.04)   0.17 (0.04)   0.10 (0.05)  -1.42 (0.05)

Features of that model, 16 clusters, tell its plain text from people's by half a standard deviation, at 64
texts and at 192. So m is as large as they are sure, by default.
"""

# N continuations, H texts that are calibrated on, M texts that are compared with, K clusters

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from cambia.decoding.prompts import parted
from cambia.decoding.rewards.calibration import Measure, Ruler
from cambia.decoding.rewards.frontier import Clusters, frontier_area, smoothed
from cambia.decoding.rewards.grams import GramHistogram, Grams
from cambia.decoding.rewards.reward import Material, Reward, Samples, Score, unfitted
from cambia.errors import ConfigError

FEWEST = 8
"""Texts of people: four to compare with, four to calibrate on."""
_SHORTEST = 2
"""Bytes of the shortest runs: single ones hardly differ."""

Parts = Callable[[Tensor], Mapping[str, Tensor]]
"""(N,) how often each continuation counts -> the parts, () each; differentiable."""


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
        runs = self._n_grams = _RunMatch(material, self.order)
        features = self._mauve = _FeatureMatch(material, self.clusters) if self.mauve_share else None
        if self.mauve_share != "auto":
            self._share = self.mauve_share
        elif features is not None:
            # As the inverse of their variances, which gives the sum that is surest.
            runs_variance, variance = runs.unsureness**2, features.unsureness**2
            self._share = min(0.5, runs_variance / max(runs_variance + variance, 1e-30))
        self._repeated = self._repeats(material.human).mean().item()

    def measure(self, samples: Samples) -> Score:
        weights = torch.ones(len(samples), dtype=torch.float64, requires_grad=True)
        parts = self.weighed(samples)(weights)
        value = torch.stack([*parts.values()]).sum()
        (slopes,) = torch.autograd.grad(value, weights)
        each = value.detach() + len(samples) * slopes
        return Score(value.item(), {name: part.item() for name, part in parts.items()}, each)

    def weighed(self, samples: Samples) -> Parts:
        """The parts as functions of how often each continuation counts."""
        if self._n_grams is None:
            raise unfitted(self)
        runs = self._n_grams.nearness(samples)
        features = self._mauve.nearness(samples) if self._mauve is not None else None
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


def _halves(material: Material) -> tuple[Samples, Samples, Samples]:
    """What is compared with, and people's and plain texts to calibrate on."""
    compared, held = parted(material.documents or range(len(material.human)), 0.5)
    return material.human.chosen(compared), material.human.chosen(held), material.plain.chosen(held)


# ---- n-grams -------------------------------------------------------------------------------------


class _RunMatch:
    """Match of the distributions of runs of bytes, the mean over their lengths."""

    def __init__(self, material: Material, order: int):
        compared, human, plain = _halves(material)
        self._order = order
        self._lengths = [
            _OneLength(*each, number=len(human))
            for each in zip(*map(self._histograms, (compared, human, plain)), strict=True)
        ]
        some = [each.ruler.at(max(1, len(human) // 2)) for each in self._lengths]
        self.unsureness = sum(ends.unsureness for ends in some) / len(some)

    def _histograms(self, samples: Samples) -> list[GramHistogram]:
        grams = Grams.up_to([text.encode() for text in samples.texts], self._order)
        return [each.histogram() for each in grams[_SHORTEST - 1 :]]

    def nearness(self, samples: Samples) -> Measure:
        pairs = [*zip(self._lengths, self._histograms(samples), strict=True)]
        ends = [each.ruler.at(len(samples)) for each in self._lengths]

        def mean(weights: Tensor) -> Tensor:
            found = [each.divergence(histogram, weights) for each, histogram in pairs]
            return torch.stack([end.nearness(far) for end, far in zip(ends, found, strict=True)]).mean()

        return mean


class _OneLength:
    """Runs of one length, and where people's texts and plain ones lie."""

    def __init__(self, compared: GramHistogram, human: GramHistogram, plain: GramHistogram, *, number: int):
        self._compared = compared
        self._shares = compared(torch.ones(compared.num_texts, dtype=torch.float64))
        self.ruler = Ruler(
            lambda weights: self.divergence(human, weights),
            lambda weights: self.divergence(plain, weights),
            number,
        )

    def divergence(self, histogram: GramHistogram, weights: Tensor) -> Tensor:
        """(), nats."""
        return histogram.divergence(weights, self._compared, self._shares)


# ---- features ------------------------------------------------------------------------------------


class _FeatureMatch:
    """Match of the distributions of features, sorted into clusters."""

    def __init__(self, material: Material, clusters: int):
        compared, human, plain = _halves(material)
        first = material.plain.texts[: len(compared)]
        made_of = [text for text in [*compared.texts, *first] if text]
        if not made_of:
            raise ConfigError("the material of a match has no text in it: its continuations are all empty")
        self._features = material.features
        self._clusters = Clusters.of(self._features(made_of), max(2, min(clusters, len(made_of) // 4)))
        ones = torch.ones(len(compared), dtype=torch.float64)
        self._theirs = smoothed(self._shares(self._bins(compared.texts), ones), len(compared))
        of_human, of_plain = self._bins(human.texts), self._bins(plain.texts)
        self._ruler = Ruler(
            lambda weights: self._divergence(of_human, weights),
            lambda weights: self._divergence(of_plain, weights),
            len(human),
        )
        self.unsureness = self._ruler.at(max(1, len(human) // 2)).unsureness

    def nearness(self, samples: Samples) -> Measure:
        bins, ends = self._bins(samples.texts), self._ruler.at(len(samples))
        return lambda weights: ends.nearness(self._divergence(bins, weights))

    def _bins(self, texts: Sequence[str]) -> Tensor:
        """(N,): the cluster of each text; the last for empty ones, and those that are like no other."""
        found = torch.full((len(texts),), len(self._clusters))
        written = [place for place, text in enumerate(texts) if text]
        if written:
            found[written] = self._clusters.assign(self._features([texts[place] for place in written]))
        return found

    def _shares(self, bins: Tensor, weights: Tensor) -> Tensor:
        """(K + 1,), they add up to 1."""
        return weights.new_zeros(len(self._clusters) + 1).index_add(0, bins, weights / weights.sum())

    def _divergence(self, bins: Tensor, weights: Tensor) -> Tensor:
        """(): 1 less the area, 0 to 1. As many texts count as have any weight."""
        shares = smoothed(self._shares(bins, weights), int((weights > 0).sum()))
        return 1 - frontier_area(shares, self._theirs)
