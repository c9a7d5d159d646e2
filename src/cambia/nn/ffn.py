"""The feed-forward part of a layer, the dimension that grows first.

A gated linear unit (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202):
``down_proj(silu(gate_proj(x)) * up_proj(x))``. Its width, `intermediate_size`, is what growing lengthens:
the rows of `gate_proj` and `up_proj` make the units, the columns of `down_proj` read them.

    >>> ffn = ExpandableFFN(hidden_size=256, intermediate_size=768)
    >>> ffn(x).shape == x.shape                                          # (B, T, C) -> (B, T, C)
"""

from __future__ import annotations

from torch import Tensor, nn

from cambia.nn.fused import swiglu

# B batch, T time, C hidden size, F ffn size (grows)


class ExpandableFFN(nn.Module):
    """SwiGLU with parameter names as in Llama: `gate_proj`, `up_proj` (F, C) and `down_proj` (C, F)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False):
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # through (B, T, F)
