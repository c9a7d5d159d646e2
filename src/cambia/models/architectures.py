"""An architecture is a table: which dimension every axis of every parameter is.

Growing operators work on the table, never on a family's classes, so they work on live stock models,
and a new family is one more entry. A row names the axes of one parameter; a matrix also says which of
its axes it *reads* (its input) and which it *makes* (its output). Lengthening a dimension exactly is
then always the same: whatever makes it gets new, random entries, and whatever reads it gets zeros.

    >>> table = architecture_of(model.config)
    >>> table.axes("model.layers.3.mlp.down_proj.weight")
    Axes(names=('hidden', 'ffn'), read=1)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.errors import GrowthError
from cambia.nn.ffn import ExpandableFFN

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Axes:
    """The dimensions of one parameter."""

    names: tuple[str, ...]
    read: int | None = None
    """The axis of a matrix that its input runs along; None for vectors and lookup tables."""


def linear(*, makes: str, reads: str) -> Axes:
    """``nn.Linear.weight``: (out, in)."""
    return Axes((makes, reads), read=1)


def vector(makes: str) -> Axes:
    """A bias or a norm's gain."""
    return Axes((makes,))


def lookup(*, rows: str, makes: str) -> Axes:
    """``nn.Embedding.weight``: (rows, out)."""
    return Axes((rows, makes))


@dataclass(frozen=True)
class Architecture:
    """One family's table."""

    name: str
    outside: Mapping[str, Axes]
    """Parameters outside the layers, by full name."""
    inside: Mapping[str, Axes]
    """Parameters of one layer, by their name in it."""
    layers: str
    """Path of the list of layers."""
    layer_writers: tuple[str, ...]
    """What a layer adds to the residual stream with. All zero, and the layer is the identity.

    (LLaMA-Pro, arXiv:2401.02415. Zeroing the norms' gains instead would also hide the layer, but no
    gradient would ever reach it.)
    """
    per_layer_fields: tuple[str, ...]
    """Config fields that may be lists with an entry per layer."""
    uneven: bool = False
    """Whether layers may differ in size."""

    def axes(self, name: str) -> Axes:
        """The row of a parameter.

        Raises:
            GrowthError: the table does not know it; the model is not a plain one of this family.
        """
        match = _LAYER.search(name)
        row = self.inside.get(name[match.end() :]) if match else self.outside.get(name)
        if row is None:
            raise GrowthError(
                f"the parameter {name!r} is not one that architecture {self.name!r} knows: growth works on "
                "the plain model (merge or unload adapters and wrappers first)"
            )
        return row

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a parameter is in, None outside."""
        match = _LAYER.search(name)
        return int(match.group(1)) if match else None

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same parameter in another layer."""
        return _LAYER.sub(f".layers.{layer}.", name, count=1)


_LLAMA_LAYER = {
    "self_attn.q_proj.weight": linear(makes="query", reads="hidden"),
    "self_attn.q_proj.bias": vector("query"),
    "self_attn.k_proj.weight": linear(makes="key_value", reads="hidden"),
    "self_attn.k_proj.bias": vector("key_value"),
    "self_attn.v_proj.weight": linear(makes="key_value", reads="hidden"),
    "self_attn.v_proj.bias": vector("key_value"),
    "self_attn.o_proj.weight": linear(makes="hidden", reads="query"),
    "self_attn.o_proj.bias": vector("hidden"),
    "mlp.gate_proj.weight": linear(makes="ffn", reads="hidden"),
    "mlp.gate_proj.bias": vector("ffn"),
    "mlp.up_proj.weight": linear(makes="ffn", reads="hidden"),
    "mlp.up_proj.bias": vector("ffn"),
    "mlp.down_proj.weight": linear(makes="hidden", reads="ffn"),
    "mlp.down_proj.bias": vector("hidden"),
    "input_layernorm.weight": vector("hidden"),
    "post_attention_layernorm.weight": vector("hidden"),
}
_LLAMA_OUTSIDE = {
    "model.embed_tokens.weight": lookup(rows="vocab", makes="hidden"),
    "model.norm.weight": vector("hidden"),
    "lm_head.weight": linear(makes="vocab", reads="hidden"),
}
_LLAMA_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class FoundModules(Architecture):
    """The table of a model without one: the `ExpandableFFN` modules in it, numbered as they come."""

    modules: tuple[str, ...] = ()
    """Their paths."""

    def axes(self, name: str) -> Axes:
        number = self.layer_of(name)
        if number is None:
            return Axes(())  # nothing here can grow
        return _LLAMA_LAYER[f"mlp.{name[len(self.modules[number]) + 1 :]}"]

    def layer_of(self, name: str) -> int | None:
        for number, path in enumerate(self.modules):
            if name.startswith(f"{path}."):
                return number
        return None


ARCHITECTURES: dict[str, Architecture] = {
    "cambia": Architecture(
        name="cambia",
        outside=_LLAMA_OUTSIDE,
        inside=_LLAMA_LAYER,
        layers="model.layers",
        layer_writers=_LLAMA_WRITERS,
        per_layer_fields=("intermediate_size", "num_attention_heads", "num_key_value_heads"),
        uneven=True,
    ),
    "llama": Architecture(
        name="llama",
        outside=_LLAMA_OUTSIDE,
        inside=_LLAMA_LAYER,
        layers="model.layers",
        layer_writers=_LLAMA_WRITERS,
        per_layer_fields=(),
    ),
}
"""By `config.model_type`."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The table of a model's family.

    Raises:
        GrowthError: there is none yet.
    """
    if config.model_type not in ARCHITECTURES:
        raise GrowthError(
            f"there is no architecture table for model type {config.model_type!r} yet; "
            f"growable are {', '.join(ARCHITECTURES)}, and any model whose feed-forward parts are "
            "cambia.nn.ExpandableFFN"
        )
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True, eq=False)
class Body:
    """What growth must know of a model."""

    table: Architecture
    config: PreTrainedConfig
    """Its sizes, by the names of `LlamaConfig`."""
    like: Callable[[PreTrainedConfig], PreTrainedModel]
    """Makes a model of such sizes without memory."""


def body_of(model: PreTrainedModel) -> Body:
    """A model's table and sizes: its family's, or those of the `ExpandableFFN` modules in it.

    Raises:
        GrowthError: it has neither.
    """
    config = model.config
    if config.model_type in ARCHITECTURES:
        return Body(architecture_of(config), config, lambda sizes: on_meta(type(model), sizes))
    found = {path: m for path, m in model.named_modules() if isinstance(m, ExpandableFFN)}
    if not found:
        architecture_of(config)  # says that there is no table
    table = FoundModules(
        name=config.model_type,
        outside={},
        inside={},
        layers="",
        layer_writers=(),
        per_layer_fields=("intermediate_size",),
        uneven=True,
        modules=tuple(found),
    )
    sizes = PreTrainedConfig.from_dict(
        {
            "num_hidden_layers": len(found),
            "intermediate_size": uniform(ffn.intermediate_size for ffn in found.values()),
            "initializer_range": getattr(config, "initializer_range", 0.02),
        }
    )
    return Body(table, sizes, lambda sizes: _widened_on_meta(model, table.modules, sizes))


def _widened_on_meta(
    model: PreTrainedModel, paths: tuple[str, ...], sizes: PreTrainedConfig
) -> PreTrainedModel:
    """The same modules without memory, with feed-forward widths as they are said."""
    empty: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()
    }
    empty |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    twin = copy.deepcopy(model, memo=empty)
    widths = dict(zip(paths, per_layer(sizes.intermediate_size, len(paths)), strict=True))
    for path, module in twin.named_modules():
        if isinstance(module, ExpandableFFN):
            module.resize(widths[path])
    return twin


def layer_ids(config: PreTrainedConfig) -> list[int]:
    """The stable ids of the layers, bottom first; a stock model's are born when it first grows."""
    ids = getattr(config, "layer_ids", None)
    return list(ids) if ids is not None else list(range(config.num_hidden_layers))


def per_layer(value: int | list[int], num_layers: int) -> list[int]:
    """A size that may differ per layer, as a list."""
    return list(value) if isinstance(value, list) else [value] * num_layers


def uniform(values: Iterable[int]) -> int | list[int]:
    """The inverse of `per_layer`: one number where all are equal, so that the config stays plain."""
    values = list(values)
    return values[0] if len(set(values)) == 1 else values


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the given shape without memory: what a plan is checked against."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Floating-point operations of a training step per token (forward and backward), causal attention.

    ``3 (2 N + sum over layers of 2 T H D)`` with N the entries of all matrices that are multiplied
    with (the head too, the embedding lookup not), T the context, H heads, D head size: attention's
    two products cost ``4 T H D`` a token, halved because a token only sees the past.

    Args:
        model: real or on the meta device.
        context: tokens per sequence.
    """
    table = body_of(model).table
    if isinstance(table, FoundModules):
        # Nothing is known of the rest: its matrices count as they are, and attention is as wide as the model.
        lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        lookups -= {id(head.weight)} if isinstance(head, nn.Linear) else set()
        known = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in lookups)
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        return 3.0 * (2 * known + 2 * context * width * depth)
    matrices = 0
    attention = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        axes = table.axes(name)
        if axes.read is not None:
            matrices += parameter.numel()
            if axes.names[axes.read] == "query":  # (hidden, H D)
                attention += 2 * context * parameter.shape[axes.read]
    return 3.0 * (2 * matrices + attention)


def resize_layers(
    model: PreTrainedModel, sources: list[int | None], make: Callable[[int], nn.Module]
) -> None:
    """Rebuild the list of layers: old layer `sources[i]` at place i, a made one where it is None."""
    parent_path, _, attribute = architecture_of(model.config).layers.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = getattr(parent, attribute)
    setattr(
        parent,
        attribute,
        nn.ModuleList(make(i) if s is None else old[s] for i, s in enumerate(sources)),
    )


def changed_fields(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Config fields that differ: name -> (before, after)."""
    old, new = before.to_dict(), after.to_dict()
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}
