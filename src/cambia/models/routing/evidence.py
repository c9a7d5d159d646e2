"""What speaks for a Part, and what is strange to it, in some prefixes.

Three log likelihoods speak for a Part: of its n-grams and of the Part itself, in nats per token, and of its
distribution of features, in nats. Three numbers say how strange a prefix is to it: how badly its n-grams
foretell it, the same against the base, since a text may be hard in itself, and how badly the Part does
against the base.

Each is worked out when it is first asked for. The Part itself costs a forward pass of the model and is asked
last, for the rows that need it.
"""

# B prefixes, S kinds of evidence

from __future__ import annotations

import torch
from torch import Tensor

from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.token_grams import GramKeys, TokenGrams

NUM_CHEAP = 2
"""Kinds of strangeness that need no pass of a Part; they come first."""


class Evidence:
    """What some prefixes say.

    Args:
        prefixes: of at least two tokens each.
    """

    def __init__(self, prefixes: Prefixes):
        self.prefixes = prefixes
        self.passes = 0
        """Rows that Parts have read."""
        self._keys: GramKeys | None = None
        self._counts = (prefixes.lengths - 1).clamp_min(1)

    def grams(self, grams: TokenGrams) -> Tensor:
        """(B,) float64: the log likelihood of a token by n-grams."""
        if self._keys is None or len(self._keys.keys) < grams.order:
            self._keys = GramKeys.of(self.prefixes.input_ids, self.prefixes.lengths, order=grams.order)
        losses = torch.from_numpy(grams.token_losses(self._keys))[:, 1:].sum(1)
        return -losses / self._counts

    def features(self, gaussian: FeatureGaussian) -> Tensor:
        """(B,) float64: the log likelihood of the prefix's features."""
        return gaussian.log_density(self.prefixes.features())

    def own(self, answers: str | None, rows: Tensor | None = None) -> Tensor:
        """(R,) float64: the log likelihood of a token by the Part that answers, for some rows or all."""
        if answers is not None:
            self.passes += len(self.prefixes) if rows is None else len(rows)
        return -self.prefixes.losses(answers, rows)

    def strangeness(self, grams: Tensor, own: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(R, 2), or (R, 3) with `own`: how strange rows are to the Part of which these likelihoods are.

        Args:
            grams: (R,).
            own: (R,).
            rows: which of the prefixes these are; all by default.
        """
        base = self.prefixes.losses(None)
        base = base if rows is None else base[rows]
        kinds = [-grams, -grams - base, *([] if own is None else [-own - base])]
        return torch.stack(kinds, 1)
