"""What growth knows of a whole model: its table, its sizes, and how to make one like it without memory.

Most models have the table of their family (`cambia.models.architectures`). Of two kinds only a part is
known and can grow: any model with `ExpandableFFN` modules in it, and any model with LoRA adapters on it.

    >>> body = body_of(model)
    >>> body.table.size(body.config, "intermediate_size")
    768
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.errors import GrowthError
from cambia.models.architectures import (
    ARCHITECTURES,
    FEED_FORWARD,
    Architecture,
    Axes,
    architecture_of,
    linear,
    per_layer,
    uniform,
)
from cambia.nn.ffn import ExpandableFFN


@dataclass(frozen=True)
class FoundFFN(Architecture):
    """The table of a model without one: the `ExpandableFFN` modules in it, numbered as they come."""

    modules: tuple[str, ...] = ()
    """Their paths."""

    def axes(self, name: str) -> Axes:
        number = self.layer_of(name)
        if number is None:
            return Axes(())  # nothing here can grow
        return FEED_FORWARD[name[len(self.modules[number]) + 1 :]]

    def layer_of(self, name: str) -> int | None:
        for number, path in enumerate(self.modules):
            if name.startswith(f"{path}."):
                return number
        return None


@dataclass(frozen=True, eq=False)
class Body:
    """What growth must know of a model."""

    table: Architecture
    config: PreTrainedConfig
    """Its sizes, by the names of `LlamaConfig`."""
    like: Callable[[PreTrainedConfig], PreTrainedModel]
    """Makes a model of such sizes without memory."""
    settings: Callable[[PreTrainedModel], list[Any]] = lambda model: [model.config]
    """The objects in such a model that say its sizes."""


def body_of(model: PreTrainedModel) -> Body:
    """A model's table and sizes: its family's, or those of the adapters or `ExpandableFFN` modules in it.

    Raises:
        GrowthError: it has none of these.
    """
    adapted = lora_layers(model)
    if adapted:
        return _adapters_body(model, adapted)
    config = model.config
    found = {path: m for path, m in model.named_modules() if isinstance(m, ExpandableFFN)}
    table = ARCHITECTURES.get(config.model_type)
    # Somebody may have put such modules into a stock model, in the place of its own.
    is_altered = bool(found) and table is not None and not all(map(table.knows, _names(model)))
    if found and (table is None or is_altered):
        return _found_body(model, found)
    return Body(architecture_of(config), config, lambda sizes: on_meta(type(model), sizes))


def has_table(model: PreTrainedModel) -> bool:
    """Whether anything is known of a model's shape, so that `body_of` answers."""
    known = model.config.model_type in ARCHITECTURES or bool(lora_layers(model))
    return known or any(isinstance(m, ExpandableFFN) for m in model.modules())


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _found_body(model: PreTrainedModel, found: dict[str, ExpandableFFN]) -> Body:
    table = FoundFFN(
        **_ONLY_A_PART,
        name=model.config.model_type,
        uneven=True,
        modules=tuple(found),
        grows=("ffn",),
        why_not=f"of this {model.config.model_type} model only the ExpandableFFN modules are known, so only "
        "they can grow: use WidenFFN",
    )
    sizes = PreTrainedConfig.from_dict(
        {
            "num_hidden_layers": len(found),
            "intermediate_size": uniform(ffn.intermediate_size for ffn in found.values()),
            "initializer_range": getattr(model.config, "initializer_range", 0.02),
        }
    )

    def like(sizes: PreTrainedConfig) -> PreTrainedModel:
        twin = _twin_on_meta(model)
        for path, width in zip(found, per_layer(sizes.intermediate_size, len(found)), strict=True):
            ffn = twin.get_submodule(path)
            assert isinstance(ffn, ExpandableFFN)
            ffn.resize(width)
        return twin

    return Body(table, sizes, like)


_ONLY_A_PART: Any = {
    "outside": {},
    "inside": {},
    "layers": "",
    "layer_writers": (),
    "per_layer_fields": (),
}


def _twin_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules, without memory."""
    empty: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    empty |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo=empty)


# ---- adapters of PEFT ----------------------------------------------------------------------------

# r rank (grows), I input size, O output size
_LORA: dict[str, Callable[[str], Axes]] = {
    "lora_A": lambda rank: linear(makes=rank, reads="input"),  # (r, I)
    "lora_B": lambda rank: linear(makes="output", reads=rank),  # (O, r)
    "lora_embedding_A": lambda rank: Axes((rank, "input")),  # (r, V)
    "lora_embedding_B": lambda rank: linear(makes="output", reads=rank),  # (O, r)
}


@dataclass(frozen=True)
class LoraAdapters(Architecture):
    """The table of a model with adapters: the LoRA layers in it, numbered as they come.

    The dimension "rank of NAME" is the rank of the adapter NAME.
    """

    modules: tuple[str, ...] = ()
    """Their paths."""

    def axes(self, name: str) -> Axes:
        _, found, inside = name.partition(".lora_")
        kind, _, rest = f"lora_{inside}".partition(".")
        if not found or kind not in _LORA or rest.endswith("bias"):
            return Axes(())
        return _LORA[kind](f"rank of {rest.removesuffix('.weight')}")

    def layer_of(self, name: str) -> int | None:
        path, found, _ = name.partition(".lora_")
        return self.modules.index(path) if found and path in self.modules else None


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of PEFT in a model, by path."""
    lora = sys.modules.get("peft.tuners.lora")  # where it was never imported, no model has any
    if lora is None:
        return {}
    return {path: m for path, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def _adapters_body(model: PreTrainedModel, layers: dict[str, Any]) -> Body:
    for path, layer in layers.items():
        if type(layer).__name__ == "ParamWrapper":
            raise GrowthError(
                f"{path!r} adapts a parameter and no module (target_parameters=), and how such an adapter "
                "grows is not known: use target_modules="
            )
    names = sorted({adapter for layer in layers.values() for adapter in layer.r})
    table = LoraAdapters(
        **_ONLY_A_PART,
        name=model.config.model_type,
        uneven=True,
        modules=tuple(layers),
        grows=tuple(f"rank of {adapter}" for adapter in names),
        why_not="the model carries LoRA adapters, and only WidenLoraRank grows a model that does: "
        "merge_and_unload() or unload() them, grow, and add them again",
    )
    sizes = PreTrainedConfig.from_dict(
        {
            "num_hidden_layers": len(layers),
            "lora_ranks": {name: uniform(la.r.get(name, 0) for la in layers.values()) for name in names},
            "initializer_range": getattr(model.config, "initializer_range", 0.02),
        }
    )

    def like(sizes: PreTrainedConfig) -> PreTrainedModel:
        twin = _twin_on_meta(model)
        for adapter, ranks in sizes.lora_ranks.items():
            each = per_layer(ranks, len(layers))
            _set_ranks(twin, adapter, dict(zip(layers, each, strict=True)))
        return twin

    return Body(table, sizes, like, lambda model: list(_adapter_configs(model).values()))


def _adapter_configs(model: Any) -> dict[str, Any]:
    return model.peft_config


def _set_ranks(model: PreTrainedModel, adapter: str, ranks: dict[str, int]) -> None:
    """Give the LoRA layers of a model on meta other ranks, and say so in the adapter's config.

    What a LoRA layer adds is multiplied by alpha / r, or alpha / sqrt(r) (rank-stabilised): alpha follows, so
    that this stays.
    """
    alphas = {}
    for path, rank in ranks.items():
        layer: Any = model.get_submodule(path)
        if adapter not in layer.r:
            continue
        ratio = rank / layer.r[adapter]
        louder = math.sqrt(ratio) if layer.use_rslora[adapter] else ratio
        alpha = layer.lora_alpha[adapter] * louder
        alphas[path] = int(alpha) if alpha == int(alpha) else alpha
        layer.lora_alpha[adapter], layer.r[adapter] = alphas[path], rank
        if adapter in layer.lora_A:
            _resize(layer.lora_A[adapter], "weight", 0, rank)
            _resize(layer.lora_B[adapter], "weight", 1, rank)
            layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = rank
        else:
            _resize(layer.lora_embedding_A, adapter, 0, rank)
            _resize(layer.lora_embedding_B, adapter, 1, rank)
    config = _adapter_configs(model)[adapter]
    kept = {path: ranks[path] for path in alphas}
    # One rank for most, and for the others an entry by their whole path.
    config.r, config.rank_pattern = _most_and_others(kept)
    config.lora_alpha, config.alpha_pattern = _most_and_others(alphas)


def _resize(module: Any, attribute: str, dim: int, size: int) -> None:
    old = module._parameters[attribute]
    shape = [size if d == dim else n for d, n in enumerate(old.shape)]
    module._parameters[attribute] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)


def _most_and_others(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    most = Counter(values.values()).most_common(1)[0][0]
    # PEFT knows layers by their path inside the model that it wraps.
    names = {path: path.removeprefix("base_model.model.") for path in values}
    return most, {names[path]: value for path, value in values.items() if value != most}


# ---- whole models --------------------------------------------------------------------------------


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
    table = body_of(model).table if has_table(model) else None
    if table is None or not table.layers:
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
            if axes.names[axes.read] == "attended":  # as long as H D
                attention += 2 * context * parameter.shape[axes.read]
    return 3.0 * (2 * matrices + attention)


def resize_layers(
    model: PreTrainedModel, sources: Sequence[int | None], make: Callable[[int], nn.Module]
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
