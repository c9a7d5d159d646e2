"""What of a model's inside is heard: weights of its layers before the one head, and of its attention heads.

Both are hooks inside a block, so the model stays what it is. A model has L + 1 hidden states, the embedding
first; what the final norm is given is their weighted sum, at the start the last one alone. A head's part of
what its layer's attention says is multiplied by a scale, at the start 1; such scales are folded exactly into
the weights behind them (`with_heads_folded`).
"""

# L layers, H heads of a layer, K size of a head, B rows, T time, D hidden size

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import ConfigError, GrowthError
from cambia.models.architectures import Architecture, architecture_of

_READS_HEADS = "attended"
"""In the table of a family: what runs along the outputs of attention, head by head."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The places of a model at which it can be heard."""

    layers: Sequence[nn.Module]
    """L of them."""
    final: nn.Module
    """What is given the last hidden state: the final norm, or the head."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """Found by looking where the last layer's output goes.

        Raises:
            ConfigError: it goes nowhere that could be found.
        """
        layers = _layers(model)
        last: list[Tensor] = []
        found: list[nn.Module] = []

        def leaves(module: nn.Module, given: Any, said: Any) -> None:
            last[:] = [_states(said)]

        def enters(module: nn.Module, given: tuple[Any, ...]) -> None:
            if last and not found and given and given[0] is last[0]:
                found.append(module)

        with ExitStack() as hooks, torch.no_grad():
            hooks.callback(layers[-1].register_forward_hook(leaves).remove)
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(enters).remove)
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        if not found:
            raise ConfigError(
                f"nothing in a {type(model).__name__} is given what its last layer says: weights of layers "
                "cannot be used on it"
            )
        return cls(layers, found[0])


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    count = model.config.num_hidden_layers
    for _, module in model.named_modules():  # outer ones come first
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(
        f"a {type(model).__name__} has no list of its {count} layers: weights of layers cannot be used on it"
    )


def _states(said: Any) -> Tensor:
    return said[0] if isinstance(said, tuple) else said


@contextmanager
def mixed_layers(anatomy: Anatomy, weights: Tensor) -> Generator[None]:
    """Inside the block the final norm is given a weighted sum of all hidden states.

    Args:
        weights: (L + 1,), the embedding's first.
    """
    total: list[Tensor] = []

    def begin(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states = given[0] if given else named["hidden_states"]
        total[:] = [weights[0].to(states.dtype) * states]

    def heard(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, said: Any) -> None:
            states = _states(said)
            total[0] = total[0] + weights[place].to(states.dtype) * states

        return hook

    def end(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return total.pop(), *given[1:]

    with ExitStack() as hooks:
        first = anatomy.layers[0]
        hooks.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for place, layer in enumerate(anatomy.layers, start=1):
            hooks.callback(layer.register_forward_hook(heard(place)).remove)
        hooks.callback(anatomy.final.register_forward_pre_hook(end).remove)
        yield


def heads_of(model: PreTrainedModel) -> list[int]:
    """The heads of each layer.

    Raises:
        ConfigError: nothing is known of the family's attention.
    """
    return [heads for _, heads in _projections(model)]


def _projections(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """For each layer what reads the outputs of its heads, and how many these are."""
    try:
        table = architecture_of(model.config)
    except GrowthError as error:
        raise ConfigError(f"weights of heads need to know a model's attention: {error}") from None
    counts = table.size(model.config, "num_attention_heads")
    found = {}
    for name, _ in model.named_parameters():
        layer = table.layer_of(name)
        if layer is not None and _reads_heads(table, name):
            module = model.get_submodule(name.rpartition(".")[0])
            found[layer] = (module, counts if isinstance(counts, int) else counts[layer])
    return [found[layer] for layer in sorted(found)]


def _reads_heads(table: Architecture, name: str) -> bool:
    axes = table.axes(name) if table.knows(name) else None
    return axes is not None and axes.read is not None and axes.names[axes.read] == _READS_HEADS


@contextmanager
def scaled_heads(model: PreTrainedModel, scales: Sequence[Tensor]) -> Generator[None]:
    """Inside the block each head's output is multiplied by its scale.

    Args:
        scales: of each layer, (H,).
    """

    def louder(scale: Tensor) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = given[0].unflatten(-1, (len(scale), -1))  # (B, T, H, K)
            return (heads * scale[:, None].to(heads.dtype)).flatten(-2), *given[1:]

        return hook

    with ExitStack() as hooks:
        for (module, _), scale in zip(_projections(model), scales, strict=True):
            hooks.callback(module.register_forward_pre_hook(louder(scale)).remove)
        yield


@torch.no_grad()
def with_heads_folded(model: PreTrainedModel, scales: Sequence[Tensor]) -> PreTrainedModel:
    """A copy of a model whose weights hold the scales: it says what the model says inside `scaled_heads`."""
    folded = copy.deepcopy(model)
    table = architecture_of(folded.config)
    for (module, heads), scale in zip(_projections(folded), scales, strict=True):
        weight = module.get_parameter("weight")
        name = next(name for name, parameter in folded.named_parameters() if parameter is weight)
        axis = table.axes(name).read
        assert axis is not None
        size = weight.shape[axis] // heads
        wide = scale.repeat_interleave(size).to(weight)
        weight.mul_(wide if axis == 1 else wide[:, None])
    return folded
