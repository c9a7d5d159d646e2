"""The fused functions against their plain twins: values, gradients, and where the twin must be taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.nn import attention, fused

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
dtypes = st.sampled_from([torch.float64, torch.float32])
sizes = st.integers(1, 9)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(ours: Tensor, plain: Tensor) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    error = (ours - plain).abs().max() / plain.abs().max().clamp_min(0.1)
    assert error <= TOLERANCE[ours.dtype]


def agree(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Same values, and same gradients for every input."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    ours_out, plain_out = ours(*inputs), plain(*inputs)
    close(ours_out, plain_out)
    slope = normal(*ours_out.shape, dtype=ours_out.dtype, seed=99)
    ours_grads = torch.autograd.grad(ours_out, inputs, slope, retain_graph=True)
    for a, b in zip(ours_grads, torch.autograd.grad(plain_out, inputs, slope), strict=True):
        close(a, b)
    # Nothing that backward needs was spent by it.
    for a, b in zip(ours_grads, torch.autograd.grad(ours_out, inputs, slope), strict=True):
        assert torch.equal(a, b)


@given(dtype=dtypes, batch=sizes, time=sizes, hidden=sizes)
def test_rms_norm(dtype: torch.dtype, batch: int, time: int, hidden: int) -> None:
    x, weight = normal(batch, time, hidden, dtype=dtype), normal(hidden, dtype=dtype, seed=1)
    agree(
        lambda x, w: fused.rms_norm(x, w, eps=1e-3),
        lambda x, w: fused.plain_rms_norm(x, w, eps=1e-3),
        x,
        weight,
    )


def test_rms_norm_of_zeros_and_of_large_numbers_is_finite() -> None:
    weight = torch.ones(8)
    assert torch.equal(fused.rms_norm(torch.zeros(2, 8), weight, eps=1e-6), torch.zeros(2, 8))
    assert fused.rms_norm(torch.full((2, 8), 1e15), weight, eps=1e-6).allclose(torch.ones(2, 8))


@given(dtype=dtypes, batch=sizes, time=sizes, heads=sizes, pairs=sizes)
def test_rotate(dtype: torch.dtype, batch: int, time: int, heads: int, pairs: int) -> None:
    angles = normal(1, time, 1, pairs, dtype=dtype, seed=1)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    x = normal(batch, time, heads, 2 * pairs, dtype=dtype)
    agree(lambda x: fused.rotate(x, cos, sin), lambda x: fused.plain_rotate(x, cos, sin), x)
    close(fused.rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


@given(dtype=dtypes, rows=sizes, width=sizes)
def test_swiglu(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    agree(fused.swiglu, fused.plain_swiglu, gate * 5, up)


@given(
    dtype=dtypes,
    batch=st.integers(1, 3),
    time=st.sampled_from([1, 2, 31, 32, 33, 70]),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    half=st.integers(1, 4),
    bounds=st.sampled_from([(1, 0), (1, 100), (2**21, 0), (2**21, 100)]),
)
def test_blocked_attention(
    dtype: torch.dtype,
    batch: int,
    time: int,
    kv_heads: int,
    shared: int,
    half: int,
    bounds: tuple[int, int],
) -> None:
    shape = (batch, time, kv_heads, 2 * half)
    query = normal(batch, time, kv_heads * shared, 2 * half, dtype=dtype)
    key, value = normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_BYTES", bounds[0])
        patch.setattr(attention, "MAX_KEPT_LENGTH", bounds[1])
        agree(
            lambda q, k, v: attention.blocked_attention(q, k, v, scale=0.7),
            lambda q, k, v: attention.plain_causal_attention(q, k, v, scale=0.7),
            query,
            key,
            value,
        )


@given(
    dtype=dtypes,
    rows=st.integers(1, 12),
    hidden=sizes,
    vocabulary=st.integers(2, 40),
    chunk=st.integers(1, 12),
    num_items=st.sampled_from([None, 7]),
    ignored=st.booleans(),
)
def test_linear_cross_entropy(
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    vocabulary: int,
    chunk: int,
    num_items: int | None,
    ignored: bool,
) -> None:
    targets = torch.randint(vocabulary, (2, rows), generator=torch.Generator().manual_seed(rows))
    if ignored:
        targets[1, :] = fused.IGNORE_INDEX
    x, weight = normal(2, rows, hidden, dtype=dtype), normal(vocabulary, hidden, dtype=dtype, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "chunk_rows", lambda *_: chunk)
        agree(
            lambda x, w: fused.linear_cross_entropy(x, w, targets, num_items=num_items),
            lambda x, w: fused.cross_entropy(x @ w.t(), targets, num_items=num_items),
            x,
            weight,
        )


def test_linear_cross_entropy_survives_logits_far_apart() -> None:
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1000.0]])
    assert fused.linear_cross_entropy(x, weight, torch.tensor([0])).item() == 1000.0


def test_linear_cross_entropy_without_a_target_is_not_a_number_as_in_torch() -> None:
    targets = torch.full((3,), fused.IGNORE_INDEX)
    assert fused.linear_cross_entropy(torch.ones(3, 2), torch.ones(5, 2), targets).isnan()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fused.rms_norm(x, x[0], eps=1e-3),
        lambda x: fused.swiglu(x, x.flip(0)),
        lambda x: fused.rotate(x.view(1, 3, 2, 2), x.view(1, 3, 1, 4)[..., :2], x.view(1, 3, 1, 4)[..., 2:]),
        lambda x: attention.blocked_attention(*[x.view(1, 3, 2, 2)] * 3, scale=0.5),
        lambda x: fused.linear_cross_entropy(x, x.flip(1), torch.tensor([0, 2, -100])),
    ],
    ids=["rms_norm", "swiglu", "rotate", "blocked_attention", "linear_cross_entropy"],
)
def test_gradcheck(function: Callable[[Tensor], Tensor], request: pytest.FixtureRequest) -> None:
    x = normal(3, 4).requires_grad_()
    if request.node.callspec.id == "rotate":  # its tables are constants
        tables = normal(1, 3, 1, 4, seed=1)
        assert torch.autograd.gradcheck(
            lambda x: fused.rotate(x.view(1, 3, 2, 2), tables[..., :2], tables[..., 2:] * 0), (x,)
        )
        return
    assert torch.autograd.gradcheck(function, (x,))


def test_frozen_weights_get_no_gradient() -> None:
    x, weight = normal(3, 4).requires_grad_(), normal(4, seed=1)
    fused.rms_norm(x, weight, eps=1e-3).sum().backward()
    head = normal(6, 4, seed=2)
    fused.linear_cross_entropy(x, head, torch.tensor([0, 1, 2])).backward()
    assert weight.grad is None and head.grad is None and x.grad is not None


def test_a_second_derivative_is_refused() -> None:
    x = normal(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(fused.swiglu(x, x).sum(), x, create_graph=True)


def test_where_the_plain_form_is_taken() -> None:
    x = torch.ones(2, 4)
    assert fused.is_fusable(x) and fused.is_fusable(x.double())
    assert not fused.is_fusable(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused.is_fusable(x)
    torch.func.vmap(lambda row: fused.swiglu(row, row))(x)
    slope = torch.func.grad(lambda x: fused.rms_norm(x, x[0], eps=1e-3).sum())(x)
    assert slope.isfinite().all()


def test_half_precision_norm_is_computed_in_float32() -> None:
    x, weight = normal(3, 64, dtype=torch.bfloat16) * 100, torch.ones(64, dtype=torch.bfloat16)
    exact = fused.rms_norm(x.double(), weight.double(), eps=1e-6)
    ours = fused.rms_norm(x, weight, eps=1e-6)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_cross_entropy_in_half_precision(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    targets = torch.tensor([0, 3, -100, 7, 2])
    x = normal(5, 16, dtype=dtype).requires_grad_()
    weight = normal(9, 16, dtype=dtype, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = fused.linear_cross_entropy(x, weight, targets)
        plain = fused.cross_entropy(torch.nn.functional.linear(x, weight), targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-2)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(plain, (x, weight)), strict=True
    ):
        assert a.dtype == b.dtype == dtype
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()
