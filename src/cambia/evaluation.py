"""What a run has come to: the task matrix and what follows from it, and what growth has brought.

``R[i][j]`` is the bits per byte on task j after stage i; row 0 is the untrained model. Lower is better.
Forgetting stands beside what was learned, since a model that learns nothing forgets nothing.

Definitions: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840; backward and forward transfer), Chaudhry et al.
2018 (arXiv:1801.10112; forgetting), Riemer et al. 2019 (arXiv:1810.11910; learning accuracy). Theirs are
for accuracies; with losses the signs are turned so that positive transfer is good.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cambia.probes import Likelihood as Likelihood
from cambia.probes import bits_per_byte as bits_per_byte
from cambia.records import GrowthEvent


@dataclass(frozen=True)
class TransferMetrics:
    """What a task matrix says, in its own unit (bits per byte)."""

    tasks: tuple[str, ...]
    final_mean: float
    """Mean over tasks after the last stage."""
    learned: tuple[float, ...]
    """Per task: how far its loss fell from the untrained model to the end of its own stage."""
    forgotten: tuple[float, ...]
    """Per task: how far its loss is at the end above its best after it was learned; 0 for the last task."""
    backward_transfer: float
    """Mean over all but the last task of R[j][j] - R[end][j]; negative where something was forgotten."""
    forward_transfer: float
    """Mean over all but the first task of R[0][j] - R[j-1][j]: what earlier tasks did for later ones."""
    learning_loss: float
    """Mean of R[j][j]: plasticity."""


def transfer_metrics(matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> TransferMetrics:
    """Metrics of a whole task matrix.

    Args:
        matrix: (S + 1) rows of J losses: row 0 untrained, row i after stage i, which trained task i - 1.
        tasks: J names, in the order of training.

    Raises:
        ValueError: the matrix is not whole.
    """
    count = len(tasks)
    if len(matrix) != count + 1 or any(len(row) != count for row in matrix):
        raise ValueError(f"expected {count + 1} rows of {count} losses for tasks {list(tasks)}")
    own = [matrix[j + 1][j] for j in range(count)]
    end = matrix[count]
    forgotten = [max(0.0, end[j] - min(matrix[i][j] for i in range(j + 1, count + 1))) for j in range(count)]
    return TransferMetrics(
        tasks=tuple(tasks),
        final_mean=sum(end) / count,
        learned=tuple(matrix[0][j] - own[j] for j in range(count)),
        forgotten=tuple(forgotten),
        backward_transfer=_mean([own[j] - end[j] for j in range(count - 1)]),
        forward_transfer=_mean([matrix[0][j] - matrix[j][j] for j in range(1, count)]),
        learning_loss=sum(own) / count,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def task_matrix(
    rows: Sequence[Mapping[str, Any]], *, split: str = "test"
) -> tuple[list[list[float]], list[str]]:
    """The matrix in a run's eval.csv: stages so far by tasks, and the tasks' names.

    Args:
        rows: of eval.csv, as `RunReader.rows` gives them.
        split: "valid" or "test".
    """
    chosen = [row for row in rows if row["split"] == split and row["route"] == "own"]
    tasks = list(dict.fromkeys(str(row["task_eval"]) for row in chosen))
    stages = sorted({int(row["stage"]) for row in chosen})
    found = {(int(row["stage"]), str(row["task_eval"])): float(row["bits_per_byte"]) for row in chosen}
    return [[found[stage, task] for task in tasks] for stage in stages], tasks


@dataclass(frozen=True)
class GrowthMetrics:
    """What the growth events of a run did, all together and each."""

    events: int
    """Growths that were done."""
    not_done: int
    """Growths that were asked for and left undone: over budget, not approved, a dry run."""
    events_per_1000_steps: float
    steps_between: tuple[int, ...]
    """From each growth to the next."""
    parameters_added: tuple[int, ...]
    """By each growth."""
    flops_per_token: tuple[float, ...]
    """At first and after each growth."""
    loss_jumps: tuple[float | None, ...]
    """Loss on the check batch right after minus right before, nats per token; None where unchecked."""
    loss_falls: tuple[float | None, ...]
    """How far the training loss fell from each growth to the next or to the end, nats per token; the mean of
    `window` steps before each is compared. It would have fallen without growth too."""
    loss_per_million_parameters: tuple[float | None, ...]
    """`loss_falls` for each million of added parameters."""


def growth_metrics(
    events: Sequence[GrowthEvent], losses: Sequence[tuple[int, float]], *, window: int = 50
) -> GrowthMetrics:
    """Metrics of growth events.

    Args:
        events: as `GrowthManager.history` or a run's growth.jsonl has them.
        losses: (step, training loss) in the order of steps, nats per token.
        window: steps whose mean loss is compared.
    """
    done = [event for event in events if event.done]
    last = losses[-1][0] if losses else (done[-1].step if done else 0)
    ends = [*(event.step for event in done[1:]), last]
    falls: list[float | None] = []
    for event, end in zip(done, ends, strict=False):
        before = _loss_before(losses, event.step, window)
        after = _loss_before(losses, end, min(window, end - event.step))
        falls.append(None if before is None or after is None else before - after)
    added = [event.parameters_after - event.parameters_before for event in done]
    return GrowthMetrics(
        events=len(done),
        not_done=len(events) - len(done),
        events_per_1000_steps=1000 * len(done) / last if last else 0.0,
        steps_between=tuple(later.step - sooner.step for sooner, later in itertools.pairwise(done)),
        parameters_added=tuple(added),
        flops_per_token=(
            *(event.flops_per_token_before for event in done[:1]),
            *(event.flops_per_token_after for event in done),
        ),
        loss_jumps=tuple(
            None if e.loss_before is None or e.loss_after is None else e.loss_after - e.loss_before
            for e in done
        ),
        loss_falls=tuple(falls),
        loss_per_million_parameters=tuple(
            None if fall is None or not more else fall / more * 1e6
            for fall, more in zip(falls, added, strict=True)
        ),
    )


def _loss_before(losses: Sequence[tuple[int, float]], step: int, window: int) -> float | None:
    """Mean loss of the `window` steps up to a step."""
    near = [loss for at, loss in losses if step - window < at <= step and math.isfinite(loss)]
    return sum(near) / len(near) if near else None
