"""GroMo's growing layers around a Llama's gated feed-forward layer: random units that nothing reads yet.

    python -m peers.gromo_gated random CHECKPOINT GROWN --amount 43

GroMo grows a pair of layers, the first before an activation and the second behind it. A gated layer has
two layers before the activation, and a list of two is refused. What does fit: one layer with a row of the
gate and a row of `up_proj` in turn, and an activation that multiplies each pair. It is not in GroMo's
documentation, and its computed updates cannot be used then: they bring one row for a new unit where two
are needed, and the grown layers no longer fit each other.
"""

from __future__ import annotations

import warnings

import torch
from gromo.modules.linear_growing_module import LinearGrowingModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from peers.process import main


class Pairs(nn.Module):
    """(N, 2 F) -> (N, F): the SiLU of the first of each pair times the second."""

    def forward(self, pre: Tensor) -> Tensor:
        return nn.functional.silu(pre[..., 0::2]) * pre[..., 1::2]


def growing(mlp: nn.Module) -> tuple[LinearGrowingModule, LinearGrowingModule]:
    """The same layer in GroMo's modules."""
    size, width = mlp.gate_proj.weight.shape
    first = LinearGrowingModule(width, 2 * size, use_bias=False, post_layer_function=Pairs())
    second = LinearGrowingModule(size, width, use_bias=False, previous_module=first, allow_growing=True)
    pairs = torch.stack([mlp.gate_proj.weight.data, mlp.up_proj.weight.data], dim=1)  # (F, 2, C)
    first.weight = nn.Parameter(pairs.flatten(0, 1))
    second.weight = nn.Parameter(mlp.down_proj.weight.data.clone())
    return first, second


def random(model: PreTrainedModel, amount: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Grow every layer, and put it back into the Llama."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    for layer in model.model.layers:
        mlp = layer.mlp
        first, second = growing(mlp)
        second.create_layer_extensions(
            amount,
            output_extension_size=2 * amount,
            input_extension_size=amount,
            output_extension_init="copy_uniform",
            input_extension_init="zeros",
        )
        second.set_scaling_factor(1.0)
        second.apply_change(extension_size=2 * amount)
        second.delete_update()
        pairs = first.weight.data.unflatten(0, (-1, 2))
        for name, weight in (
            ("gate_proj", pairs[:, 0]),
            ("up_proj", pairs[:, 1]),
            ("down_proj", second.weight.data),
        ):
            getattr(mlp, name).weight = nn.Parameter(weight.contiguous())
    model.config.intermediate_size += amount


if __name__ == "__main__":
    main(__doc__ or "", {"random": random})
