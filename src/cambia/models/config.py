"""The shape of a native model.

Fields are named as in `LlamaConfig`, so that a Llama user knows them. What is new: `intermediate_size`,
`num_attention_heads` and `num_key_value_heads` may be a list with one entry per layer, since layers grow
by themselves; and `layer_ids` names each layer for life, so that a layer put in between renames nothing.

    >>> config = CambiaConfig(hidden_size=256, num_hidden_layers=2, intermediate_size=[768, 1024])
    >>> config.ffn_size(1)
    1024
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from cambia.errors import ConfigError

ROPE_TYPES = ("default", "linear", "llama3")
"""Those whose frequencies follow the head size and nothing else, so that a model can grow under them."""


class CambiaConfig(PreTrainedConfig):
    """Sizes and settings of a `CambiaForCausalLM`.

    Raises:
        ConfigError: a size does not divide or does not fit; the message proposes the nearest legal one.
    """

    model_type = "cambia"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 4096
    hidden_size: int = 256
    """Size of the residual stream."""
    intermediate_size: int | list[int] = 768
    """Units of the feed-forward part; one number, or one per layer."""
    num_hidden_layers: int = 6
    num_attention_heads: int | list[int] = 8
    num_key_value_heads: int | list[int] = None  # ty: ignore[invalid-assignment]  (filled in when it is None)
    """Key/value heads; each serves the same number of attention heads. None: as many as those."""
    head_dim: int = None  # ty: ignore[invalid-assignment]
    """Size of a head, even. None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    zero_init_residual: bool = False
    """New layers start silent: what writes to the residual stream (o_proj, down_proj) starts at zero."""
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    """Whether generation keeps keys and values; training never does."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = None  # ty: ignore[invalid-assignment]
    """`rope_type` (default, linear or llama3) and its numbers, as in transformers 5."""
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    predictable_tokens: int | None = None
    """Only the first so many tokens of the vocabulary can be predicted, the others have a logit of minus
    infinity; None: all. A vocabulary can so grow without changing the loss."""
    layer_ids: list[int] = None  # ty: ignore[invalid-assignment]
    """A stable id for each layer, bottom first. None: 0, 1, 2, ..."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self._default_head_dim()
        if self.layer_ids is None:
            self.layer_ids = list(range(self.num_hidden_layers))
        super().__post_init__(**kwargs)
        self.check_sizes()

    def ffn_size(self, layer: int) -> int:
        """Units of the feed-forward part of a layer."""
        return _of_layer(self.intermediate_size, layer)

    def num_heads(self, layer: int) -> int:
        """Attention heads of a layer."""
        return _of_layer(self.num_attention_heads, layer)

    def num_kv_heads(self, layer: int) -> int:
        """Key/value heads of a layer."""
        return _of_layer(self.num_key_value_heads, layer)

    def check_sizes(self) -> None:
        """Refuse sizes that do not divide or do not fit; a model asks this before it is built.

        Raises:
            ConfigError: with the nearest legal size.
        """
        self._check_settings()
        self._check_lists()
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd and rotary positions pair its entries; "
                f"use head_dim={self.head_dim + 1}"
            )
        for layer in range(self.num_hidden_layers):
            heads, kv_heads = self.num_heads(layer), self.num_kv_heads(layer)
            if heads % kv_heads:
                raise ConfigError(
                    f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads} "
                    f"(layer {layer}); use num_key_value_heads={_nearest_divisor(heads, kv_heads)}"
                )

    def _default_head_dim(self) -> int:
        counts = self.num_attention_heads
        if isinstance(counts, list) and len(set(counts)) > 1:
            raise ConfigError(f"num_attention_heads={counts} differ between layers; say head_dim=")
        heads = counts[0] if isinstance(counts, list) else counts
        if heads < 1 or self.hidden_size % heads:
            # Half the hidden size must stay divisible too, or the head size would be odd.
            legal = _nearest_divisor(max(self.hidden_size // 2, 1), heads)
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not divide into num_attention_heads={heads}; "
                f"use num_attention_heads={legal}, or say head_dim="
            )
        return self.hidden_size // heads

    def _check_settings(self) -> None:
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act={self.hidden_act!r} is not supported; native layers use 'silu'")
        kind = self.rope_parameters["rope_type"]
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"rope_parameters['rope_type']={kind!r} is not supported; use one of {', '.join(ROPE_TYPES)}"
            )
        if self.predictable_tokens is not None and not 1 <= self.predictable_tokens <= self.vocab_size:
            raise ConfigError(
                f"predictable_tokens={self.predictable_tokens} must lie between 1 and "
                f"vocab_size={self.vocab_size}"
            )
        if not isinstance(self.layer_ids, list) or len(set(self.layer_ids)) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_ids={self.layer_ids} must be {self.num_hidden_layers} different numbers, one per "
                "layer (num_hidden_layers); leave it out to get 0, 1, 2, ..."
            )

    def _check_lists(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            sizes = getattr(self, name)
            if isinstance(sizes, list) and len(sizes) != self.num_hidden_layers:
                raise ConfigError(
                    f"{name}={sizes} has {len(sizes)} entries, num_hidden_layers={self.num_hidden_layers}; "
                    "give one per layer, or a single number for all"
                )
            if min(sizes if isinstance(sizes, list) else [sizes]) < 1:
                raise ConfigError(f"{name}={sizes} must be at least 1")


def _of_layer(size: int | list[int], layer: int) -> int:
    return size[layer] if isinstance(size, list) else size


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two, the smaller."""
    divisors = (size for size in range(1, number + 1) if number % size == 0)
    return min(divisors, key=lambda size: abs(size - wanted))
