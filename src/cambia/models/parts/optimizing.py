"""Parts and the optimizer: one that is taught is in it, one that is sealed is not."""

from __future__ import annotations

import torch
from torch import nn


def take_up(optimizer: torch.optim.Optimizer, part: nn.Module) -> None:
    """Let an optimizer train a Part: its matrices in the first group, its vectors in the last.

    Groups are not added: learning-rate schedulers count them once.
    """
    groups = optimizer.param_groups
    for parameter in part.parameters():
        group = groups[0] if parameter.dim() >= 2 else groups[-1]
        group["params"].append(parameter)


def let_go(optimizer: torch.optim.Optimizer, part: nn.Module) -> None:
    """An optimizer forgets a Part, state and all."""
    gone = {id(parameter) for parameter in part.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in part.parameters():
        optimizer.state.pop(parameter, None)
