"""What is known of a domain's text, so that more of it is recognised: counts and sums, not the text.

A domain is one with the Part that learned it. While that one learns, its counts grow and some of its rows are
held back from them: only with those can it be said how strange a row may be and still be of this domain. When
it is sealed the rows are let go of and the counts stay as they are.
"""

# N rows, T time, D features

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cambia.continual.novelty.scores import Readings
from cambia.data.batches import Batch
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.router import Router
from cambia.models.routing.token_grams import GramKeys, TokenGrams


@dataclass(frozen=True, eq=False)
class ReadRows:
    """Rows of text, and what the frozen base makes of them."""

    input_ids: Tensor
    """(N, T)."""
    targets: Tensor
    """(N, T)."""
    losses: Tensor
    """(N,) float64, nats per token that the base gives each row."""
    features: Tensor
    """(N, D) float32, the mean over its tokens of one hidden layer of the base."""
    num_bytes: float = 0.0

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: Sequence[int]) -> ReadRows:
        """Some of them."""
        chosen = list(rows)
        return ReadRows(
            self.input_ids[chosen],
            self.targets[chosen],
            self.losses[chosen],
            self.features[chosen],
            self.num_bytes * len(chosen) / max(1, len(self)),
        )

    def and_then(self, other: ReadRows) -> ReadRows:
        """These, and others behind them."""
        return ReadRows(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.targets, other.targets]),
            torch.cat([self.losses, other.losses]),
            torch.cat([self.features, other.features]),
            self.num_bytes + other.num_bytes,
        )

    def batch(self, source: str) -> Batch:
        """The same as a batch that comes out of memory."""
        return Batch(self.input_ids, self.targets, round(self.num_bytes), source, fresh=False)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def none(cls, sequence_length: int, dimensions: int) -> ReadRows:
        """No rows."""
        ids = torch.zeros(0, sequence_length, dtype=torch.int64)
        return cls(ids, ids.clone(), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dimensions))


class Domain:
    """What is known of one domain's text.

    Args:
        name: of the Part that answers it.
        vocab_size: how many tokens there are.
        dimensions: D.
    """

    def __init__(self, name: str, vocab_size: int, dimensions: int):
        self.name = name
        self.answers: str | None = name
        """The Part that answers this domain; None: the base, which another Part would not better."""
        self.grams = TokenGrams(vocab_size)
        self.gaussian = FeatureGaussian(dimensions)
        self.rows = 0
        """Rows counted."""
        self._read: tuple[TokenGrams, FeatureGaussian] | None = None

    def observe(self, rows: ReadRows) -> None:
        """Count rows; `refresh` makes them show."""
        if len(rows):
            self.grams.observe(rows.input_ids)
            self.gaussian.observe(rows.features)
            self.rows += len(rows)

    def refresh(self) -> None:
        """Work out the densities from all that was counted so far."""
        self._read = copy.deepcopy(self.grams), copy.deepcopy(self.gaussian)
        for density in self._read:
            density.seal()

    def seal(self) -> None:
        """Nothing is counted any more."""
        self.grams.seal()
        self.gaussian.seal()
        self._read = self.grams, self.gaussian

    @property
    def order(self) -> int:
        """Of its n-grams."""
        return self.grams.order

    def losses(self, keys: GramKeys) -> Tensor:
        """(N,) float64, nats per token that its n-grams give rows, from the second token on."""
        return torch.from_numpy(self._densities[0].token_losses(keys))[:, 1:].mean(1)

    def densities(self, features: Tensor) -> Tensor:
        """(N,) log density of features."""
        return self._densities[1].log_density(features)

    def cosines(self, features: Tensor) -> Tensor:
        """(N,) cosine between features and their mean here."""
        mean = self._densities[1].mean[None]
        return torch.nn.functional.cosine_similarity(features.double(), mean, dim=1)

    @property
    def _densities(self) -> tuple[TokenGrams, FeatureGaussian]:
        assert self._read is not None, "refresh() first"
        return self._read

    @property
    def densities_so_far(self) -> tuple[TokenGrams, FeatureGaussian]:
        """Its n-grams and its features, worked out when it was refreshed last."""
        return self._densities

    def state_dict(self, *, kept_elsewhere: bool = False) -> dict[str, Any]:
        """What must survive a restart.

        Args:
            kept_elsewhere: leave out the tables of a sealed one, since a router keeps the same.
        """
        state = {"name": self.name, "answers": self.answers, "rows": self.rows}
        if kept_elsewhere:
            return {**state, "grams": None, "dimensions": len(self.gaussian.mean)}
        read = None if self._read is None else [density.state_dict() for density in self._read]
        return {
            **state,
            "grams": self.grams.state_dict(),
            "gaussian": self.gaussian.state_dict(),
            "read": None if self.grams.is_sealed else read,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], vocab_size: int, kept: Router) -> Domain:
        """The inverse of `state_dict`.

        Args:
            kept: who keeps what was left out.
        """
        if state["grams"] is None:
            domain, known = cls(state["name"], vocab_size, state["dimensions"]), kept.domains[state["name"]]
            domain.answers, domain.rows = state["answers"], state["rows"]
            domain._read = domain.grams, domain.gaussian = known.grams, known.gaussian
            return domain
        domain = cls(state["name"], vocab_size, len(state["gaussian"]["mean"]))
        domain.answers, domain.rows = state["answers"], state["rows"]
        domain.grams.load_state_dict(state["grams"])
        domain.gaussian.load_state_dict(state["gaussian"])
        if domain.grams.is_sealed:
            domain._read = domain.grams, domain.gaussian
        elif state["read"] is not None:
            domain._read = TokenGrams(vocab_size), FeatureGaussian(len(domain.gaussian.mean))
            for density, saved in zip(domain._read, state["read"], strict=True):
                density.load_state_dict(saved)
        return domain


def read_by(domains: Sequence[Domain], rows: ReadRows, background: FeatureGaussian) -> Readings:
    """What domains say of rows."""
    keys = GramKeys.of(rows.input_ids, order=max((domain.order for domain in domains), default=1))

    def each(values: list[Tensor]) -> Tensor:
        return torch.stack(values, 1) if values else torch.zeros(len(rows), 0, dtype=torch.float64)

    return Readings(
        domains=tuple(domain.name for domain in domains),
        losses=each([domain.losses(keys) for domain in domains]),
        base_losses=rows.losses,
        densities=each([domain.densities(rows.features) for domain in domains]),
        background=background.log_density(rows.features),
        cosines=each([domain.cosines(rows.features) for domain in domains]),
    )
