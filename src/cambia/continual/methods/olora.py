"""O-LoRA: each task's adapter learns in a subspace that is orthogonal to those before it."""

# R rank, I a layer's inputs

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from cambia.continual.methods.lora import Adapting
from cambia.continual.methods.method import AnyStream, Backward, Contract, Situation


@dataclass
class OLora(Adapting):
    """An adapter for each task, all of them added up (Wang et al. 2023, https://arxiv.org/abs/2310.14152).

    ``strength  sum |A_new A_old^T|^2`` over all layers and earlier tasks is added to the loss. What is
    learned is added to the weights at the end of a task; the As are kept, to stay away from.
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, rewrites_weights=True, grows=False)

    whole: bool = False
    """Train embeddings, norm gains and biases as well, which nothing keeps orthogonal."""
    strength: Annotated[float, Ge(0)] = 0.5
    """Of the penalty; its scale follows the model's size, so it has to be tried: {0.1, 0.5, 1, 5}."""

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._past: dict[str, Tensor] = {}  # (tasks R, I) by layer: the As of earlier tasks

    def begin_stage(self, stage: int) -> None:
        self.adapter.reset(self.situation.seed + stage)
        self.forget_steps()

    def gradients(self, backward: Backward) -> float:
        if not self.strength or not self._past:
            return 0.0
        with torch.enable_grad():
            # In the order of the layers, which a checkpoint does not keep: sums are to have the same bits.
            overlaps = [
                (self.adapter.of(name).A @ self._past[name].T).square().sum() for name in self.adapter.layers
            ]
            penalty = self.strength * torch.stack(overlaps).sum()
            penalty.backward()
        return float(penalty.detach())

    @torch.no_grad()
    def end_stage(self, stream: AnyStream, stage: int) -> None:
        parameters = dict(self.situation.model.named_parameters())
        for name, weight in self.adapter.merged().items():
            parameters[name].copy_(weight)
        for name in self.adapter.layers:
            learned = self.adapter.of(name).A.detach()
            earlier = self._past.get(name, learned[:0])
            self._past[name] = torch.cat([earlier, learned])
        self.adapter.reset(self.situation.seed + stage + 1)

    def promised(self) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "past": self._past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._past = {name: value.to(self.situation.device) for name, value in state["past"].items()}
