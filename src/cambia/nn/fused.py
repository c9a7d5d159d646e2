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

The hand-written gradients can be taken once: `create_graph=True` raises, `torch.func` works.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

# B batch, T time, N = B*T rows, C hidden size, F ffn size (grows), H heads, D head size, V vocabulary

IGNORE_INDEX = -100
"""The target that means "this position has no loss", as everywhere in Hugging Face."""


def is_fusable(x: Tensor) -> bool:
    """Whether the hand-written kernels serve `x`: eager mode, float32 or float64, no autocast, no `torch.func`."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not _under_autocast(x.device)
        and not torch._C._are_functorch_transforms_active()  # autograd.Function.apply asks the same question
    )


def _under_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse second derivatives. (torch's `once_differentiable` misses those that come through saved tensors.)"""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, which the fused functions do not have; "
                "use torch.func (grad, jvp, hessian), where their plain forms are taken"
            )
        return backward(ctx, *gradients)

    return checked


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
    @_once
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
    @_once
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
    """Blocks of queries against the keys they may see, as batched matrix products that fit in the cache.

    The R = H/K heads of a group share their keys, so their queries are stacked into one matrix per group
    (row t*R + r is head r at time t), and there are G = B*K groups. Memory stays linear in T: backward
    computes the probabilities again, as in FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.batch, ctx.scale = key.shape[0], scale
        ctx.shared = query.shape[2] // key.shape[2]
        queries = _by_group(query, ctx.shared) * scale  # (G, T R, D)
        keys, values = _by_group(key, 1), _by_group(value, 1)  # (G, T, D)
        ctx.save_for_backward(queries, keys, values)
        mixed = torch.empty_like(queries)
        blocks = _Blocks.of(queries, keys)
        for q, k, v, out in blocks.split(queries, keys, values, mixed):
            for rows, seen in blocks:
                probs = blocks.probabilities(q[:, rows], k[:, seen])  # (g, n R, j)
                out[:, rows] = torch.bmm(probs, v[:, seen])
        return _by_time(mixed, ctx.batch, ctx.shared)

    @staticmethod
    @_once
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        blocks = _Blocks.of(queries, keys)
        given = (queries, keys, values, _by_group(dmixed, ctx.shared))
        for q, k, v, dout, dq, dk, dv in blocks.split(*given, dqueries, dkeys, dvalues):
            for rows, seen in blocks:
                probs = blocks.probabilities(q[:, rows], k[:, seen])
                dv[:, seen].add_(torch.bmm(probs.transpose(1, 2), dout[:, rows]))
                dprobs = torch.bmm(dout[:, rows], v[:, seen].transpose(1, 2))
                dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
                dq[:, rows] = torch.bmm(dscores, k[:, seen])
                dk[:, seen].add_(torch.bmm(dscores.transpose(1, 2), q[:, rows]))
        dqueries.mul_(ctx.scale)
        return (
            _by_time(dqueries, ctx.batch, ctx.shared),
            _by_time(dkeys, ctx.batch, 1),
            _by_time(dvalues, ctx.batch, 1),
            None,
        )


class _Blocks(NamedTuple):
    """How the work is cut: iterating gives (rows of queries, keys that they see) from the first to the last."""

    length: int
    rows: int
    """Positions in a block."""
    shared: int
    """Query heads per key head."""
    groups: int
    """Groups worked on at once."""
    future: Tensor
    """(n R, n), minus infinity where a key comes after the query, within the last n keys that a block sees."""
    scratch: Tensor
    """Memory for one block's scores, since fresh memory costs more than the arithmetic on it."""

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> _Blocks:
        groups, length = keys.shape[:2]
        shared = queries.shape[1] // length
        rows = min(32, length)
        future = torch.full((rows, rows), -math.inf, dtype=keys.dtype).triu_(1).repeat_interleave(shared, 0)
        per_group = rows * shared * length
        at_once = min(groups, max(1, 2**21 // (per_group * keys.element_size())))
        return cls(length, rows, shared, at_once, future, keys.new_empty(at_once * per_group))

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors, some groups at a time."""
        return zip(*(tensor.split(self.groups) for tensor in tensors), strict=True)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for start in range(0, self.length, self.rows):
            stop = min(start + self.rows, self.length)
            yield slice(start * self.shared, stop * self.shared), slice(0, stop)

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax of (g, n R, D) queries over their (g, j, D) keys; lives until the next call."""
        shape = (*queries.shape[:2], keys.shape[1])
        scores = self.scratch[: math.prod(shape)].view(shape)
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        new = queries.shape[1] // self.shared
        scores[:, :, -new:].add_(self.future[: queries.shape[1], :new])
        return torch.softmax(scores, -1, out=scores)


def _by_group(x: Tensor, shared: int) -> Tensor:
    """(B, T, K R, D) -> (B K, T R, D)"""
    return x.unflatten(2, (-1, shared)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _by_time(x: Tensor, batch: int, shared: int) -> Tensor:
    """(B K, T R, D) -> (B, T, K R, D)"""
    return x.unflatten(1, (-1, shared)).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


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
    @_once
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
    device = hidden.device
    dtype = torch.get_autocast_dtype(device.type) if _under_autocast(device) else hidden.dtype
    # Inside forward gradients are always off, so whether they are wanted is asked here.
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
        minus_one = hidden.new_full((size, 1), -1, dtype=wide)
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            logits = torch.mm(hidden[chunk], weight.t()).to(wide)  # (n, V)
            log_probs = torch.log_softmax(logits, -1, out=logits)
            total -= (log_probs.gather(1, targets[chunk]) * kept[chunk]).sum()
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = softmax - one-hot, and zero where there is no target
            dlogits = log_probs.exp_().scatter_add_(1, targets[chunk], minus_one[: len(logits)])
            dlogits = dlogits.mul_(kept[chunk]).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[chunk])
            if dweight is not None and wide == hidden.dtype:
                dweight.addmm_(dlogits.t(), hidden[chunk])
            elif dweight is not None:
                dweight += dlogits.t() @ hidden[chunk]  # summed in float32, multiplied in half precision
        ctx.gradients = (dhidden, dweight)
        return total

    @staticmethod
    @_once
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = (None if gradient is None else gradient * dloss for gradient in ctx.gradients)
        return dhidden, dweight, None, None
