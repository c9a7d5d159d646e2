"""A trained router: mixes all Parts while the one in question is young, and delegates once it is mature.

DyLoRA-MoE's hybrid router. A linear gate reads features of the frozen base, so what it reads never drifts. A
row that belongs most to an immature Part gets a softmax over all Parts (dense collaboration), a row of a
mature one the k best alone (sparse delegation); so one newcomer makes nobody else's rows dense. What is
mature is measured (`Maturity`). So that a gate trained on new text still knows the old, each batch also holds
features drawn from the distribution of every older Part (pseudo-rehearsal, Robins 1995, from statistics in
the place of text).

    >>> router = DynamicHybridRouter(dimensions=128, top_k=1)
    >>> router.add_expert("sql", gaussian)                        # its features' sealed distribution
    >>> router.fit(steps=200)
    >>> router.weights(features)                                  # (B, E), or (B, T, E) for (B, T, D)

Trained by gradient it forgets a little of whose a text is with each Part that comes; `Router` does not.
"""

# B batch (rows), T time, D features, E Parts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn

from cambia.errors import ConfigError
from cambia.models.routing.gaussians import FeatureGaussian


@dataclass(frozen=True)
class Maturity:
    """When a Part has learned what it can: its validation loss no longer falls."""

    window: Annotated[int, Ge(2)] = 4
    """Measurements, evenly spaced, through which the slope is laid."""
    slope: Annotated[float, Ge(0)] = 0.005
    """Mature once the loss falls by less than this share of itself from one measurement to the next."""

    def reached(self, losses: Sequence[float]) -> bool:
        """Whether these validation losses, oldest first, say so."""
        recent = np.asarray(losses[-self.window :], dtype=np.float64)
        if len(recent) < self.window:
            return False
        return bool(_fall(recent) < self.slope * recent.mean())

    def progress(self, losses: Sequence[float]) -> float:
        """How far these validation losses are on the way there: 1 where `reached`, else the smaller of two
        shares, of the measurements that it takes and of the steepness that is left to lose."""
        if self.reached(losses):
            return 1.0
        recent = np.asarray(losses[-self.window :], dtype=np.float64)
        if len(recent) < 2:
            return 0.0
        falls, least = _fall(recent), self.slope * float(recent.mean())
        return min(len(recent) / self.window, least / falls if falls > least else 1.0)


def _fall(losses: np.ndarray) -> float:
    """By how much they fall from one to the next, along a straight line through them."""
    return -float(np.polyfit(np.arange(len(losses)), losses, 1)[0])


@dataclass(eq=False)
class _Known:
    """What the router holds of a Part beside its row of the gate."""

    name: str
    gaussian: FeatureGaussian
    losses: list[float] = field(default_factory=list)
    is_mature: bool = False


class DynamicHybridRouter:
    """Weights of the Parts for each sequence or token, from features of the frozen base.

    Args:
        dimensions: D.
        top_k: Parts that a row of a mature Part goes to.
        temperature: of the softmax; larger ones mix more evenly.
        maturity: when a Part counts as mature.
        balance: how much the mean weight of each Part is pulled to 1 / E. Batches hold as many rows of each,
            so this does not work against specialists.
        learning_rate: of its own optimizer (AdamW).
        seed: of the features that it draws.
    """

    gate: nn.Parameter
    """(E, D + 1): a row for each Part, its bias last."""
    center: Tensor
    """(D,): what is taken off features before the gate reads them."""
    scale: Tensor
    """(D,): by what they are divided then."""

    def __init__(
        self,
        dimensions: int,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        maturity: Maturity | None = None,
        balance: float = 0.15,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ):
        if dimensions < 1 or top_k < 1 or temperature <= 0 or balance < 0 or learning_rate <= 0:
            raise ConfigError(
                f"a router of {dimensions} dimensions with top_k {top_k}, temperature {temperature}, balance "
                f"{balance} and learning_rate {learning_rate}: expected numbers above 0 (balance may be 0)"
            )
        self.top_k, self.temperature, self.balance = top_k, temperature, balance
        self.maturity = maturity or Maturity()
        self.learning_rate = learning_rate
        self.center = torch.zeros(dimensions)
        self.scale = torch.ones(dimensions)
        self.gate = nn.Parameter(torch.zeros(0, dimensions + 1))
        self._known: dict[str, _Known] = {}
        self._optimizer = self._new_optimizer()
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def names(self) -> list[str]:
        """The Parts, in the order of the weights."""
        return list(self._known)

    def add_expert(self, name: str, gaussian: FeatureGaussian) -> None:
        """A row of zeros for a new Part; those of the others, and what the optimizer knows of them, stay.

        Args:
            name: the Part's id.
            gaussian: the sealed distribution of its text's features; it stands for the text from now on.
                The first Part's also says, for good, in what units features are read.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._known:
            raise ConfigError(f"the router has a Part {name!r} already: another version needs another name")
        if not self._known:
            self.center = gaussian.mean.float()
            self.scale = gaussian.covariance().diagonal().sqrt().float()
        self._known[name] = _Known(name, gaussian)
        moments = dict(self._optimizer.state[self.gate])
        self.gate = nn.Parameter(_lengthened(self.gate.detach()))
        self._optimizer = self._new_optimizer()
        if moments:
            longer = {key: _lengthened(value) if value.dim() else value for key, value in moments.items()}
            self._optimizer.state[self.gate].update(longer)

    def observe_loss(self, name: str, loss: float) -> bool:
        """Take in a Part's validation loss; whether it is mature now. What was mature once stays so."""
        known = self._part(name)
        known.losses.append(loss)
        known.is_mature = known.is_mature or self.maturity.reached(known.losses)
        return known.is_mature

    def settle(self, name: str) -> None:
        """A Part counts as mature from now on, for example since it is sealed."""
        self._part(name).is_mature = True

    def is_mature(self, name: str) -> bool:
        """Whether a Part's validation loss has stopped to fall."""
        return self._part(name).is_mature

    def logits(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        if not self._known:
            raise ConfigError("the router has no Parts yet: add_expert(name, gaussian) first")
        center, scale, gate = (tensor.to(features.device) for tensor in (self.center, self.scale, self.gate))
        return (features.float() - center) / scale @ gate[:, :-1].T + gate[:, -1]

    def weights(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., E), which sum to 1: of sequences (B, D) or of tokens (B, T, D)."""
        logits = self.logits(features) / self.temperature
        dense = torch.softmax(logits, -1)
        best = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        sparse = torch.zeros_like(logits).scatter(-1, best.indices, torch.softmax(best.values, -1))
        mature = torch.tensor([known.is_mature for known in self._known.values()], device=logits.device)
        return torch.where(mature[best.indices[..., :1]], sparse, dense)

    @torch.enable_grad()
    def step(
        self, features: Tensor | None = None, owners: Sequence[str] = (), *, rehearsed: int = 16
    ) -> float:
        """One step of its optimizer; the loss that it lowered.

        Args:
            features: (B, D) of text at hand, or none.
            owners: (B,), the Part that each row belongs to.
            rehearsed: rows drawn from the distribution of every Part beside it.
        """
        numbers = {name: number for number, name in enumerate(self._known)}
        drawn = torch.cat([known.gaussian.draw(rehearsed, self._generator) for known in self._known.values()])
        targets = torch.arange(len(numbers)).repeat_interleave(rehearsed)
        if features is not None:
            drawn = torch.cat([drawn, features.detach().cpu()])
            targets = torch.cat([targets, torch.tensor([numbers[self._part(n).name] for n in owners])])
        if not len(targets):
            raise ConfigError("a step needs text: features of some, or rehearsed= above 0")
        logits = self.logits(drawn)
        loss = nn.functional.cross_entropy(logits, targets)
        if rehearsed:  # these rows alone hold as many of each Part
            shares = torch.softmax(logits[: len(numbers) * rehearsed], -1).mean(0)
            loss = loss + self.balance * (shares - 1 / len(numbers)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def fit(self, steps: int = 200, *, rehearsed: int = 16) -> float:
        """Learn from the distributions of all Parts alone; the last step's loss."""
        loss = 0.0
        for _ in range(steps):
            loss = self.step(rehearsed=rehearsed)
        return loss

    def _part(self, name: str) -> _Known:
        if name not in self._known:
            raise ConfigError(f"the router has no Part {name!r}; it has {', '.join(self._known) or 'none'}")
        return self._known[name]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.gate], lr=self.learning_rate, weight_decay=1e-4)

    def state_dict(self) -> dict[str, Any]:
        return {
            "gate": self.gate.detach().clone(),
            "center": self.center.clone(),
            "scale": self.scale.clone(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "parts": {
                known.name: {
                    "gaussian": known.gaussian.state_dict(),
                    "losses": list(known.losses),
                    "mature": known.is_mature,
                }
                for known in self._known.values()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._known = {}
        for name, part in state["parts"].items():
            gaussian = FeatureGaussian(len(self.center))
            gaussian.load_state_dict(part["gaussian"])
            self._known[name] = _Known(name, gaussian, list(part["losses"]), part["mature"])
        self.center, self.scale = state["center"].clone(), state["scale"].clone()
        self.gate = nn.Parameter(state["gate"].clone())
        self._optimizer = self._new_optimizer()
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


def _lengthened(rows: Tensor) -> Tensor:
    """The same rows, and one of zeros below them."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
