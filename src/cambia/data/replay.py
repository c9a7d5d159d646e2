"""A replay buffer: a fair sample of every row seen so far, in a fixed amount of memory.

Reservoir sampling (Vitter 1985, algorithm R): after n rows each of them is in the buffer with the same
probability, capacity / n, without knowing n beforehand.

    >>> buffer = ReplayBuffer(capacity=1000, seed=0)
    >>> buffer.add(batch, tag=0)
    >>> old = buffer.sample(4, exclude_tag=1)            # None while there is nothing to replay
"""

# B batch (rows), T time, N rows in the buffer

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cambia.data.batches import IGNORED, Batch
from cambia.errors import ConfigError, DataError


class ReplayBuffer:
    """Keeps rows of earlier batches, each with a whole-number tag (a task's index).

    Args:
        capacity: how many rows it holds.
        seed: of its own random generator, which `state_dict` keeps.
    """

    def __init__(self, capacity: int, seed: int):
        if capacity < 1:
            raise ConfigError(f"a replay buffer's capacity is {capacity} rows; expected at least 1")
        self.capacity = capacity
        self.seen = 0
        self._rng = np.random.default_rng(seed)
        self._input_ids: Tensor | None = None  # (capacity, T), int32: half the memory of int64
        self._targets: Tensor | None = None
        self._tags = np.zeros(capacity, dtype=np.int64)
        self._bytes = np.zeros(capacity, dtype=np.float64)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, batch: Batch, tag: int) -> None:
        """Offer every row of a batch; which of them stay is up to chance.

        Raises:
            DataError: the rows are of another length than those in the buffer.
        """
        rows, length = batch.input_ids.shape
        if self._input_ids is None or self._targets is None:
            self._input_ids = torch.zeros(self.capacity, length, dtype=torch.int32)
            self._targets = torch.zeros(self.capacity, length, dtype=torch.int32)
        elif self._input_ids.shape[1] != length:
            raise DataError(
                f"the replay buffer holds rows of {self._input_ids.shape[1]} tokens and was given rows of "
                f"{length}: keep one --training.sequence_length"
            )
        shares = row_bytes(batch)
        for row in range(rows):
            place = self.seen if self.seen < self.capacity else int(self._rng.integers(self.seen + 1))
            self.seen += 1
            if place < self.capacity:
                self._input_ids[place] = batch.input_ids[row].to("cpu", torch.int32)
                self._targets[place] = batch.targets[row].to("cpu", torch.int32)
                self._tags[place], self._bytes[place] = tag, shares[row]

    def holds_other_than(self, tag: int) -> bool:
        """Whether there is a row with another tag."""
        return bool((self._tags[: len(self)] != tag).any())

    def sample(self, n: int, exclude_tag: int | None = None) -> Batch | None:
        """`n` rows whose tag is not `exclude_tag`, or None if there are none.

        They are different rows as long as there are enough; otherwise rows repeat.
        """
        tags = self._tags[: len(self)]
        candidates = np.flatnonzero(tags != exclude_tag) if exclude_tag is not None else np.arange(len(tags))
        if n < 1 or not len(candidates) or self._input_ids is None or self._targets is None:
            return None
        chosen = self._rng.choice(candidates, size=n, replace=len(candidates) < n)
        return Batch(
            self._input_ids[chosen].long(),
            self._targets[chosen].long(),
            num_bytes=round(float(self._bytes[chosen].sum())),
            source="replay",
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: the rows, how many were seen, and the generator's state."""
        state: dict[str, Any] = {
            "capacity": self.capacity,
            "seen": self.seen,
            "generator": self._rng.bit_generator.state,
        }
        if self._input_ids is not None and self._targets is not None:
            state["input_ids"] = self._input_ids[: len(self)].clone()  # (N, T)
            state["targets"] = self._targets[: len(self)].clone()
            state["tags"] = torch.from_numpy(self._tags[: len(self)].copy())
            state["bytes"] = torch.from_numpy(self._bytes[: len(self)].copy())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state is of a buffer of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise ConfigError(
                f"the saved replay buffer holds {state['capacity']} rows, this one {self.capacity}: resume "
                "with the capacity that the run began with"
            )
        self.seen = state["seen"]
        self._rng.bit_generator.state = state["generator"]
        self._input_ids = self._targets = None
        if "input_ids" in state:
            length = state["input_ids"].shape[1]
            self._input_ids = torch.zeros(self.capacity, length, dtype=torch.int32)
            self._targets = torch.zeros(self.capacity, length, dtype=torch.int32)
            self._input_ids[: len(self)] = state["input_ids"]
            self._targets[: len(self)] = state["targets"]
            self._tags[: len(self)] = state["tags"].numpy()
            self._bytes[: len(self)] = state["bytes"].numpy()


def row_bytes(batch: Batch) -> np.ndarray:
    """A batch's bytes shared among its rows by how many targets each has."""
    trained = (batch.targets != IGNORED).sum(dim=1).double().cpu().numpy()  # (B,)
    total = trained.sum()
    return batch.num_bytes * trained / total if total else trained
