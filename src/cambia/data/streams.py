"""A stream: tasks one after another, with rows of earlier tasks replayed beside the new ones.

Replay of a twentieth to a tenth is the simplest cure of forgetting and the baseline to beat
(Ibrahim et al. 2024, https://arxiv.org/abs/2403.08763).

    >>> stream = Stream([Task("english", english), Task("python", python)], batch_size=8,
    ...                 sequence_length=256, seed=0, replay_fraction=0.1, replay_capacity=2000)
    >>> stream.next_batch(0).source
    'english'
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from cambia.data.batches import Batch, TrainBatches, evaluation_batches
from cambia.data.corpus import PreparedCorpus
from cambia.data.replay import ReplayBuffer
from cambia.data.sources import TRAIN
from cambia.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Task:
    """A stretch of the stream with one source."""

    name: str
    corpus: PreparedCorpus


class Stream:
    """Batches of each task, and what must be kept to go on with them.

    Args:
        tasks: in the order in which they are trained.
        batch_size: rows of a batch, replayed ones included.
        sequence_length: tokens of a row.
        seed: of the order of windows and of replay.
        replay_fraction: share of rows that come from earlier tasks, met exactly on average; 0 to below 1.
        replay_capacity: rows that the replay buffer holds.

    Raises:
        DataError: a task's text is too short for one window.
        ConfigError: there is no task, two have one name, or the fraction is out of range.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        replay_fraction: float = 0.0,
        replay_capacity: int = 2000,
    ):
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a stream's tasks are {names}; expected at least one, each with its own name")
        if not 0 <= replay_fraction < 1:
            raise ConfigError(f"replay_fraction is {replay_fraction}; expected at least 0 and below 1")
        self.tasks = list(tasks)
        self.names = names
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.replay_fraction = replay_fraction
        self.batches = [
            TrainBatches(
                task.corpus.splits[TRAIN],
                batch_size=batch_size,
                sequence_length=sequence_length,
                seed=seed + index,
                source=task.name,
            )
            for index, task in enumerate(tasks)
        ]
        self.buffer = ReplayBuffer(replay_capacity, seed)
        self._replaying = 0  # batches so far in which there was something to replay

    def next_batch(self, task_index: int) -> Batch:
        """The next batch of a task; its last rows are replayed once there is something earlier."""
        rows = 0
        if self.buffer.holds_other_than(task_index):
            rows = self._rows_to_replay()
            self._replaying += 1
        old = self.buffer.sample(rows, exclude_tag=task_index)
        fresh = self.batches[task_index].next(self.batch_size - rows)
        if self.replay_fraction > 0:
            self.buffer.add(fresh, task_index)
        if old is None:
            return fresh
        return Batch(
            torch.cat([fresh.input_ids, old.input_ids]),
            torch.cat([fresh.targets, old.targets]),
            fresh.num_bytes + old.num_bytes,
            fresh.source,
        )

    def evaluation(self, task_index: int, split: str, max_bytes: int, batch_size: int) -> Iterator[Batch]:
        """The first documents of a task's split, each token a target once."""
        task = self.tasks[task_index]
        return evaluation_batches(
            task.corpus.splits[split].head(max_bytes),
            batch_size=batch_size,
            sequence_length=self.sequence_length,
            source=task.name,
        )

    has_validation = True

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def lengths(self) -> list[int]:
        """Training tokens of each task; with what fills up its rows, where these hold whole documents."""
        return [
            task.corpus.splits[TRAIN].num_tokens
            if batches.packed is None
            else batches.windows_per_epoch * self.sequence_length
            for task, batches in zip(self.tasks, self.batches, strict=True)
        ]

    def _rows_to_replay(self) -> int:
        """Whole rows whose running total stays within one of the fraction; exact, without rounding error."""
        per_batch = Fraction(self.replay_fraction).limit_denominator(1_000_000) * self.batch_size
        return math.floor(per_batch * (self._replaying + 1)) - math.floor(per_batch * self._replaying)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: where each task stands, the replay buffer, and how much was replayed."""
        return {
            "tasks": [task.name for task in self.tasks],
            "batches": [batches.state_dict() for batches in self.batches],
            "buffer": self.buffer.state_dict(),
            "replaying": self._replaying,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state is of a stream of other tasks.
        """
        names = [task.name for task in self.tasks]
        if state["tasks"] != names:
            raise ConfigError(f"the saved stream has the tasks {state['tasks']}, this one {names}")
        for batches, saved in zip(self.batches, state["batches"], strict=True):
            batches.load_state_dict(saved)
        self.buffer.load_state_dict(state["buffer"])
        self._replaying = state["replaying"]
