"""Causal attention with grouped key/value heads and rotary positions.

Each group of ``H / K`` query heads shares one key/value head (Ainslie et al. 2023,
https://arxiv.org/abs/2305.13245), and positions enter as angles by which queries and keys are turned (Su et
al. 2021, https://arxiv.org/abs/2104.09864), so that only distances matter. The scores are never held in
memory as a whole: torch's `scaled_dot_product_attention` works through them block by block, and so does
`blocked_attention` below, which is faster on a processor when heads share their keys.

    >>> rotary = RotaryTables.of(config, position_ids, dtype=x.dtype)   # once per forward pass
    >>> attention(x, rotary)                                            # (B, T, C) -> (B, T, C)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import Cache, PreTrainedConfig

from cambia.nn.fused import first_derivative_only, is_fusable, rotate

# B batch, T time, S keys (cached ones and T new), C hidden size, D head size
# H heads (grow), K key/value heads (grow), R = H/K heads that share one, G = B*K groups


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


# ---- attention block by block on a processor --------------------------------------------------------


MIN_LENGTH = 128
"""Positions from which on `blocked_attention` is the faster one (measured: 20 % at 256)."""
MAX_KEPT_LENGTH = 256
"""Positions up to which probabilities are kept for backward; beyond, they are computed again there."""
BLOCK_ROWS = 32
"""Positions in a block."""
BLOCK_BYTES = 2**21
"""Of the scores that are worked on at once: a processor's own cache holds them."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Softmax attention of every position to itself and its past.

    `query` is (B, T, H, D), `key` and `value` (B, T, K, D) with K dividing H; returns (B, T, H, D).
    """
    shares = query.shape[2] > key.shape[2]
    if is_fusable(query) and query.device.type == "cpu" and shares and query.shape[1] >= MIN_LENGTH:
        return blocked_attention(query, key, value, scale=scale)
    return plain_causal_attention(query, key, value, scale=scale)


def plain_causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """What `causal_attention` computes."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T, D), (B, K, T, D)
    gqa = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=gqa
    ).transpose(1, 2)


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """What `causal_attention` computes, on a processor, in float32 or float64."""
    # Inside forward gradients are always off, so whether one is wanted is asked here.
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    keeps = wants_gradient and query.shape[1] <= MAX_KEPT_LENGTH
    return _BlockedAttention.apply(query, key, value, scale, keeps)


class _BlockedAttention(Function):
    """Blocks of queries against the keys they may see, as batched matrix products that fit in the cache.

    The R = H/K heads of a group share their keys, so their queries are stacked into one matrix per group
    (row t*R + r is head r at time t), and there are G = B*K groups. Memory stays linear in T: for long
    sequences backward computes the probabilities again, as in FlashAttention (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, keeps: bool) -> Tensor:
        ctx.batch, ctx.scale = key.shape[0], scale
        ctx.shared = query.shape[2] // key.shape[2]
        queries = _by_group(query, ctx.shared)  # (G, T R, D)
        keys, values = _by_group(key, 1) * scale, _by_group(value, 1)  # (G, T, D)
        mixed = torch.empty_like(queries)
        kept: list[Tensor] = []
        blocks = _Blocks.of(queries, keys, reuses_memory=not keeps)
        for q, k, v, out in blocks.split(queries, keys, values, mixed):
            for rows, seen in blocks.in_order():
                probs = blocks.probabilities(q[:, rows], k[:, seen])  # (g, n R, j)
                out[:, rows] = torch.bmm(probs, v[:, seen])
                if keeps:
                    kept.append(probs)
        ctx.save_for_backward(queries, keys, values, *kept)
        return _by_time(mixed, ctx.batch, ctx.shared)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        blocks = _Blocks.of(queries, keys, reuses_memory=not kept)
        given = (queries, keys, values, _by_group(dmixed, ctx.shared))
        for q, k, v, dout, dq, dk, dv in blocks.split(*given, dqueries, dkeys, dvalues):
            for rows, seen in blocks.in_order():
                probs = kept.pop(0) if kept else blocks.probabilities(q[:, rows], k[:, seen])
                dv[:, seen].add_(torch.bmm(probs.transpose(1, 2), dout[:, rows]))
                dprobs = torch.bmm(dout[:, rows], v[:, seen].transpose(1, 2))
                dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
                dq[:, rows] = torch.bmm(dscores, k[:, seen])
                dk[:, seen].add_(torch.bmm(dscores.transpose(1, 2), q[:, rows]))
        dkeys.mul_(ctx.scale)
        return (
            _by_time(dqueries, ctx.batch, ctx.shared),
            _by_time(dkeys, ctx.batch, 1),
            _by_time(dvalues, ctx.batch, 1),
            None,
            None,
        )


@dataclass(frozen=True)
class _Blocks:
    """How the work is cut up, and the memory in which it is done."""

    length: int
    rows: int
    """Positions in a block, n."""
    shared: int
    """Query heads per key head, R."""
    groups: int
    """Groups worked on at once, g."""
    future: Tensor
    """(n R, n), minus infinity where a key comes after the query; for the last n keys that a block sees."""
    scratch: Tensor | None
    """Room for the scores of one block after the other; fresh memory costs more than the arithmetic on it."""

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, *, reuses_memory: bool) -> _Blocks:
        """For queries (G, T R, D) and keys (G, T, D)."""
        groups, length = keys.shape[:2]
        shared = queries.shape[1] // length
        rows = min(BLOCK_ROWS, length)
        future = torch.full((rows, rows), -math.inf, dtype=keys.dtype).triu_(1).repeat_interleave(shared, 0)
        per_group = rows * shared * length
        at_once = min(groups, max(1, BLOCK_BYTES // (per_group * keys.element_size())))
        scratch = keys.new_empty(at_once * per_group) if reuses_memory else None
        return cls(length, rows, shared, at_once, future, scratch)

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors, some groups at a time."""
        return zip(*(tensor.split(self.groups) for tensor in tensors), strict=True)

    def in_order(self) -> Iterator[tuple[slice, slice]]:
        """Block after block: its rows of the queries, and the keys that they see."""
        for start in range(0, self.length, self.rows):
            stop = min(start + self.rows, self.length)
            yield slice(start * self.shared, stop * self.shared), slice(0, stop)

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax of (g, n R, D) queries over (g, j, D) keys: (g, n R, j), in `scratch` if there is one."""
        shape = (*queries.shape[:2], keys.shape[1])
        scores = None if self.scratch is None else self.scratch[: math.prod(shape)].view(shape)
        scores = torch.bmm(queries, keys.transpose(1, 2), out=scores)
        rows = queries.shape[1] // self.shared
        scores[:, :, -rows:].add_(self.future[: queries.shape[1], :rows])
        return torch.softmax(scores, -1, out=scores)


def _by_group(x: Tensor, shared: int) -> Tensor:
    """(B, T, K R, D) -> (B K, T R, D)"""
    return x.unflatten(2, (-1, shared)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _by_time(x: Tensor, batch: int, shared: int) -> Tensor:
    """(B K, T R, D) -> (B, T, K R, D)"""
    return x.unflatten(1, (-1, shared)).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
