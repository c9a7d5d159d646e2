"""Averaged gradient episodic memory: a step may not make the memory's loss rise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from cambia.continual.methods.method import AnyStream, Backward, Contract, Method, Situation
from cambia.data.batches import Batch
from cambia.data.replay import ReplayBuffer


@dataclass
class AGem(Method):
    """A-GEM (Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420).

    Where the gradient of the batch points against that of rows from memory, its part in that direction is
    taken out. The projection holds for the gradient; what an optimizer with a memory of its own makes of it
    is another matter.
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, stores_text=True, chooses_rows=True)

    capacity: Annotated[int, Gt(0)] = 2000
    """Sequences kept."""
    rows: Annotated[int, Gt(0)] = 16
    """Rows of memory whose gradient is compared."""

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self.buffer = ReplayBuffer(self.capacity, seed=situation.seed, quota=True)
        self._stage = 0

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        batch = stream.next_batch(stage, at=at)
        self.buffer.add(batch, stage)
        self._stage = stage
        return batch

    @torch.no_grad()
    def gradients(self, backward: Backward) -> float:
        old = self.buffer.sample(self.rows, exclude_tag=self._stage)
        if old is None:
            return 0.0
        trained = [p for p in self.situation.parameters().values() if p.grad is not None]
        new = [_taken(p) for p in trained]
        backward(old)
        self.extra_tokens += old.input_ids.numel()
        reference = [
            torch.zeros_like(g) if p.grad is None else _taken(p) for p, g in zip(trained, new, strict=True)
        ]
        along = sum(torch.vdot(g.flatten(), r.flatten()) for g, r in zip(new, reference, strict=True))
        squared = sum(torch.vdot(r.flatten(), r.flatten()) for r in reference)
        if along < 0:
            torch._foreach_sub_(new, torch._foreach_mul(reference, along / squared))
        for parameter, gradient in zip(trained, new, strict=True):
            parameter.grad = gradient
        return 0.0

    @property
    def replay_bytes(self) -> int:
        return self.buffer.num_bytes

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "stage": self._stage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self._stage = state["stage"]


def _taken(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's gradient, which it then has no more."""
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = None
    return gradient
