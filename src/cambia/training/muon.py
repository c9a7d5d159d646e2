"""Muon: momentum whose matrices are made orthogonal before the step, with AdamW for everything else.

The update of a weight matrix is its momentum with all singular values brought near one, so that rare
directions move as far as common ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
Scaled by 0.2 sqrt(max(m, n)) its entries are as large as AdamW's, and one learning rate and one weight
decay serve both (Liu et al. 2025, arXiv:2502.16982).

torch.optim.Muon takes matrices alone, and works in bfloat16, which is slow without a GPU. This is one
optimizer of all parameters, so schedules, checkpoints and growth see one list of groups and one state per
parameter; it grows without knowing that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: five rounds bring singular values from 0.002 to 1 into 0.7 to 1.2."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``orthogonal=True``, whose parameters are matrices, and AdamW for the others.

    Args:
        groups: parameter groups; each says ``orthogonal``, and may say any of the other settings.
        lr: learning rate of both.
        momentum: share of the momentum that is kept each step.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, of both.
        rounds: Newton-Schulz rounds.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rounds: int = 5,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounds": rounds,
            "orthogonal": False,
            "decoupled_weight_decay": True,  # torch's own name, by which others know how to undo it
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if group["orthogonal"] and p.dim() != 2:
                    raise ValueError(f"a parameter of shape {tuple(p.shape)} cannot be made orthogonal")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in trained]
            if group["orthogonal"]:
                for p, grad in zip(trained, grads, strict=True):
                    self._muon(p, grad, group)
            elif trained:
                self._adamw(trained, grads, group)
        return loss

    def _muon(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        direction = orthogonal(grad.lerp(momentum, group["momentum"]), group["rounds"])  # Nesterov
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _adamw(self, trained: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p in trained:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in trained]
        adamw(
            trained,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of this one and singular values near one.

    (m, n) -> (m, n); by Newton-Schulz iteration of odd polynomials, which needs products alone.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    if x.is_cuda:
        x = x.bfloat16()  # the rounds forgive its rounding
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
