"""The four functions that a training step spends its memory traffic on, each in as few passes as PyTorch allows.

A matrix product on a processor runs near its arithmetic peak; what remains of a step is reading and
writing tensors. Written with ordinary operations, autograd keeps every intermediate result alive and
walks over memory once per operation. Each function here saves only its inputs, works in place on what it
owns, and has a hand-written backward:

===========================  ==================================================================
`rms_norm`                   Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
`rotate`                     rotary positions, Su et al. 2021, https://arxiv.org/abs/2104.09864
`swiglu`                     gated FFN, Shazeer 2020, https://arxiv.org/abs/2002.05202
`linear_cross_entropy`       output head and loss together: the logits exist one chunk at a time,
                             as in Liger Kernel, https://arxiv.org/abs/2410.10989
===========================  ==================================================================

Every function has a plain twin (`plain_rms_norm`, ...) that says what it computes. The twin is used where
fusing is someone else's work or a hindrance: under `torch.compile`, under autocast, for half-precision
tensors and inside `torch.func` transforms. Both agree to rounding; the tests hold them together.

    >>> y = rms_norm(x, weight, eps=1e-6)                              # (..., C) -> (..., C)
    >>> loss = linear_cross_entropy(hidden, head.weight, targets)      # (B, T, C), (V, C), (B, T) -> scalar

The hand-written gradients are differentiable once; a second derivative raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# B batch, T time, N = B*T rows, C hidden size, F ffn size (grows), H heads, D head size, V vocabulary

IGNORE_INDEX = -100
"""The target that means "this position has no loss", as everywhere in Hugging Face."""


def is_fusable(x: Tensor) -> bool:
    """Whether the hand-written kernels serve `x`: eager mode, float32 or float64, no autocast, no `torch.func`."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()  # autograd.Function.apply asks the same question
    )


# ---- RMS norm ------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis; computed in float32 or above.

    `weight` is (C,), ones at birth; `eps` is added to the mean square.
    """

    def __init__(self, hidden_size: int, *, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMS norm of `x` (..., C) with gain `weight` (C,)."""
    if is_fusable(x) and weight.dtype == x.dtype:
        return _RMSNorm.apply(x, weight, eps)
    return plain_rms_norm(x, weight, eps=eps)


def plain_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """What `rms_norm` computes. The gain is applied in the input's own type, as in Llama."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one reading pass, no squares in memory
        inv_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inv_rms)
        return torch.mul(x, inv_rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inv_rms = ctx.saved_tensors
        size = x.shape[-1]
        product = torch.mul(x, dy)
        # d inv_rms / dx = -x * inv_rms³ / C, so the second term of dx is x * (w · x dy) * inv_rms³ / C
        slope = (product.view(-1, size) @ weight).view_as(inv_rms).mul_(inv_rms.square().div_(-size))
        dweight = inv_rms.view(-1) @ product.view(-1, size) if ctx.needs_input_grad[1] else None
        dx = torch.mul(dy, weight, out=product).addcmul_(x, slope).mul_(inv_rms)
        return dx, dweight, None


# ---- rotary positions ----------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head of `x` (B, T, H, D) by its position's angles.

    The pairs are (i, i + D/2), as in Llama. `cos` and `sin` are (B or 1, T, 1, D); `sin` carries the sign of
    the half that it lands in, minus in the first, so that one swap of halves is all that is left to do.
    """
    if is_fusable(x) and cos.dtype == x.dtype:
        return _Rotate.apply(x, cos, sin)
    return plain_rotate(x, cos, sin)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotate` computes."""
    return (x * cos + swap_halves(x) * sin).to(x.dtype)


def swap_halves(x: Tensor) -> Tensor:
    """(..., D): the second half of the last axis, then the first."""
    return torch.roll(x, x.shape[-1] // 2, dims=-1)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.mul(x, cos).addcmul_(swap_halves(x), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation turns back by the same angle.
        return torch.mul(dy, cos).addcmul_(swap_halves(dy), sin, value=-1), None, None


# ---- causal attention ----------------------------------------------------------------------------


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Softmax attention of every position to itself and its past.

    `query` is (B, T, H, D), `key` and `value` (B, T, K, D) with K dividing H; returns (B, T, H, D).
    """
    if is_fusable(query) and query.device.type == "cpu":
        return _CausalAttention.apply(query, key, value, scale)
    return plain_causal_attention(query, key, value, scale=scale)


def plain_causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """What `causal_attention` computes."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T, D), (B, K, T, D)
    gqa = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa).transpose(1, 2)


class _CausalAttention(Function):
    """Blocks of queries against all keys they may see, as batched matrix products.

    The heads of a group share their keys, so their queries are stacked into one matrix (row t*R + r is head r
    of the group at time t): G = B*K products of (n*R, D) by (D, j). Probabilities are computed again in
    backward, so memory stays linear in T.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.batch, ctx.kv_heads, ctx.scale = key.shape[0], key.shape[2], scale
        ctx.group = query.shape[2] // key.shape[2]
        queries, keys, values = (_by_group(x, ctx.kv_heads) for x in (query, key, value))
        ctx.save_for_backward(queries, keys, values)
        mixed = torch.empty_like(queries)  # (G, T R, D)
        for block in _blocks(queries, keys, ctx.group):
            probs = block.probabilities(queries, keys, scale)
            block.rows(mixed).copy_(torch.bmm(probs, block.seen(values)))
        return _by_time(mixed, ctx.batch, ctx.kv_heads, ctx.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        dmixed = _by_group(dmixed, ctx.kv_heads)
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries, keys, ctx.group):
            probs = block.probabilities(queries, keys, ctx.scale)
            block.seen(dvalues).baddbmm_(probs.transpose(1, 2), block.rows(dmixed))
            dprobs = torch.bmm(block.rows(dmixed), block.seen(values).transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            block.rows(dqueries).copy_(torch.bmm(dscores, block.seen(keys)))
            block.seen(dkeys).baddbmm_(dscores.transpose(1, 2), block.rows(queries), alpha=ctx.scale)
        dqueries.mul_(ctx.scale)
        return (
            _by_time(dqueries, ctx.batch, ctx.kv_heads, ctx.group),
            _by_time(dkeys, ctx.batch, ctx.kv_heads, 1),
            _by_time(dvalues, ctx.batch, ctx.kv_heads, 1),
            None,
        )


class _Block(NamedTuple):
    """Queries `start` to `stop` of some groups, and the keys that they see."""

    groups: slice
    start: int
    stop: int
    group: int
    future: Tensor
    """(n R, n): minus infinity where a key of the block's own stretch lies in the future."""

    def rows(self, x: Tensor) -> Tensor:
        return x[self.groups, self.start * self.group : self.stop * self.group]

    def seen(self, x: Tensor) -> Tensor:
        return x[self.groups, : self.stop]

    def probabilities(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        rows, seen = self.rows(queries), self.seen(keys)
        scores = torch.bmm(rows, seen.transpose(1, 2)).mul_(scale)
        scores[:, :, self.start :].add_(self.future)
        return torch.softmax(scores, -1, out=scores)


BLOCK_ROWS = 64
BLOCK_BYTES = 2**22


def _blocks(queries: Tensor, keys: Tensor, group: int) -> Iterator[_Block]:
    count, length = keys.shape[:2]
    size = min(BLOCK_ROWS, length)
    future = torch.full((size, size), -math.inf, dtype=keys.dtype).triu_(1).repeat_interleave(group, 0)
    at_once = max(1, BLOCK_BYTES // (size * group * length * keys.element_size()))
    for first in range(0, count, at_once):
        for start in range(0, length, size):
            stop = min(start + size, length)
            n = stop - start
            yield _Block(slice(first, first + at_once), start, stop, group, future[: n * group, :n])


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K R, D) -> (B K, T R, D)"""
    b, t, h, d = x.shape
    return x.view(b, t, kv_heads, h // kv_heads, d).transpose(1, 2).reshape(b * kv_heads, -1, d)


def _by_time(x: Tensor, batch: int, kv_heads: int, group: int) -> Tensor:
    """(B K, T R, D) -> (B, T, K R, D)"""
    d = x.shape[-1]
    return x.view(batch, kv_heads, -1, group, d).transpose(1, 2).reshape(batch, -1, kv_heads * group, d)


# ---- SwiGLU --------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for two tensors (..., F)."""
    if is_fusable(gate) and up.dtype == gate.dtype:
        return _SwiGLU.apply(gate, up)
    return plain_swiglu(gate, up)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes."""
    return F.silu(gate) * up


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # With s = sigmoid(gate) and a = gate * s: silu = a, and its slope is s + a * (1 - s) = lerp(s, 1, a).
        slope = torch.sigmoid(gate)
        activation = torch.mul(gate, slope)
        slope.lerp_(slope.new_ones(()), activation)
        return slope.mul_(up).mul_(dy), activation.mul_(dy)


# ---- output head and loss ------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
    """Mean negative log-likelihood in nats of `targets` (...) under `logits` (..., V); -100 has no loss.

    `num_items` replaces the count of targets as the divisor: with gradient accumulation it is the count over
    the whole effective batch (`num_items_in_batch` in Hugging Face). Computed in float32 or above.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)  # (N, V)
    targets = targets.flatten().to(logits.device)
    if num_items is None:
        return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX)
    return F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, num_items: Tensor | int | None = None
) -> Tensor:
    """`cross_entropy` of the logits ``hidden @ weight.T`` without ever holding more than a chunk of them.

    `hidden` is (..., C), `weight` (V, C), `targets` (...). The gradients are computed beside the loss, while
    a chunk of logits is still in the cache, so backward only scales them. Unlike its siblings this one also
    serves autocast and half precision, where the logits are the largest tensor of all.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return cross_entropy(F.linear(hidden, weight), targets, num_items=num_items)
    rows = hidden.flatten(0, -2)  # (N, C)
    targets = targets.flatten().to(hidden.device)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        # A fresh grad mode is entered inside forward, so whether gradients are wanted is asked here.
        wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
        return _LinearCrossEntropy.apply(rows.to(dtype), weight.to(dtype), targets, wants) / num_items


def chunk_rows(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """How many rows of logits are worked on at once: few enough to stay in a processor's cache."""
    chunk_bytes = 2**23 if device.type == "cpu" else 2**28
    return max(128, chunk_bytes // (vocabulary * itemsize))


class _LinearCrossEntropy(Function):
    """The summed loss; (N, C), (V, C), (N,) -> scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wants: tuple[bool, bool]) -> Tensor:
        wants_hidden, wants_weight = wants
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kept = (targets != IGNORE_INDEX).unsqueeze(1)  # (N, 1)
        targets = targets.unsqueeze(1).where(kept, 0)  # (N, 1)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        total = hidden.new_zeros((), dtype=wide)
        size = chunk_rows(weight.shape[0], wide.itemsize, hidden.device)
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            logits = torch.mm(hidden[chunk], weight.t()).to(wide)  # (n, V)
            log_probs = torch.log_softmax(logits, -1, out=logits)
            total -= (log_probs.gather(1, targets[chunk]) * kept[chunk]).sum()
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = softmax - one-hot, and zero where there is no target
            dlogits = log_probs.exp_().scatter_add_(1, targets[chunk], -torch.ones_like(total).expand(logits.shape[0], 1))
            dlogits = dlogits.mul_(kept[chunk]).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[chunk])
            if dweight is not None:
                dweight.addmm_(dlogits.t(), hidden[chunk])
        ctx.gradients = (dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = (None if gradient is None else gradient * dloss for gradient in ctx.gradients)
        return dhidden, dweight, None, None
