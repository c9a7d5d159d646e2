"""A tiny head that sets temperature and top-p for each token, by what the model makes of the text so far."""

# B rows, T time, D hidden size

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOST = 1.5
"""By how much a logarithm or logit may be moved, either way."""


class ContextHead(nn.Module):
    """Moves the logarithm of the temperature and the logit of top-p by a linear function of the model's last
    hidden state, through tanh. Zero at the start: then both are what they are for all tokens.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, hidden: Tensor, temperature: float | Tensor, top_p: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Temperature and top-p of each token.

        Args:
            hidden: (..., D), scaled to unit variance here, whatever the model's norm does.
            temperature: of all tokens; above 0.
            top_p: of all tokens; below 1, since from 1 nothing can move it.

        Returns:
            (...,) each.
        """
        states = torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
        weight, bias = self.linear.weight.to(states.device), self.linear.bias.to(states.device)
        moved = _MOST * torch.tanh(torch.nn.functional.linear(states, weight, bias))
        start = torch.as_tensor(top_p, dtype=moved.dtype, device=moved.device)
        warmth = temperature * moved[..., 0].exp()
        return warmth, torch.sigmoid(torch.logit(start, 1e-4) + moved[..., 1])
