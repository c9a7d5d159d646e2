"""Tensors in blocks of rows: nothing is left out, and what is measured or drawn is that of the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.nn import blocks
from cambia.nn.blocks import blocks_of, mean_along, root_mean_square, row_blocks
from cambia.nn.param_map import Fill


@given(rows=st.integers(0, 200_000), width=st.integers(0, 5000))
def test_blocks_cover_all_rows_in_groups_of_sixteen(rows: int, width: int) -> None:
    found = row_blocks((rows, width))
    assert found[0][0] == 0 and found[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    assert all((last - first) % 16 == 0 for first, last in found[:-1])
    assert len(found) == 1 or all(last - first >= 16 for first, last in found)
    assert all((last - first) * width <= 2 * max(blocks.BLOCK, 16 * width) for first, last in found)


@pytest.mark.parametrize("shape", [(70,), (67, 5), (33, 1), (40, 3, 2), ()])
def test_measured_in_blocks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 32)
    tensor = torch.randn(shape)
    assert root_mean_square(blocks_of(tensor)) == pytest.approx(tensor.double().pow(2).mean().sqrt().item())
    for dim in range(tensor.dim()):
        expected = tensor.double().mean(dim, keepdim=True).float()
        torch.testing.assert_close(mean_along(blocks_of(tensor), dim), expected)


def test_nothing_has_no_level() -> None:
    assert root_mean_square([]) == root_mean_square([torch.ones(0, 3)]) == 0.0


@given(rows=st.integers(1, 300), width=st.integers(1, 9), double=st.booleans())
def test_numbers_drawn_in_blocks_are_those_drawn_at_once(rows: int, width: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    fill, old = Fill.normal(0.02), torch.randn(4, 4, dtype=dtype)
    whole = fill.draw((rows, width), like=old, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 64)
        parts = row_blocks((rows, width))
    draw = fill.drawing(rms=root_mean_square([old]), dtype=dtype, seed=5)
    assert torch.cat([draw((last - first, width)) for first, last in parts]).equal(whole)
    assert math.isfinite(whole.sum().item())
