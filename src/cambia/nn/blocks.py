"""Tensors in blocks of rows: what is measured over a whole tensor, added up block by block.

A row is an entry of a tensor's first axis. Growing a weight needs a few numbers about all of it, such as its
root mean square. Added up in blocks of a fixed size they take little memory, and a tensor that is never in
memory as a whole, because it is read from a file in the same blocks, gives the same bits.

    >>> row_blocks((100_000, 64))
    [(0, 16384), (16384, 32768), (32768, 49152), (49152, 65536), (65536, 81920), (81920, 100000)]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BLOCK = 2**20
"""Entries of a block."""


def row_blocks(shape: Sequence[int]) -> list[tuple[int, int]]:
    """First row and the row after the last of each block of a tensor of at least one axis.

    Each is a multiple of 16 rows long, but for the last, which may be longer or the only one. (torch draws
    normal numbers 16 at a time: so long as blocks hold whole groups, they can be drawn one by one.)
    """
    rows = shape[0]
    size = max(16, BLOCK // max(1, math.prod(shape[1:])) // 16 * 16)
    starts = list(range(0, rows, size)) or [0]
    if len(starts) > 1 and rows - starts[-1] < 16:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))


def blocks_of(tensor: Tensor) -> Iterable[Tensor]:
    """The blocks of a tensor, as views."""
    if not tensor.dim():
        return [tensor]
    return [tensor[first:last] for first, last in row_blocks(tensor.shape)]


def root_mean_square(blocks: Iterable[Tensor]) -> float:
    """Of all entries, added up in float64; 0 where there are none."""
    total, count = 0.0, 0
    for block in blocks:
        total += block.double().pow(2).sum().item()
        count += block.numel()
    return math.sqrt(total / count) if count else 0.0


def mean_along(blocks: Iterable[Tensor], dim: int) -> Tensor:
    """The mean along an axis, which is kept with size 1; added up in float64."""
    if dim:
        return torch.cat([block.double().mean(dim, keepdim=True).to(block.dtype) for block in blocks])
    sums, rows, dtype = [], 0, torch.float64
    for block in blocks:
        sums = [block.double().sum(0) + sum(sums)]
        rows, dtype = rows + len(block), block.dtype
    return (sums[0] / rows).to(dtype)[None]
