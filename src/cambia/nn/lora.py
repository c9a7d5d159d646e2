"""Low-rank adapters: a small trainable addition to each linear layer of a model that itself stays.

A layer says ``W x + (alpha / r) B A x`` (Hu et al. 2021, https://arxiv.org/abs/2106.09685). B starts at zero,
so that nothing changes at first. The adapter stands beside the model, not in it: the model keeps its class,
its parameter names and what it is saved as.

    >>> adapter = LoraAdapter(model, rank=16)
    >>> optimizer = torch.optim.AdamW(adapter.parameters())
    >>> weights = adapter.merged()                # of the adapted layers, as a model without it needs them
"""

# I a layer's inputs, O its outputs, R rank

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cambia.errors import ConfigError
from cambia.nn.deltas import LowRank

LINEAR = (nn.Linear, Conv1D)
_HELD = "_cambia_adapter"
"""Marks a layer that an adapter adds to."""


class LoraAdapter(nn.Module):
    """One low-rank addition for each linear layer of a model, until it is removed.

    Args:
        model: stays as it is; the additions are made by forward hooks.
        rank: R of every layer, at most the smaller side of it.
        alpha: additions are multiplied by alpha / rank; rank by default.
        targets: says by a layer's name whether it is adapted; by default all but the output head.

    Raises:
        ConfigError: there is no such layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: float | None = None,
        targets: Callable[[str], bool] | None = None,
    ):
        super().__init__()
        head = model.get_output_embeddings()
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LINEAR) and (module is not head if targets is None else targets(name))
        }
        if not self.layers:
            raise ConfigError(
                f"a {type(model).__name__} has no linear layer to adapt; layers of {_names(LINEAR)} can be"
            )
        if any(_HELD in vars(layer) for layer in self.layers.values()):
            raise ConfigError(
                "the model has an adapter from an earlier training: merge it, method.adapter.merge_(), take "
                "it off, method.adapter.remove(), or load the model anew"
            )
        self.added = nn.ModuleDict()
        self._hooks: list[RemovableHandle] = []
        for name, layer in self.layers.items():
            outputs, inputs = weight_of(layer).shape if isinstance(layer, nn.Linear) else _sides(layer)
            size = min(rank, inputs, outputs)
            added = LowRank(inputs, outputs, size, (alpha or rank) / rank, weight_of(layer))
            self.added[_key(name)] = added
            self._hooks.append(layer.register_forward_hook(_adding(added)))
            vars(layer)[_HELD] = True

    def remove(self) -> None:
        """Take it off: the model says again what it says without."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            vars(layer).pop(_HELD, None)

    @torch.no_grad()
    def merge_(self) -> None:
        """Add it to the weights for good, and take it off: the model says the same by itself."""
        merged = self.merged()
        for name, layer in self.layers.items():
            weight_of(layer).copy_(merged[f"{name}.weight"])
        self.remove()

    def of(self, name: str) -> LowRank:
        """What is added to a layer."""
        added = self.added[_key(name)]
        assert isinstance(added, LowRank)
        return added

    def reset(self, seed: int) -> None:
        """Begin anew: nothing is added, and A is random."""
        generator = torch.Generator().manual_seed(seed)
        for name in self.layers:
            self.of(name).reset(generator)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """What is added to the weight of each layer, in the weight's own layout, by the weight's name."""
        found = {}
        for name, layer in self.layers.items():
            product = self.of(name).product()
            product = product.to(weight_of(layer).dtype)
            found[f"{name}.weight"] = product if isinstance(layer, nn.Linear) else product.T
        return found

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights with which the layers say the same without the adapter, by name."""
        deltas = self.deltas()
        return {
            f"{name}.weight": weight_of(layer).detach() + deltas[f"{name}.weight"]
            for name, layer in self.layers.items()
        }


def weight_of(layer: nn.Module) -> nn.Parameter:
    """A linear layer's weight: (O, I), or (I, O) for a Conv1D."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _sides(layer: nn.Module) -> tuple[int, int]:
    inputs, outputs = weight_of(layer).shape
    return outputs, inputs


def _adding(added: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, given, out: out + added(given[0], out)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict takes no dots


def _names(kinds: tuple[type, ...]) -> str:
    return " and ".join(kind.__name__ for kind in kinds)
