"""What people do without a growth library: clone units, pad with zeros, `resize_token_embeddings`.

    python -m peers.by_hand net2net CHECKPOINT GROWN --amount 43

`net2net` is Net2WiderNet (Chen et al. 2016, arXiv:1511.05641): new units are clones of units drawn at
random, and what a unit wrote is divided equally among it and its clones. No noise, as in its exact form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peers.process import main


def net2net(model: PreTrainedModel, amount: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Widen every feed-forward layer by equal clones."""
    generator = torch.Generator().manual_seed(0)
    for mlp in _feed_forwards(model):
        size = mlp.gate_proj.out_features
        drawn = torch.randint(0, size, (amount,), generator=generator)
        origin = torch.cat([torch.arange(size), drawn])
        share = 1 / torch.bincount(origin, minlength=size)[origin]
        down = mlp.down_proj.weight.data[:, origin] * share
        _replace(mlp, mlp.gate_proj.weight.data[origin], mlp.up_proj.weight.data[origin], down)
    model.config.intermediate_size += amount


def zeros(model: PreTrainedModel, amount: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Widen every feed-forward layer by zeros on both sides."""
    for mlp in _feed_forwards(model):
        rows = [
            torch.cat([layer.weight.data, torch.zeros(amount, layer.in_features)])
            for layer in (mlp.gate_proj, mlp.up_proj)
        ]
        down = mlp.down_proj.weight.data
        _replace(mlp, *rows, torch.cat([down, torch.zeros(len(down), amount)], dim=1))
    model.config.intermediate_size += amount


def resize(model: PreTrainedModel, amount: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """More tokens, as transformers adds them: rows drawn around the mean of the old ones."""
    model.resize_token_embeddings(model.config.vocab_size + amount)


def _feed_forwards(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def _replace(mlp: nn.Module, gate: Tensor, up: Tensor, down: Tensor) -> None:
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        layer = getattr(mlp, name)
        layer.weight = nn.Parameter(weight)
        layer.out_features, layer.in_features = weight.shape


OPERATIONS = {"net2net": net2net, "zeros": zeros, "resize": resize}

if __name__ == "__main__":
    main(__doc__ or "", OPERATIONS)
