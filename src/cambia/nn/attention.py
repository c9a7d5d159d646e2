"""Causal attention with grouped key/value heads and rotary positions.

Each group of ``H / K`` query heads shares one key/value head (Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245), and positions enter as angles by which queries and keys are turned (Su et
al. 2021, https://arxiv.org/abs/2104.09864), so that only distances matter. The scores are never held in
memory: torch's `scaled_dot_product_attention` works through them block by block.

    >>> rotary = RotaryTables.of(config, position_ids, dtype=x.dtype)   # once per forward pass
    >>> attention(x, rotary)                                            # (B, T, C) -> (B, T, C)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from cambia.nn.fused import causal_attention, rotate

# B batch, T time, S keys (cached ones and T new), C hidden size, H heads, K key/value heads, D head size


class RotaryTables(NamedTuple):
    """Cosine and signed sine of every angle, (B or 1, T, 1, D), as `cambia.nn.fused.rotate` takes them."""

    cos: Tensor
    sin: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, config: PreTrainedConfig, position_ids: Tensor, *, dtype: torch.dtype) -> RotaryTables:
        """The tables for `position_ids` (B or 1, T).

        Angles are computed in float32, as in Llama, and in float64 for a float64 model: position times
        frequency is the one place where float32 would be seen in every later digit. Nothing is kept between
        calls, so a changed head size or an empty model on the meta device needs no care.
        """
        wide = torch.promote_types(dtype, torch.float32)
        frequencies = rotary_frequencies(config, dtype=wide, device=position_ids.device)  # (D/2,)
        angles = position_ids.to(wide)[:, :, None, None] * frequencies  # (B, T, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def rotary_frequencies(config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angle per position of each of the D/2 pairs, (D/2,), after `rope_parameters`.

    `rope_type` "default" is Su et al.; "linear" stretches all positions by `factor` (position interpolation,
    https://arxiv.org/abs/2306.15595); "llama3" stretches the slow pairs only (https://arxiv.org/abs/2407.21783).
    """
    rope = config.rope_parameters
    pairs = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device)
    frequencies = 1.0 / rope["rope_theta"] ** (pairs / config.head_dim)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for fast pairs, 0 for slow ones
        return frequencies * (kept + (1 - kept) / rope["factor"])
    return frequencies


class CausalAttention(nn.Module):
    """Grouped-query attention; a position sees itself and what came before, nothing else."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads(layer_idx)
        self.num_kv_heads = config.num_kv_heads(layer_idx)
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            attention_mask: (B, 1, T, S), True or 0 where a key may be seen; None where causality is all.
            past_key_values: keys and values of earlier positions; the new ones are added to it.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.q_proj(x).view(heads), *rotary)  # (B, T, H, D)
        key = rotate(self.k_proj(x).view(heads), *rotary)  # (B, T, K, D)
        value = self.v_proj(x).view(heads)  # (B, T, K, D)
        dropout = self.dropout if self.training else 0.0
        if attention_mask is None and past_key_values is None and not dropout:
            mixed = causal_attention(query, key, value, scale=self.scaling)  # (B, T, H, D)
            return self.o_proj(mixed.flatten(2))  # (B, T, H D) -> (B, T, C)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # (B, H or K, T, D)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, K, S, D)
        mixed = self._attend(query, key, value, attention_mask, dropout)  # (B, H, T, D)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """The general case: padding, cached keys, dropout."""
        length = query.shape[2]
        is_causal = mask is None and length > 1  # a single new token sees all keys
        if is_causal:
            # More keys than queries without a mask: a preallocated cache being filled, empty beyond `length`.
            key, value = key[:, :, :length], value[:, :, :length]
        shared = self.num_heads // self.num_kv_heads
        if mask is not None and shared > 1:
            # With a mask, CUDA has no grouped kernel that is also memory-efficient.
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=self.scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
