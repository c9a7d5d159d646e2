"""The feed-forward module grows by itself."""

from __future__ import annotations

import pytest
import torch

from cambia.errors import ConfigError
from cambia.nn.ffn import ExpandableFFN


@pytest.mark.parametrize("bias", [False, True])
def test_widening_keeps_the_outputs_and_new_units_learn(bias):
    torch.manual_seed(0)
    ffn = ExpandableFFN(6, 10, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    before = ffn(x)
    maps = ffn.widen(5, seed=3)
    assert torch.allclose(ffn(x), before, rtol=1e-12, atol=1e-14)
    assert (ffn.intermediate_size, ffn.gate_proj.out_features, ffn.down_proj.in_features) == (15, 15, 15)
    assert set(maps) == {name for name, _ in ffn.named_parameters() if name != "down_proj.bias"}
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (ffn(x) - 1).square().sum().backward()
        optimizer.step()
    assert (ffn.down_proj.weight.grad[:, 10:] != 0).any(0).all()
    assert (ffn.gate_proj.weight.grad[10:] != 0).any(1).all()
    assert (ffn.up_proj.weight.grad[10:] != 0).any(1).all()


def test_nothing_to_add_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        ExpandableFFN(4, 4).widen(0)
