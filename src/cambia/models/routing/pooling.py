"""How much each kind of evidence counts, where two Parts both claim a prefix.

Each kind is a log likelihood: of a Part's n-grams, of its distribution of features, of the Part itself. Taken
together at face value they would say the same thing several times. How often they do is seen when a Part is
born: on held-out rows of its domain, by how much does each kind speak for it and against the Parts that are
nearest? Logistic regression on these margins gives the weights, that is, the linear combination which is a
calibrated log odds (Brümmer and du Preez 2006, Application-independent evaluation of speaker detection); few
numbers, few rows and a convex loss, so Newton's method ends within some steps.
"""

# M margins, S kinds of evidence

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 25
_PULL = 0.1
"""Of the regression towards zero, where kinds of evidence have the size 1."""


def pooled_weights(margins: Tensor) -> Tensor:
    """(M, S) by how much each kind speaks for the right Part -> (S,), none of them negative.

    The regression is pulled a little towards zero, so that margins which all speak for the right one, as far
    domains' do, give finite weights. A kind that speaks against is left out.
    """
    weights = torch.zeros(margins.shape[1], dtype=torch.float64)
    scale = margins.square().mean(0).sqrt()
    kinds = [i for i, size in enumerate(scale.tolist()) if size > 0]
    while kinds:
        found = _newton(margins[:, kinds] / scale[kinds])
        if bool((found >= 0).all()):
            weights[kinds] = found / scale[kinds]
            break
        kinds.pop(int(found.argmin()))
    return weights


def _newton(x: Tensor) -> Tensor:
    """The w of least sum log(1 + exp(-x w)) + pull |w|^2 / 2: (M, S) -> (S,)."""
    pull = _PULL * torch.eye(x.shape[1], dtype=torch.float64)
    w = torch.zeros(x.shape[1], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-x @ w).sum() + w @ pull @ w / 2

    for _ in range(_STEPS):
        wrong = torch.sigmoid(-x @ w)
        gradient = pull @ w - x.T @ wrong
        step = torch.linalg.solve(x.T @ (x * (wrong * (1 - wrong))[:, None]) + pull, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
    return w
