"""The feed-forward part of a layer, the dimension that grows first.

A gated linear unit (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202):
``down_proj(silu(gate_proj(x)) * up_proj(x))``. Its width, `intermediate_size`, is what growing lengthens:
the rows of `gate_proj` and `up_proj` make the units, the columns of `down_proj` read them.

    >>> ffn = ExpandableFFN(hidden_size=256, intermediate_size=768)
    >>> ffn(x).shape == x.shape                                          # (B, T, C) -> (B, T, C)
    >>> ffn.widen(128)                                                   # the same outputs, 128 units more
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cambia.errors import ConfigError
from cambia.nn.fused import swiglu
from cambia.nn.param_map import AxisMap, Fill, TensorMap

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

    def resize(self, intermediate_size: int) -> None:
        """Another width, with weights that hold nothing: for planning on the meta device."""
        hidden = self.hidden_size
        for maker in (self.gate_proj, self.up_proj):
            maker.weight = nn.Parameter(maker.weight.new_empty(intermediate_size, hidden))
            if maker.bias is not None:
                maker.bias = nn.Parameter(maker.bias.new_empty(intermediate_size))
        self.down_proj.weight = nn.Parameter(self.down_proj.weight.new_empty(hidden, intermediate_size))
        self._set_width(intermediate_size)

    def _set_width(self, intermediate_size: int) -> None:
        self.intermediate_size = intermediate_size
        self.gate_proj.out_features = self.up_proj.out_features = intermediate_size
        self.down_proj.in_features = intermediate_size

    @torch.no_grad()
    def widen(self, add: int, *, seed: int = 0) -> dict[str, TensorMap]:
        """Grow by `add` units in place: new ones are random readers that nothing reads yet, so outputs stay.

        This grows one module that stands alone. A whole model, with its config and optimizer, grows by
        `cambia.growth.grow`.

        Returns:
            For each parameter, by its name in this module, where its entries come from.

        Raises:
            ConfigError: `add` is below 1.
        """
        if add < 1:
            raise ConfigError(f"add={add} does not widen anything; it must be at least 1")
        axis = AxisMap.lengthened(self.intermediate_size, self.intermediate_size + add)
        reader = Fill.normal(self.hidden_size**-0.5)
        maps = {"down_proj.weight": TensorMap("down_proj.weight", {1: axis})}
        for name in ("gate_proj", "up_proj"):
            maps[f"{name}.weight"] = TensorMap(f"{name}.weight", {0: axis}, fill=reader)
            if self.get_submodule(name).bias is not None:
                maps[f"{name}.bias"] = TensorMap(f"{name}.bias", {0: axis})
        for number, (name, tensor_map) in enumerate(sorted(maps.items())):
            module, _, attribute = name.partition(".")
            old = self.get_parameter(name)
            new = nn.Parameter(tensor_map.values(old, seed=seed + number), requires_grad=old.requires_grad)
            setattr(self.get_submodule(module), attribute, new)
        self._set_width(self.intermediate_size + add)
        return maps
