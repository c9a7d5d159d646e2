"""Orthogonal subspace fine-tuning: the strongest directions of each matrix stay, the others learn."""

# O outputs, I inputs, K kept directions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.continual.methods.method import AnyStream, Backward, Contract, Method, Situation


@dataclass
class OrthogonalSubspace(Method):
    """Before each task a matrix is split by its singular values; what the task changes is orthogonal, on both
    sides, to the strongest of its directions (Nayak et al. 2025, https://arxiv.org/abs/2504.07097).

    More directions are kept with each task, the same share in every layer (the paper ranks layers by how
    much they matter). Matrices alone train, embeddings among them. The gradient is projected, and what the
    optimizer made of it as well, so that the kept part stays up to rounding.
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, rewrites_weights=True, grows=False)

    keep: Annotated[float, Gt(0), Lt(1)] | None = None
    """Share of the directions that is kept; by default it rises with each task: k / (n + 1) in the k-th of n
    tasks."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.dim() == 2)
        return model

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._count = len(situation.stream.stages)
        self._begun: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}  # (O, K), columns orthonormal
        self._right: dict[str, Tensor] = {}  # (I, K)

    @torch.no_grad()
    def begin_stage(self, stage: int) -> None:
        share = self.keep or (stage + 1) / (self._count + 1)
        for name, parameter in self._matrices().items():
            weight = parameter.detach().cpu().double()
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            kept = max(1, round(share * min(weight.shape)))
            self._begun[name] = parameter.detach().clone()
            self._left[name] = u[:, :kept].to(parameter).contiguous()
            self._right[name] = vh[:kept].T.to(parameter).contiguous()

    @torch.no_grad()
    def gradients(self, backward: Backward) -> float:
        for name, parameter in self._matrices().items():
            if parameter.grad is not None and name in self._left:
                parameter.grad.copy_(self._projected(name, parameter.grad))
        return 0.0

    @torch.no_grad()
    def stepped(self) -> None:
        for name, parameter in self._matrices().items():
            begun = self._begun.get(name)
            if begun is not None:
                parameter.copy_(begun + self._projected(name, parameter - begun))

    def _projected(self, name: str, change: Tensor) -> Tensor:
        """(1 - U U^T) change (1 - V V^T), (O, I)."""
        left, right = self._left[name], self._right[name]
        change = change - left @ (left.T @ change)
        return change - (change @ right) @ right.T

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        self._begun, self._left, self._right = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun, "left": self._left, "right": self._right}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.situation.device
        self._begun, self._left, self._right = (
            {name: value.to(device) for name, value in state[which].items()}
            for which in ("begun", "left", "right")
        )

    def _matrices(self) -> dict[str, nn.Parameter]:
        return self.situation.parameters()
