"""What a run has come to: the task matrix and what follows from it, and what growth has brought.

``R[i][j]`` is the bits per byte on task j after stage i, or its accuracy; row 0 is the untrained model.
Forgetting stands beside what was learned, since a model that learns nothing forgets nothing.

Definitions: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840; backward and forward transfer), Chaudhry et al.
2018 (arXiv:1801.10112; forgetting, intransigence), Riemer et al. 2019 (arXiv:1810.11910; learning accuracy).
Theirs are for accuracies; with losses the signs are turned so that positive transfer is good.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cambia.probes import Likelihood as Likelihood
from cambia.probes import bits_per_byte as bits_per_byte
from cambia.records import GrowthEvent

Unit = Literal["bits", "nats", "accuracy"]
"""Of a task matrix: bits or nats per byte, where lower is better, or accuracies, where higher is."""


@dataclass(frozen=True)
class TransferMetrics:
    """What a task matrix says, in its own unit. Positive transfer is good, positive forgetting is bad."""

    tasks: tuple[str, ...]
    final_mean: float
    """Mean over tasks after the last stage (ACC; AL for losses)."""
    incremental_mean: float
    """Mean over stages of the mean over the tasks so far (Rebuffi et al. 2017, arXiv:1611.07725)."""
    learned: tuple[float, ...]
    """Per task: how far it came from the untrained model to the end of its own stage."""
    forgotten: tuple[float, ...]
    """Per task: how far it is at the end behind its best after it was learned; 0 for the last task."""
    forgetting: float
    """Mean over all but the last task of how far it is at the end behind its best before the last stage;
    negative where the last stage made the others better than they ever were."""
    relative_forgetting: tuple[float, ...] | None
    """Per task but the last: the same as a rise of its perplexity per byte, in percent, which compares
    across domains; None for accuracies."""
    backward_transfer: float
    """Mean over all but the last task of what came after its own stage; negative where it was forgotten."""
    forward_transfer: float
    """Mean over all but the first task of what earlier tasks did for it, against the untrained model."""
    learning_loss: float
    """Mean of R[j][j], each task at the end of its own stage: plasticity (learning accuracy)."""
    intransigence: tuple[float, ...] | None
    """Per task: how far it is behind its reference at the end of its own stage; None without a reference."""
    forgotten_by_weights: tuple[float, ...] | None
    """Per task: what was lost since its own stage with its right route; exactly 0 where sealed Parts hold
    it. None without the oracle's matrix."""
    forgotten_by_routes: tuple[float, ...] | None
    """Per task: the rest of what was lost since its own stage, which is the router's."""
    regret_to_oracle: float | None
    """How far the final mean is behind that of right routes."""


def transfer_metrics(
    matrix: Sequence[Sequence[float]],
    tasks: Sequence[str],
    *,
    unit: Unit = "bits",
    reference: Sequence[float] | None = None,
    oracle: Sequence[Sequence[float]] | None = None,
) -> TransferMetrics:
    """Metrics of a whole task matrix, anyone's.

    Args:
        matrix: (S + 1) rows of J values: row 0 untrained, row i after stage i, which trained task i - 1.
        tasks: J names, in the order of training.
        unit: of the values.
        reference: J values of models that had each task, or all of them, for themselves: specialists or the
            joint model.
        oracle: the matrix with the right route for every text, where something routes.

    Raises:
        ValueError: a matrix or the reference is not whole.
    """
    count = len(tasks)
    sign = -1 if unit == "accuracy" else 1  # of a loss
    loss = [[sign * value for value in row] for row in _whole(matrix, tasks)]
    right = None if oracle is None else [[sign * value for value in row] for row in _whole(oracle, tasks)]
    if reference is not None and len(reference) != count:
        raise ValueError(f"expected a reference for each of {list(tasks)}, got {len(reference)}")
    own = [loss[j + 1][j] for j in range(count)]
    end = loss[count]
    since = [end[j] - own[j] for j in range(count)]
    behind = [end[j] - min(loss[i][j] for i in range(j + 1, count)) for j in range(count - 1)]
    by_weights = None if right is None else tuple(right[count][j] - right[j + 1][j] for j in range(count))
    bits = math.log(2) if unit == "bits" else 1.0
    return TransferMetrics(
        tasks=tuple(tasks),
        final_mean=sign * _mean(end),
        incremental_mean=sign * _mean([_mean(loss[i][:i]) for i in range(1, count + 1)]),
        learned=tuple(loss[0][j] - own[j] for j in range(count)),
        forgotten=tuple(max(0.0, lost) for lost in (*behind, 0.0)),
        forgetting=_mean(behind),
        relative_forgetting=(
            None if unit == "accuracy" else tuple(100 * math.expm1(bits * lost) for lost in behind)
        ),
        backward_transfer=_mean([-lost for lost in since[:-1]]),
        forward_transfer=_mean([loss[0][j] - loss[j][j] for j in range(1, count)]),
        learning_loss=sign * _mean(own),
        intransigence=(
            None if reference is None else tuple(own[j] - sign * reference[j] for j in range(count))
        ),
        forgotten_by_weights=by_weights,
        forgotten_by_routes=(
            None if by_weights is None else tuple(since[j] - by_weights[j] for j in range(count))
        ),
        regret_to_oracle=None if right is None else _mean(end) - _mean(right[count]),
    )


def _whole(matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> Sequence[Sequence[float]]:
    count = len(tasks)
    if not count or len(matrix) != count + 1 or any(len(row) != count for row in matrix):
        raise ValueError(f"expected {count + 1} rows of {count} values for tasks {list(tasks)}")
    return matrix


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
