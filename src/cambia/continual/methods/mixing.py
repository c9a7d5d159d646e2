"""Training on the text of several tasks at once: what sequential training is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cambia.continual.methods.method import AnyStream, Contract, Method
from cambia.data.batches import Batch
from cambia.data.streams import Stream
from cambia.errors import ConfigError


@dataclass
class Joint(Method):
    """Every batch holds rows of all tasks, also of those that are yet to come: multi-task training.

    Each task has as large a share as the stages together give it. It sees as much text as a sequential
    method, so it is a bound at equal new text.
    """

    CONTRACT: ClassVar[Contract] = Contract(stores_text=True, chooses_rows=True)

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        tasks = _tasks(stream)
        means = [each.mean_weights() for each in tasks.stages]
        return tasks.mixed_batch([sum(shares) for shares in zip(*means, strict=True)])


@dataclass
class Cumulative(Method):
    """Every batch holds rows of all tasks so far alike: nothing is thrown away, at no more steps."""

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, stores_text=True, chooses_rows=True)

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        tasks = _tasks(stream)
        met = [any(s.weights[j] for s in tasks.stages[: stage + 1]) for j in range(len(tasks.names))]
        return tasks.mixed_batch([each / sum(met) for each in met])


def _tasks(stream: AnyStream) -> Stream:
    if not isinstance(stream, Stream):
        raise ConfigError(
            "joint and cumulative training mix the tasks of a Stream; a data loader has one task"
        )
    return stream
