"""A tensor map carried out a block of rows at a time, on a tensor that is never in memory as a whole.

>>> old = HeldTensor(torch.ones(4, 2))
>>> torch.cat(list(grown_blocks(tensor_map, old, seed=0))).equal(tensor_map.values(old.tensor, seed=0))
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cambia.growth.disk.shards import TensorSpec, spool
from cambia.nn.blocks import mean_along, root_mean_square, row_blocks
from cambia.nn.param_map import MEAN, TensorMap

HELD_BYTES = 2**24
"""What lies between two operators stays in memory up to this size, and goes through a file above it."""


class Rows(Protocol):
    """A tensor whose rows can be asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, index: Tensor) -> Tensor:
        """Rows by their number, as a tensor of their own; zeros, or anything, where it is negative."""
        ...


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """Rows of a tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(0, index.clamp_min(0))


def grown_blocks(tensor_map: TensorMap, old: Rows | None, *, seed: int) -> Iterator[Tensor]:
    """What `TensorMap.values` gives, the same bits, in blocks of rows from the first to the last.

    Args:
        old: the tensor before growth; None where the map has no source.
        seed: of what is drawn at random.
    """
    draw = _drawing(tensor_map, old, seed)
    mean = _mean_row(tensor_map, old)
    for first, last in row_blocks(tensor_map.shape_after(old.shape if old is not None else ())):
        # Drawn for every block, also where nothing is filled: the next block's numbers come after these.
        drawn = None if draw is None else draw(last - first)
        if old is None:
            assert drawn is not None
            yield drawn
            continue
        axis = tensor_map.axes.get(0)
        index = torch.arange(first, last) if axis is None else axis.index[first:last]
        rows = old.read(index)  # (rows of the block, rest of the old shape)
        if mean is not None:
            rows[index == MEAN] = mean
        for place, group in () if axis is None else axis.groups.items():
            if first <= place < last:
                rows[place - first] = mean_along([old.read(torch.tensor(list(group)))], 0)[0]
        yield tensor_map.of_rows(first, last).applied(rows, drawn)


def grown_rows(tensor_map: TensorMap, old: Rows | None, *, seed: int, path: Path) -> Rows:
    """The whole tensor after growth, to be read again: in memory, or in a file at `path` if it is large."""
    shape = tensor_map.shape_after(old.shape if old is not None else ())
    spec = TensorSpec(shape, torch.float32 if old is None else old.dtype)
    blocks = grown_blocks(tensor_map, old, seed=seed)
    return HeldTensor(torch.cat(list(blocks))) if spec.num_bytes <= HELD_BYTES else spool(path, spec, blocks)


def _drawing(tensor_map: TensorMap, old: Rows | None, seed: int) -> Callable[[int], Tensor] | None:
    """Gives the fill's values for the next so many rows; None where nothing is filled."""
    if not tensor_map.is_filled:
        return None
    rms = root_mean_square(_blocks(old)) if old is not None and tensor_map.fill.needs_level else 0.0
    draw = tensor_map.fill.drawing(rms=rms, dtype=None if old is None else old.dtype, seed=seed)
    rest = tensor_map.shape_after(old.shape if old is not None else ())[1:]
    return lambda count: draw((count, *rest))


def _mean_row(tensor_map: TensorMap, old: Rows | None) -> Tensor | None:
    """The mean of all old rows, where some new row starts as it."""
    axis = tensor_map.axes.get(0)
    if old is None or axis is None or not bool((axis.index == MEAN).any()):
        return None
    return mean_along(_blocks(old), 0)[0]


def _blocks(old: Rows) -> Iterator[Tensor]:
    return (old.read(torch.arange(first, last)) for first, last in row_blocks(old.shape))
