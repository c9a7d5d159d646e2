"""A stream: tasks, and the stages in which a learner meets them.

A task is a corpus and a column of the task matrix. A stage is a stretch of training whose rows come from
one task, from several, or pass over from one to the next; one task may have several stages.
`cambia.data.orders` lays stages out.

    >>> stream = Stream([Task("english", english), Task("python", python)], batch_size=8,
    ...                 sequence_length=256, seed=0)
    >>> stream.next_batch(0).source
    'english'
    >>> both = Stage.of(stream.names, [0.5, 0.5])
    >>> both.name
    'english+python'
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cambia.data.batches import Batch, TrainBatches, evaluation_batches
from cambia.data.corpus import PreparedCorpus, TokenFile
from cambia.data.sources import TRAIN
from cambia.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Task:
    """Text with a name: what a stage trains on, and a column of the task matrix."""

    name: str
    corpus: PreparedCorpus
    permutation: np.ndarray | None = None
    """Which token id is read in each id's place, (vocab_size,), in every split; None: as they are."""
    special_ids: tuple[int, ...] | None = None
    """Ids that mean no text and that no permutation moves (see `cambia.data.corpus.special_ids`); None: it
    was not said which they are."""
    shuffle: bool = True
    """False: training rows come in the order of the text."""

    def __post_init__(self) -> None:
        if self.permutation is None:
            return
        ids = np.arange(len(self.permutation))
        special = list(self.special_ids or ())
        if not np.array_equal(np.sort(self.permutation), ids):
            raise ConfigError(f"the permutation of {self.name!r} does not hold each of its ids once")
        if max(special, default=0) >= len(ids) or (self.permutation[special] != special).any():
            raise ConfigError(f"the permutation of {self.name!r} moves one of the special ids {special}")

    def file(self, split: str) -> TokenFile:
        """A split as this task reads it."""
        return replace(self.corpus.splits[split], permutation=self.permutation)


@dataclass(frozen=True)
class Stage:
    """A stretch of the stream: which tasks its rows come from."""

    name: str
    """The task's name; of a mixture the names of those with a weight, joined by "+"."""
    weights: tuple[float, ...]
    """The share of the rows that each task gives, one per task; they add up to 1."""
    until: tuple[float, ...] | None = None
    """The weights at its end, to which they go in a straight line; None: they stay."""
    hold: float = 0.0
    """The share of the stage before they begin to go there, 0 to below 1."""

    def __post_init__(self) -> None:
        for weights in (self.weights, self.until or self.weights):
            if len(weights) != len(self.weights) or min(weights) < 0 or not math.isclose(sum(weights), 1.0):
                raise ConfigError(
                    f"stage {self.name!r} has the weights {weights}; expected one per task, none below 0, "
                    "that add up to 1"
                )
        if not 0 <= self.hold < 1:
            raise ConfigError(f"stage {self.name!r} has hold {self.hold}; expected at least 0 and below 1")

    @staticmethod
    def of(
        names: Sequence[str],
        weights: Sequence[float],
        until: Sequence[float] | None = None,
        hold: float = 0.0,
    ) -> Stage:
        """A stage named after the tasks that it begins with.

        Args:
            names: of all tasks of the stream.
        """
        having = [name for name, weight in zip(names, weights, strict=True) if weight > 0]
        return Stage("+".join(having), tuple(weights), None if until is None else tuple(until), hold)

    @staticmethod
    def only(names: Sequence[str], task: int) -> Stage:
        """A stage of one task, by its number."""
        return Stage.of(names, [float(index == task) for index in range(len(names))])

    def weights_at(self, done: float) -> tuple[float, ...]:
        """The weights when this share of the stage is done, 0 to 1."""
        if self.until is None or done <= self.hold:
            return self.weights
        passed = min(1.0, (done - self.hold) / (1 - self.hold))
        return tuple(a + passed * (b - a) for a, b in zip(self.weights, self.until, strict=True))

    def mean_weights(self) -> tuple[float, ...]:
        """The weights averaged over the stage."""
        if self.until is None:
            return self.weights
        late = (1 - self.hold) / 2
        return tuple((1 - late) * a + late * b for a, b in zip(self.weights, self.until, strict=True))


class Stream:
    """Batches of each stage, and what must be kept to go on with them.

    A task's rows are read on from where they were left, whichever stage or mixture asks for them. The rows
    of a mixture are shared out by largest deficit: each goes to the task that is furthest behind its share,
    so that within a stage no task is ever more than a few rows off, and chance has no part in it.

    Args:
        tasks: the columns of the task matrix.
        stages: in the order of training; None: each task once, in order.
        batch_size: rows of a batch.
        sequence_length: tokens of a row.
        seed: of the order of windows.
        boundaries: whether the learner may see where stages begin and end.

    Raises:
        DataError: a task's text is too short for one window.
        ConfigError: there is no task or no stage, two tasks have one name, a name holds a "+", or a stage
            has not one weight per task.
    """

    has_validation = True

    def __init__(
        self,
        tasks: Sequence[Task],
        stages: Sequence[Stage] | None = None,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        boundaries: bool = True,
    ):
        self.tasks = list(tasks)
        self.names = [task.name for task in tasks]
        check_names(self.names)
        if stages is None:
            stages = [Stage.only(self.names, index) for index in range(len(self.tasks))]
        self.stages = list(stages)
        _check_stages(self.stages, len(self.tasks))
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.boundaries = boundaries
        self.batches = [
            TrainBatches(
                task.file(TRAIN),
                batch_size=batch_size,
                sequence_length=sequence_length,
                seed=seed + index,
                source=task.name,
                shuffle=task.shuffle,
            )
            for index, task in enumerate(tasks)
        ]
        # Rows that each task is behind its share: in each stage, and in batches mixed from outside.
        self._behind = [[0.0] * len(self.tasks) for _ in self.stages]
        self._behind_mixed = [0.0] * len(self.tasks)

    def next_batch(self, stage: int, *, at: float = 0.0, rows: int | None = None) -> Batch:
        """The next batch of a stage; in a mixture the rows of one task stand together.

        Args:
            at: the share of the stage that is done, for weights that change over it.
            rows: how many, in place of batch_size.
        """
        weights = self.stages[stage].weights_at(at)
        name = self.stages[stage].name if self.boundaries else ""  # else it would tell
        return self._batch(weights, self._behind[stage], rows, name)

    def mixed_batch(self, weights: Sequence[float], *, rows: int | None = None, source: str = "") -> Batch:
        """A batch of rows of several tasks, next to the stages; joint training uses it.

        Args:
            weights: of each task, in any unit.
            rows: how many, in place of batch_size.
            source: the name that the batch carries.

        Raises:
            ConfigError: there is not one weight per task, or none is above 0.
        """
        if len(weights) != len(self.tasks) or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"a batch is mixed by the weights {list(weights)}; expected one for each of {self.names}, "
                "none below 0 and one above"
            )
        shares = [weight / sum(weights) for weight in weights]
        return self._batch(shares, self._behind_mixed, rows, source)

    def _batch(self, weights: Sequence[float], behind: list[float], rows: int | None, source: str) -> Batch:
        counts = _share_out(self.batch_size if rows is None else rows, weights, behind)
        parts = [self.batches[index].next(count) for index, count in enumerate(counts) if count]
        parts = parts or [self.batches[0].next(0)]  # no row was asked for
        return Batch(
            torch.cat([part.input_ids for part in parts]),
            torch.cat([part.targets for part in parts]),
            sum(part.num_bytes for part in parts),
            source,
        )

    def evaluation(
        self, task: int, split: str, max_bytes: int, batch_size: int, context: int = 0
    ) -> Iterator[Batch]:
        """The first documents of a task's split, each token a target once (see `evaluation_batches`)."""
        return evaluation_batches(
            self.tasks[task].file(split).head(max_bytes),
            batch_size=batch_size,
            sequence_length=self.sequence_length,
            source=self.names[task],
            context=context,
        )

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def lengths(self) -> list[int]:
        """Training tokens of each stage, of a mixture the weighted mean of its tasks'.

        With what fills up their rows, where these hold whole documents.
        """
        tokens = [
            batches.token_file.num_tokens
            if batches.packed is None
            else batches.windows_per_epoch * self.sequence_length
            for batches in self.batches
        ]
        return [
            round(sum(weight * size for weight, size in zip(stage.mean_weights(), tokens, strict=True)))
            for stage in self.stages
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain values: where each task stands, and how far the mixtures are behind their shares."""
        return {
            "tasks": list(self.names),
            "stages": [stage.name for stage in self.stages],
            "batches": [batches.state_dict() for batches in self.batches],
            "behind": [list(behind) for behind in self._behind],
            "behind_mixed": list(self._behind_mixed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ConfigError: the state is of a stream of other tasks or stages.
        """
        for what, here in (("tasks", self.names), ("stages", [stage.name for stage in self.stages])):
            if state[what] != here:
                raise ConfigError(f"the saved stream has the {what} {state[what]}, this one {here}")
        for batches, saved in zip(self.batches, state["batches"], strict=True):
            batches.load_state_dict(saved)
        self._behind = [list(behind) for behind in state["behind"]]
        self._behind_mixed = list(state["behind_mixed"])


def _share_out(rows: int, weights: Sequence[float], behind: list[float]) -> list[int]:
    """How many of some rows each task gives; `behind` is brought up to date."""
    counts = [0] * len(weights)
    # Only what has a weight gives rows, so that a stage of one task is of that task alone.
    giving = [index for index, weight in enumerate(weights) if weight > 0]
    for _ in range(rows):
        for index in giving:
            behind[index] += weights[index]
        # Rounded, so that equal shares take turns whatever the last bit of their sums.
        turn = max(giving, key=lambda index: round(behind[index], 9))
        behind[turn] -= 1.0
        counts[turn] += 1
    return counts


def check_names(names: Sequence[str]) -> None:
    """Refuse names that tasks of one stream cannot have.

    Raises:
        ConfigError: there is none, two are the same, or one holds a "+".
    """
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"a stream's tasks are {list(names)}; expected at least one, each with its own name"
        )
    joined = [name for name in names if "+" in name]
    if joined:
        raise ConfigError(
            f"the task {joined[0]!r} has a '+' in its name, which joins the names of a mixture: call it "
            f"{joined[0].replace('+', '_')!r}"
        )


def _check_stages(stages: list[Stage], tasks: int) -> None:
    if not stages:
        raise ConfigError("a stream has no stages; expected at least one")
    for stage in stages:
        if len(stage.weights) != tasks:
            raise ConfigError(f"stage {stage.name!r} has {len(stage.weights)} weights for {tasks} tasks")
