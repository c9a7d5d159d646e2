"""What a Part adds to one module of a model that itself stays: to a linear layer, a table, a norm.

A layer says ``W x``, with a delta ``W x + D x``. D is a whole matrix, or the product of two thin ones (LoRA,
Hu et al. 2021, https://arxiv.org/abs/2106.09685). A table answers a token with its row of ``W + D``. A norm's
output is multiplied by ``1 + g``. Every delta is born zero, and then nothing changes: not one bit.

Each row of a batch may take its delta from another Part (`Delta.by_row`): one batched product serves them
all. What a row comes to depends neither on what the other rows use nor on how many use the same: each is a
product of its own shape. So rows are not grouped by Part, and deltas of different rank are not padded into
one product. Either would round differently as Parts come and go (padding changed bits in 20 of 50 shapes).
"""

# N rows of a batch, T time, I a layer's inputs, O its outputs, V entries of a table, C its width, R rank

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

Adding = Callable[[Tensor, Tensor], Tensor]
"""(a module's input, its output) -> the output with what is added to it."""
LARGEST_STACK = 1 << 20
"""Entries up to which whole matrices of all rows are stacked; larger ones are used one row at a time."""


class Delta(nn.Module, ABC):
    """Added to what a module says; zero at birth."""

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Deltas of one module and one kind are computed together."""

    @abstractmethod
    def forward(self, given: Tensor, said: Tensor) -> Tensor:
        """What is added where all rows take this one.

        Args:
            given: the module's input, (..., I), or token ids.
            said: its output, (..., O).
        """

    @abstractmethod
    def by_row(self, rows: Sequence[Delta | None]) -> Adding:
        """Adds where each row takes its own.

        Args:
            rows: for each row a delta of this kind, or None for nothing.

        Returns:
            A function of the module's input, (N, T, I) or token ids (N, T), and its output, (N, T, O). Rows
            of None come out as they were, to the bit.
        """


class Matrix(Delta):
    """Added to a matrix (O, I): a linear layer's, or a table's, which has O entries of width I."""

    @abstractmethod
    def product(self) -> Tensor:
        """The delta as one matrix, (O, I)."""

    @abstractmethod
    def entries(self, ids: Tensor) -> Tensor:
        """The delta of some entries of a table: (...) -> (..., I)."""

    @abstractmethod
    def entries_by_row(self, rows: Sequence[Matrix | None]) -> Callable[[Tensor], Tensor]:
        """The same where each row takes its own: (N, T) -> (N, T, I)."""


class LowRank(Matrix):
    """``s B A`` with A (R, I) and B (O, R)."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, like: Tensor):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(_zeros(like, rank, inputs))
        self.B = nn.Parameter(_zeros(like, outputs, rank))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Random A, as for a linear layer's own weights, and B of zeros."""
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=generator).mul_(2 * bound).sub_(bound))
        self.B.zero_()

    @property
    def kind(self) -> Hashable:
        return "low rank", len(self.A)

    def product(self) -> Tensor:
        return self.B @ self.A * self.scale

    def forward(self, given: Tensor, said: Tensor) -> Tensor:
        low = linear(given.to(self.A.dtype), self.A)
        return (linear(low, self.B) * self.scale).to(said.dtype)

    def by_row(self, rows: Sequence[Delta | None]) -> Adding:
        reads, writes = self._stacked(rows)
        reads, writes = reads.transpose(1, 2), writes.transpose(1, 2)  # (N, I, R), (N, R, O)

        def adding(given: Tensor, said: Tensor) -> Tensor:
            low = torch.bmm(given.to(reads.dtype), reads)
            if said.dtype == writes.dtype:
                return torch.baddbmm(said, low, writes)  # product and sum in one
            return said + torch.bmm(low, writes).to(said.dtype)

        return adding

    def entries(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.B) @ self.A * self.scale

    def entries_by_row(self, rows: Sequence[Matrix | None]) -> Callable[[Tensor], Tensor]:
        reads, writes = self._stacked(rows)
        return lambda ids: torch.bmm(_each(embedding, ids, writes), reads)

    def _stacked(self, rows: Sequence[Delta | None]) -> tuple[Tensor, Tensor]:
        """A (N, R, I) and s B (N, O, R) of each row; zeros for none."""
        nothing = LowRank(self.A.shape[1], len(self.B), len(self.A), 1.0, self.A)
        each = [row if isinstance(row, LowRank) else nothing for row in rows]
        return torch.stack([d.A for d in each]), torch.stack([d.B * d.scale for d in each])


class Whole(Matrix):
    """A matrix D (O, I)."""

    def __init__(self, inputs: int, outputs: int, like: Tensor):
        super().__init__()
        self.D = nn.Parameter(_zeros(like, outputs, inputs))

    @property
    def kind(self) -> Hashable:
        return "whole"

    def product(self) -> Tensor:
        return self.D

    def forward(self, given: Tensor, said: Tensor) -> Tensor:
        return linear(given.to(self.D.dtype), self.D).to(said.dtype)

    def by_row(self, rows: Sequence[Delta | None]) -> Adding:
        each = self._each(rows)
        if self.D.numel() > LARGEST_STACK:
            return lambda given, said: said + _each(linear, given.to(self.D.dtype), each).to(said.dtype)
        stack = torch.stack(each).transpose(1, 2)  # (N, I, O)
        return lambda given, said: said + torch.bmm(given.to(stack.dtype), stack).to(said.dtype)

    def entries(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.D)

    def entries_by_row(self, rows: Sequence[Matrix | None]) -> Callable[[Tensor], Tensor]:
        each = self._each(rows)
        return lambda ids: _each(embedding, ids, each)

    def _each(self, rows: Sequence[Delta | None]) -> list[Tensor]:
        nothing = torch.zeros_like(self.D)
        return [row.D if isinstance(row, Whole) else nothing for row in rows]


class Lookup(Delta):
    """A matrix delta (V, C) as a table uses it: each token takes its entry.

    The matrix may serve the output head too, as in a model whose tables are tied; `scale` is what the table
    multiplies its entries with.
    """

    def __init__(self, matrix: Matrix, scale: float = 1.0):
        super().__init__()
        self.matrix, self.scale = matrix, scale

    @property
    def kind(self) -> Hashable:
        return "lookup", self.matrix.kind

    def forward(self, given: Tensor, said: Tensor) -> Tensor:
        return self._scaled(self.matrix.entries(given)).to(said.dtype)

    def by_row(self, rows: Sequence[Delta | None]) -> Adding:
        looked_up = self.matrix.entries_by_row([r.matrix if isinstance(r, Lookup) else None for r in rows])
        return lambda given, said: said + self._scaled(looked_up(given)).to(said.dtype)

    def _scaled(self, entries: Tensor) -> Tensor:
        return entries if self.scale == 1.0 else entries * self.scale


class Gain(Delta):
    """A norm's output times ``1 + g``, and a shift where the norm has one."""

    def __init__(self, width: int, like: Tensor, *, shifts: bool = False):
        super().__init__()
        self.g = nn.Parameter(_zeros(like, width))
        self.shift = nn.Parameter(_zeros(like, width)) if shifts else None

    @property
    def kind(self) -> Hashable:
        return "gain", self.shift is not None

    def forward(self, given: Tensor, said: Tensor) -> Tensor:
        return _louder(said, self.g, self.shift)

    def by_row(self, rows: Sequence[Delta | None]) -> Adding:
        each = [row if isinstance(row, Gain) else Gain(len(self.g), self.g) for row in rows]
        g = torch.stack([gain.g for gain in each])  # (N, C)
        shift = None
        if self.shift is not None:
            shift = torch.stack(
                [torch.zeros_like(gain.g) if gain.shift is None else gain.shift for gain in each]
            )

        def adding(given: Tensor, said: Tensor) -> Tensor:
            # The norm may be one of heads, and its output (N, T, H, C).
            shape = (len(g), *[1] * (said.dim() - 2), g.shape[1])
            return said + _louder(said, g.view(shape), None if shift is None else shift.view(shape))

        return adding


def _louder(said: Tensor, g: Tensor, shift: Tensor | None) -> Tensor:
    added = said * g
    return (added if shift is None else added + shift).to(said.dtype)


def _each(
    compute: Callable[[Tensor, Tensor], Tensor], given: Tensor, matrices: Sequence[Tensor] | Tensor
) -> Tensor:
    """Compute each row with its own matrix, one at a time."""
    return torch.stack([compute(row, matrix) for row, matrix in zip(given, matrices, strict=True)])


def _zeros(like: Tensor, *shape: int) -> Tensor:
    # At least float32, whatever the model has: small steps are not to be lost to rounding.
    return torch.zeros(*shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
