"""What a training step spends its memory traffic on, each in as few passes as PyTorch allows.

A matrix product runs near a processor's arithmetic peak. What remains of a step is reading and writing
tensors: with ordinary operations, autograd walks over memory once per operation, keeps what lies between,
and asks the system for fresh pages each time. Each function here keeps as little as its gradient
needs, works in place on what it owns, and has a hand-written backward:

`rms_norm`               Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
`rotate`                 rotary positions, Su et al. 2021, https://arxiv.org/abs/2104.09864
`swiglu`                 the gate of a feed-forward part, Shazeer 2020, https://arxiv.org/abs/2002.05202
`linear_cross_entropy`   output head and loss in one, the logits only ever there in chunks, as in
                         Liger Kernel, https://arxiv.org/abs/2410.10989

    >>> y = rms_norm(x, weight, eps=1e-6)                              # (..., C) -> (..., C)
    >>> loss = linear_cross_entropy(hidden, head.weight, targets)      # (B, T, C), (V, C), (B, T) -> scalar

Each has a plain twin (`plain_rms_norm`, ...) that says what it computes, equal up to rounding. The twin is
taken where fusing is someone else's work or in the way: under `torch.compile` and autocast, for half
precision, inside `torch.func`. The hand-written gradients can be taken once; `create_graph=True` raises.
(`cambia.nn.attention` holds the fifth: causal attention on a processor.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

# B batch, T time, N = B*T rows, C hidden size, F ffn size (grows), H heads (grow), D head size, V vocabulary

IGNORE_INDEX = -100
"""The target that means "this position has no loss", as everywhere in Hugging Face."""


def is_fusable(x: Tensor) -> bool:
    """Whether the hand-written forms serve `x`: eager, float32 or float64, no autocast, no `torch.func`."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not _under_autocast(x.device)
        and not torch._C._are_functorch_transforms_active()  # autograd.Function.apply asks the same question
    )


def _under_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse second derivatives; torch's `once_differentiable` misses those through saved tensors."""

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
    @first_derivative_only
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
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation turns back by the same angle.
        return torch.mul(dy, cos).addcmul_(swap_halves(dy), sin, value=-1), None, None


# ---- SwiGLU --------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for two tensors (..., F)."""
    if gate.requires_grad and is_fusable(gate) and up.dtype == gate.dtype:
        return _SwiGLU.apply(gate, up)
    return plain_swiglu(gate, up)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes."""
    return F.silu(gate) * up


class _SwiGLU(Function):
    """Keeps the two partial derivatives instead of the inputs: one tensor less, and no second exponential."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        # With s = sigmoid(gate) and a = gate * s: silu = a, and its slope is s + a * (1 - s) = lerp(s, 1, a).
        slope = torch.sigmoid(gate)
        activation = torch.mul(gate, slope)
        slope.lerp_(slope.new_ones(()), activation)
        ctx.save_for_backward(slope.mul_(up), activation)
        return activation * up

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        by_gate, by_up = ctx.saved_tensors
        return dy * by_gate, dy * by_up


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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wants: tuple[bool, bool]
    ) -> Tensor:
        wants_hidden, wants_weight = wants
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kept = (targets != IGNORE_INDEX).unsqueeze(1)  # (N, 1)
        targets = targets.unsqueeze(1).where(kept, 0)  # (N, 1)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        total = hidden.new_zeros((), dtype=wide)
        size = chunk_rows(weight.shape[0], wide.itemsize, hidden.device)
        # One buffer for all chunks: fresh memory costs more than the arithmetic on it.
        buffer = hidden.new_empty((min(size, len(hidden)), weight.shape[0]), dtype=wide)
        minus_one = hidden.new_full((size, 1), -1, dtype=wide)
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            logits = buffer[: len(hidden[chunk])]  # (n, V)
            if wide == hidden.dtype:
                torch.mm(hidden[chunk], weight.t(), out=logits)
            else:
                logits.copy_(hidden[chunk] @ weight.t())
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
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = (None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors)
        return dhidden, dweight, None, None
