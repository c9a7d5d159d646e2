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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

from cambia.errors import GrowthError


@dataclass(frozen=True)
class Axes:
    """The dimensions of one parameter."""

    names: tuple[str, ...]
    read: int | None = None
    """The axis of a matrix that its input runs along; None for vectors and lookup tables."""
    is_gain: bool = False
    """A norm's gain: it multiplies what runs along its axis."""


def linear(*, makes: str, reads: str) -> Axes:
    """``nn.Linear.weight``: (out, in)."""
    return Axes((makes, reads), read=1)


def conv1d(*, makes: str, reads: str) -> Axes:
    """``transformers.pytorch_utils.Conv1D.weight``: (in, out)."""
    return Axes((reads, makes), read=0)


def vector(makes: str) -> Axes:
    """A bias."""
    return Axes((makes,))


def gain(along: str) -> Axes:
    """A norm's gain."""
    return Axes((along,), is_gain=True)


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
    """Config fields with an entry per layer: lists, or one value where all are equal."""
    uneven: bool = False
    """Whether layers may differ in size."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What a config calls a size, where that is not `LlamaConfig`'s name for it."""
    norm: Literal["rms", "layer"] = "rms"
    """rms: divides by the root mean square · layer: takes the mean away first."""
    head_dim_apart: bool = True
    """Whether heads times their size may differ from the hidden size."""
    hides_tokens: bool = False
    """Whether its config can hide tokens from prediction (`predictable_tokens`)."""
    grows: tuple[str, ...] = ()
    """The only dimensions that can grow, where of the rest nothing is known."""
    why_not: str = ""
    """Why the rest cannot, and what can."""

    def axes(self, name: str) -> Axes:
        """The row of a parameter.

        Raises:
            GrowthError: the table does not know it; the model is not a plain one of this family.
        """
        row = self._row(name)
        if row is None:
            raise GrowthError(
                f"the parameter {name!r} is not one that architecture {self.name!r} knows: growth works on "
                "the plain model (merge or unload adapters and wrappers first)"
            )
        return row

    def knows(self, name: str) -> bool:
        """Whether there is a row for a parameter."""
        return self._row(name) is not None

    def _row(self, name: str) -> Axes | None:
        place = self._place(name)
        return self.outside.get(name) if place is None else self.inside.get(place[1])

    def _place(self, name: str) -> tuple[int, str] | None:
        """Layer and name in it of a parameter; None outside the layers."""
        start = f"{self.layers}."
        if not name.startswith(start):
            return None
        number, _, rest = name[len(start) :].partition(".")
        return int(number), rest

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a parameter is in, None outside."""
        place = self._place(name)
        return None if place is None else place[0]

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same parameter in another layer."""
        place = self._place(name)
        return name if place is None else f"{self.layers}.{layer}.{place[1]}"

    def size(self, config: PreTrainedConfig, name: str) -> Any:
        """A size of a config, by `LlamaConfig`'s name: one for all layers, or a list."""
        value = getattr(config, self.fields.get(name, name), None)
        if value is None:
            defaults = {
                "intermediate_size": lambda: 4 * config.hidden_size,  # GPT-2's n_inner
                "num_key_value_heads": lambda: config.num_attention_heads,
                "head_dim": lambda: config.hidden_size // config.num_attention_heads,
            }
            value = defaults[name]()
        return value

    def set_size(self, config: PreTrainedConfig, name: str, value: Any) -> None:
        """Write a size into a config."""
        setattr(config, self.fields.get(name, name), value)


# What runs along "query" and "key" meets in the attention scores; what runs along "value" is summed by them
# and runs along "attended", head by head.
_LLAMA_LAYER = {
    "self_attn.q_proj.weight": linear(makes="query", reads="hidden"),
    "self_attn.q_proj.bias": vector("query"),
    "self_attn.k_proj.weight": linear(makes="key", reads="hidden"),
    "self_attn.k_proj.bias": vector("key"),
    "self_attn.v_proj.weight": linear(makes="value", reads="hidden"),
    "self_attn.v_proj.bias": vector("value"),
    "self_attn.o_proj.weight": linear(makes="hidden", reads="attended"),
    "self_attn.o_proj.bias": vector("hidden"),
    "mlp.gate_proj.weight": linear(makes="ffn", reads="hidden"),
    "mlp.gate_proj.bias": vector("ffn"),
    "mlp.up_proj.weight": linear(makes="ffn", reads="hidden"),
    "mlp.up_proj.bias": vector("ffn"),
    "mlp.down_proj.weight": linear(makes="hidden", reads="ffn"),
    "mlp.down_proj.bias": vector("hidden"),
    "input_layernorm.weight": gain("hidden"),
    "post_attention_layernorm.weight": gain("hidden"),
}
_QWEN3_LAYER = {
    **_LLAMA_LAYER,
    "self_attn.q_norm.weight": gain("query_head"),
    "self_attn.k_norm.weight": gain("key_head"),
}
FEED_FORWARD = {
    name.removeprefix("mlp."): axes for name, axes in _LLAMA_LAYER.items() if name.startswith("mlp.")
}
"""The rows of one gated feed-forward part."""
_LLAMA_OUTSIDE = {
    "model.embed_tokens.weight": lookup(rows="vocab", makes="hidden"),
    "model.norm.weight": gain("hidden"),
    "lm_head.weight": linear(makes="vocab", reads="hidden"),
}
_LLAMA_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_GPT2_LAYER = {
    "ln_1.weight": gain("hidden"),
    "ln_1.bias": vector("hidden"),
    "attn.c_attn.weight": conv1d(makes="query_key_value", reads="hidden"),
    "attn.c_attn.bias": vector("query_key_value"),
    "attn.c_proj.weight": conv1d(makes="hidden", reads="attended"),
    "attn.c_proj.bias": vector("hidden"),
    "ln_2.weight": gain("hidden"),
    "ln_2.bias": vector("hidden"),
    "mlp.c_fc.weight": conv1d(makes="ffn", reads="hidden"),
    "mlp.c_fc.bias": vector("ffn"),
    "mlp.c_proj.weight": conv1d(makes="hidden", reads="ffn"),
    "mlp.c_proj.bias": vector("hidden"),
}
_GPT2_OUTSIDE = {
    "transformer.wte.weight": lookup(rows="vocab", makes="hidden"),
    "transformer.wpe.weight": lookup(rows="position", makes="hidden"),
    "transformer.ln_f.weight": gain("hidden"),
    "transformer.ln_f.bias": vector("hidden"),
    "lm_head.weight": linear(makes="vocab", reads="hidden"),
}


def _like_llama(
    name: str,
    inside: Mapping[str, Axes] = _LLAMA_LAYER,
    *,
    per_layer_fields: tuple[str, ...] = (),
    is_native: bool = False,
) -> Architecture:
    return Architecture(
        name=name,
        outside=_LLAMA_OUTSIDE,
        inside=inside,
        layers="model.layers",
        layer_writers=_LLAMA_WRITERS,
        per_layer_fields=per_layer_fields,
        uneven=is_native,
        hides_tokens=is_native,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "cambia": _like_llama(
        "cambia",
        per_layer_fields=("intermediate_size", "num_attention_heads", "num_key_value_heads"),
        is_native=True,
    ),
    "llama": _like_llama("llama"),
    "mistral": _like_llama("mistral"),
    "qwen2": _like_llama("qwen2", per_layer_fields=("layer_types",)),
    "qwen3": _like_llama("qwen3", _QWEN3_LAYER, per_layer_fields=("layer_types",)),
    "gpt2": Architecture(
        name="gpt2",
        outside=_GPT2_OUTSIDE,
        inside=_GPT2_LAYER,
        layers="transformer.h",
        layer_writers=("attn.c_proj", "mlp.c_proj"),
        per_layer_fields=(),
        fields={"intermediate_size": "n_inner", "rms_norm_eps": "layer_norm_epsilon"},
        norm="layer",
        head_dim_apart=False,
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


def changed_fields(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Config fields that differ: name -> (before, after)."""
    old, new = before.to_dict(), after.to_dict()
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}
