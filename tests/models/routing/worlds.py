"""Kinds of text that are told apart by their tokens, and Parts that know one of them."""

# B rows, P tokens

from __future__ import annotations

import torch
from torch import Tensor

from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.router import Router
from cambia.models.routing.token_grams import TokenGrams

VOCAB, KINDS = 24, 6


class World:
    """Text of kind k is drawn from some tokens, most of them its own; the Part "k" foretells it as well as
    can be, and the base all text alike."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(KINDS, VOCAB, generator=self.generator, dtype=torch.float64) ** 4 + 1e-3
        self.shares = shares / shares.sum(1, keepdim=True)

    def text(self, kind: int, rows: int, width: int = 16) -> Tensor:
        drawn = torch.multinomial(self.shares[kind], rows * width, replacement=True, generator=self.generator)
        return drawn.view(rows, width)

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Prefixes:
        return Prefixes(ids, lengths, features_of=self._features, losses_of=self._losses)

    def teach(self, router: Router, kind: int, *, sealed: bool = True) -> None:
        """Let a router know a kind of text, by the name of its number."""
        grams, gaussian, rows = TokenGrams(VOCAB, order=2), FeatureGaussian(VOCAB), self.text(kind, 150)
        grams.observe(rows)
        gaussian.observe(self._features(rows, torch.ones_like(rows)))
        grams.seal()
        gaussian.seal()
        router.add(str(kind), grams, gaussian, self.read(self.text(kind, 40)), sealed=sealed)

    def router(self, *kinds: int, **settings: object) -> Router:
        router = Router(VOCAB, **settings)  # ty: ignore[invalid-argument-type]
        for kind in kinds:
            self.teach(router, kind)
        return router

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(ids, VOCAB) * mask[..., None]
        return one_hot.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def _losses(self, name: str | None, ids: Tensor, mask: Tensor) -> Tensor:
        shares = torch.full((VOCAB,), 1 / VOCAB).double() if name is None else self.shares[int(name)]
        losses = -shares.log()[ids] * mask
        return losses[:, 1:].sum(1) / mask[:, 1:].sum(1).clamp_min(1)
