"""How like a corpus: a persona, by the short runs of bytes that it is made of.

The log-likelihood ratio per byte of two n-gram models of bytes, of the corpus and of text in general: what is
ordinary in any text cancels.
"""

# N texts

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cambia.data.textfiles import entries, list_files, read_text
from cambia.decoding.rewards.grams import padded
from cambia.decoding.rewards.reward import Material, Reward, Samples, Score, mean_of, unfitted
from cambia.errors import ConfigError, DataError
from cambia.models.routing.token_grams import GramKeys, TokenGrams

_ORDER = 5
_MOST_CHARACTERS = 2_000_000
_HELD_OUT = 10
"""Every tenth piece of the corpus says what its own text scores."""


@dataclass
class StyleReward(Reward):
    """Likeness to a corpus: 1 like text of the corpus that was held out, 0 like what people write in general.

    It rises above 1 for what is more typical than the corpus itself; add a match to keep it text.
    """

    corpus: str
    """A text file or a folder of them: how the texts shall sound."""

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ConfigError("a style reward needs `corpus`: a text file, or a folder of them")
        self._models: tuple[TokenGrams, TokenGrams] | None = None
        self._own, self._gap = 0.0, 1.0  # nats per byte: of the corpus, and more than in general

    def begin(self, material: Material) -> None:
        """Count the runs of the corpus and of the material.

        Raises:
            DataError: there is no such corpus, or too little text in it.
            ConfigError: it is not to be told from the material.
        """
        general = list(material.human.texts)
        size = max(16, sum(map(len, general)) // len(general))
        pieces = self._pieces(size)
        if len(pieces) < 2 * _HELD_OUT:
            raise DataError(
                f"the corpus {self.corpus!r} has {len(pieces)} pieces of {size} characters; expected at "
                f"least {2 * _HELD_OUT}: give more text"
            )
        half = max(1, len(general) // 2)
        learned = [piece for place, piece in enumerate(pieces) if place % _HELD_OUT]
        self._models = (_counted(learned), _counted(general[:half]))
        own, other = self._ratios(pieces[::_HELD_OUT]), self._ratios(general[half:] or general)
        self._own, self._gap = own.mean().item(), (own.mean() - other.mean()).item()
        if self._gap <= 2 * own.std(correction=0).item() / math.sqrt(len(own)):
            raise ConfigError(
                f"the corpus {self.corpus!r} cannot be told from what people write in the material, by runs "
                f"of up to {_ORDER} bytes: leave the style reward out, or give text of another style"
            )

    def measure(self, samples: Samples) -> Score:
        return mean_of(1 + (self._ratios(samples.texts) - self._own) / self._gap)

    def _pieces(self, size: int) -> list[str]:
        texts = (entries(read_text(file), size) for _, file in list_files(self.corpus))
        most = max(2 * _HELD_OUT, _MOST_CHARACTERS // size)
        return list(itertools.islice(itertools.chain.from_iterable(texts), most))

    def _ratios(self, texts: Sequence[str]) -> Tensor:
        """(N,) float64, nats per byte by which the corpus foretells a text better; 0 for an empty one."""
        if self._models is None:
            raise unfitted(self)
        ids, lengths = padded([text.encode() for text in texts])
        found = GramKeys.of(ids, lengths, order=_ORDER)
        own, other = (model.token_losses(found).sum(1) for model in self._models)
        return torch.from_numpy(other - own) / lengths.clamp_min(1)


def _counted(texts: Sequence[str]) -> TokenGrams:
    model = TokenGrams(256, order=_ORDER)
    model.observe(*padded([text.encode() for text in texts]))
    model.seal()
    return model
