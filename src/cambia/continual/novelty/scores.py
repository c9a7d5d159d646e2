"""How strange windows of text are to known domains: a number for each window and domain, higher is stranger.

Three that are meant for use, and two that DyLoRA-MoE decided by, for comparison:

* `likelihood`: how badly the domain's own expert, or counts of its n-grams, foretell the window. Domains
  differ in what is ordinary (SQL is half as surprising as prose), which is why every score is compared with
  the domain's own held-out windows before it is compared with anything else.
* `ratio`: the same, less how badly the base foretells it: what is hard in itself, names and numbers, cancels
  (Zhang et al. 2024, Your Finetuned Large Language Model is Already a Powerful Out-of-distribution Detector,
  arXiv:2404.08679).
* `mahalanobis`: how far the window's features lie from the domain's, less how far from the background's (Ren
  et al. 2021, arXiv:2106.09022; for language models Ren et al. 2022, arXiv:2209.15558). Features are the mean
  over the window's tokens of one layer of the frozen base.
* `entropy`: how undecided a router between the domains is, of log K at most; DyLoRA-MoE grew above 0.5.
* `cosine`: less the cosine between the window's features and the domain's mean; DyLoRA-MoE grew below 0.75.

A score of one's own is a function of `Readings`.
"""

# B windows, K known domains

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cambia.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Readings:
    """What is known of some windows; a score needs only some of it."""

    domains: tuple[str, ...]
    """The known domains, in the order of the columns."""
    losses: Tensor | None = None
    """(B, K), nats per token that each domain's expert, or its n-grams, give the window."""
    base_losses: Tensor | None = None
    """(B,), nats per token that the base gives it."""
    densities: Tensor | None = None
    """(B, K), log density of the window's features under each domain's distribution."""
    background: Tensor | None = None
    """(B,), log density under the distribution of text in general."""
    cosines: Tensor | None = None
    """(B, K), cosine between the window's features and the mean of each domain's."""


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ConfigError(f"this novelty score reads {name}=, which these readings do not have")
    return value


def likelihood(readings: Readings) -> Tensor:
    """(B, K): nats per token."""
    return _given(readings.losses, "losses")


def ratio(readings: Readings) -> Tensor:
    """(B, K): nats per token more than the base's."""
    return _given(readings.losses, "losses") - _given(readings.base_losses, "base_losses")[:, None]


def mahalanobis(readings: Readings) -> Tensor:
    """(B, K): nats; half the difference of the squared distances, and the volumes, which are constant."""
    return _given(readings.background, "background")[:, None] - _given(readings.densities, "densities")


def entropy(readings: Readings) -> Tensor:
    """(B, K), the same for all domains: between 0 and 1, of the domains' probabilities given the window."""
    losses = _given(readings.losses, "losses")
    shares = torch.softmax(-losses, 1)
    found = -(shares * shares.clamp_min(1e-30).log()).sum(1) / math.log(max(2, losses.shape[1]))
    return found[:, None].expand_as(losses)


def cosine(readings: Readings) -> Tensor:
    """(B, K): between -1, the same direction, and 1."""
    return -_given(readings.cosines, "cosines")


NOVELTY_SCORES: dict[str, Callable[[Readings], Tensor]] = {
    "likelihood": likelihood,
    "ratio": ratio,
    "mahalanobis": mahalanobis,
    "entropy": entropy,
    "cosine": cosine,
}
"""By name; each gives (B, K)."""
