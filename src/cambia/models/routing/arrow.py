"""Arrow: which low-rank additions a token goes through, told by their own weights (training-free).

Of the addition B A to a layer, the right singular vector of the largest singular value is the input that it
changes most. A token's score for a Part is how far its input lies along that direction, whichever way it
points; a softmax over the k best gives the weights, for each layer and each token anew (Ostapenko et al.
2024, Towards Modular LLMs by Building and Reusing a Library of LoRAs, https://arxiv.org/abs/2405.11157).

    >>> arrow = ArrowRouter(top_k=2)
    >>> arrow.add("sql", {"model.layers.0.mlp.up_proj": (A, B)})
    >>> arrow.weights("model.layers.0.mlp.up_proj", x)          # (B, T, E) for inputs (B, T, I)

Directions of one Part never change when another comes, but the softmax runs over all: tokens of old text may
go elsewhere.
"""

# B batch (rows), T time, E Parts, I a layer's inputs, O its outputs, R rank

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor

from cambia.errors import ConfigError


def top_direction(A: Tensor, B: Tensor) -> Tensor:
    """The right singular vector of B A with the largest singular value: (R, I) and (O, R) -> (I,), unit.

    B A itself, (O, I), is never made: with A^T = Q S and B = U T, its right singular vectors are those of
    the small T S^T, turned by Q. Zeros where B A is zero, as at a Part's birth. Its sign means nothing.
    """
    Q, S = torch.linalg.qr(A.double().T)  # (I, R), (R, R)
    T = torch.linalg.qr(B.double()).R  # (R, R)
    _, values, right = torch.linalg.svd(T @ S.T)
    found = Q @ right[0]
    return (found if values[0] > 0 else torch.zeros_like(found)).float()


@dataclass
class ArrowRouter:
    """Weights per token and layer from the directions of the Parts."""

    top_k: Annotated[int, Gt(0)] = 1
    """Parts that a token goes through; all of them while there are fewer."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of the softmax: larger ones make the weights more even."""
    directions: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """By layer and Part, (I,)."""

    def add(self, name: str, layers: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take in a Part by the A (R, I) and B (O, R) of each of its layers.

        Raises:
            ConfigError: the name is taken.
        """
        if any(name in known for known in self.directions.values()):
            raise ConfigError(f"Arrow knows a Part {name!r} already: a changed one needs a name of its own")
        for layer, (A, B) in layers.items():
            self.directions.setdefault(layer, {})[name] = top_direction(A.detach(), B.detach())

    def names(self, layer: str) -> list[str]:
        """The Parts at a layer, in the order of the weights."""
        return list(self.directions[layer])

    def weights(self, layer: str, x: Tensor) -> Tensor:
        """(..., I) -> (..., E) float32: at most `top_k` are not zero, and they sum to 1."""
        directions = torch.stack(list(self.directions[layer].values())).to(x.device)  # (E, I)
        scores = (x.float() @ directions.T).abs()
        best = scores.topk(min(self.top_k, len(directions)), dim=-1)
        shares = torch.softmax(best.values / self.temperature, -1)
        return torch.zeros_like(scores).scatter(-1, best.indices, shares)

    def state_dict(self) -> dict[str, Any]:
        return {"directions": {layer: dict(known) for layer, known in self.directions.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.directions = {layer: dict(known) for layer, known in state["directions"].items()}
