"""What a run has come to: the task matrix and what follows from it, and what growth has brought.

``R[i][j]`` is the bits per byte on task j after stage i, or its accuracy; row 0 is the untrained model.
Forgetting stands beside what was learned, since a model that learns nothing forgets nothing.

A stage trains one task as a rule, and then the definitions are those of the papers. It may train several at
once (a, then b and c together) or one that was trained before (a, b, a, c), and the columns may hold tasks
that no stage trained. Then a task's own value is the one after the last stage that trained it: by then it
has seen all its text, as has the reference that it is held against; and what comes after that stage is
other tasks' doing alone, so that final mean = mean own value - share of earlier tasks x backward transfer
still holds. What a task lost between two visits and won back is in the incremental mean.

Definitions: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840; backward and forward transfer), Chaudhry et al.
2018 (arXiv:1801.10112; forgetting, intransigence), Riemer et al. 2019 (arXiv:1810.11910; learning accuracy),
Rebuffi et al. 2017 (arXiv:1611.07725; incremental mean). Theirs are for accuracies and one task a stage;
with losses the signs are turned so that positive transfer is good.
"""

# S stages, J tasks: a matrix has S + 1 rows and J columns

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cambia.records import GrowthEvent

if TYPE_CHECKING:
    from cambia.probes import Likelihood as Likelihood
    from cambia.probes import bits_per_byte as bits_per_byte

Unit = Literal["bits", "nats", "accuracy"]
"""Of a task matrix: bits or nats per byte, where lower is better, or accuracies, where higher is."""
Route = Literal["own", "oracle"]
"""Who says which task a text is of: the model itself, or somebody who knows."""
Value = Literal["bits_per_byte", "accuracy"]
"""A column of eval.csv that makes a task matrix."""


@dataclass(frozen=True)
class TransferMetrics:
    """What a task matrix says, in its own unit. Positive transfer is good, positive forgetting is bad.

    A task's own stage is the last one that trained it.
    """

    tasks: tuple[str, ...]
    """Those that some stage trained, in the order of the columns; "per task" below is in this order."""
    earlier: tuple[str, ...]
    """Those of them that the last stage did not train: what can have been forgotten at the end."""
    final_mean: float
    """Mean over tasks after the last stage (ACC; AL for losses)."""
    incremental_mean: float
    """Mean over stages of the mean over the tasks trained so far; stages before the first such task are
    left out."""
    learned: tuple[float, ...]
    """Per task: how far it came from the untrained model to the end of its own stage."""
    forgotten: tuple[float, ...]
    """Per task: how far it is at the end behind its best since it was first trained; 0 for tasks of the last
    stage."""
    forgetting: float
    """Mean over earlier tasks of how far each is at the end behind its best since it was first trained and
    before the last stage; negative where the last stage made them better than they ever were."""
    relative_forgetting: tuple[float, ...] | None
    """Per earlier task: the same as a rise of its perplexity per byte, in percent, which compares across
    domains; None for accuracies."""
    backward_transfer: float
    """Mean over earlier tasks of what came after their own stages; negative where they were forgotten."""
    forward_transfer: float
    """Mean over all columns but those of the first stage of what was done for them, against the untrained
    model, before they were first trained; by the end for those that never were."""
    learning_loss: float
    """Mean over tasks at the end of their own stages: plasticity (learning accuracy)."""
    intransigence: tuple[float, ...] | None
    """Per task: how far it is behind its reference at the end of its own stage; None without a reference."""
    forgotten_by_weights: tuple[float, ...] | None
    """Per task: what was lost since its own stage with its right route; exactly 0 where sealed Parts hold
    it. None without the oracle's matrix."""
    forgotten_by_routes: tuple[float, ...] | None
    """Per task: the rest of what was lost since its own stage, which is the router's."""
    forgetting_by_weights: float | None
    """Mean of `forgotten_by_weights` over earlier tasks."""
    forgetting_by_routes: float | None
    """Mean of `forgotten_by_routes` over earlier tasks; the two add up to -`backward_transfer`."""
    regret_to_oracle: float | None
    """How far the final mean is behind that of right routes."""


def transfer_metrics(
    matrix: Sequence[Sequence[float]],
    tasks: Sequence[str],
    *,
    unit: Unit = "bits",
    reference: Sequence[float] | None = None,
    oracle: Sequence[Sequence[float]] | None = None,
    trained: Sequence[Sequence[int]] | None = None,
) -> TransferMetrics:
    """Metrics of a whole task matrix, anyone's.

    Args:
        matrix: (S + 1) rows of J values: row 0 untrained, row i after stage i.
        tasks: J names.
        unit: of the values.
        reference: J values of models that had each task, or all of them, for themselves: specialists or the
            joint model.
        oracle: the matrix with the right route for every text, where something routes.
        trained: for each of the S stages the columns of the tasks that it trained, none for one whose tasks
            are no columns. None: stage i trained the i-th task, and S = J.

    Raises:
        ValueError: a matrix or the reference is not whole, or no stage trained any of the tasks.
    """
    courses = _courses(matrix, tasks, trained, unit)
    right = None if oracle is None else _courses(oracle, tasks, trained, unit)
    if reference is not None and len(reference) != len(tasks):
        raise ValueError(f"expected a reference for each of {list(tasks)}, got {len(reference)}")
    known = [j for j, course in enumerate(courses) if course.visits]
    earlier = [j for j in known if courses[j].is_earlier]
    sign, bits = _sign(unit), math.log(2) if unit == "bits" else 1.0
    final = _mean([courses[j].end for j in known])
    by_weights = None if right is None else {j: right[j].since for j in known}
    by_routes = None if by_weights is None else {j: courses[j].since - by_weights[j] for j in known}
    return TransferMetrics(
        tasks=tuple(tasks[j] for j in known),
        earlier=tuple(tasks[j] for j in earlier),
        final_mean=sign * final,
        incremental_mean=sign * _mean(_so_far(courses)),
        learned=tuple(courses[j].losses[0] - courses[j].own for j in known),
        forgotten=tuple(max(0.0, courses[j].behind) if j in earlier else 0.0 for j in known),
        forgetting=_mean([courses[j].behind for j in earlier]),
        relative_forgetting=(
            None if unit == "accuracy" else tuple(100 * math.expm1(bits * courses[j].behind) for j in earlier)
        ),
        backward_transfer=_mean([-courses[j].since for j in earlier]),
        forward_transfer=_mean([course.brought for course in courses if course.before > 0]),
        learning_loss=sign * _mean([courses[j].own for j in known]),
        intransigence=(
            None if reference is None else tuple(courses[j].own - sign * reference[j] for j in known)
        ),
        forgotten_by_weights=None if by_weights is None else tuple(by_weights.values()),
        forgotten_by_routes=None if by_routes is None else tuple(by_routes.values()),
        forgetting_by_weights=None if by_weights is None else _mean([by_weights[j] for j in earlier]),
        forgetting_by_routes=None if by_routes is None else _mean([by_routes[j] for j in earlier]),
        regret_to_oracle=None if right is None else final - _mean([right[j].end for j in known]),
    )


@dataclass(frozen=True)
class _Course:
    """One task's column, as losses."""

    losses: tuple[float, ...]
    """(S + 1,)"""
    visits: tuple[int, ...]
    """The stages, from 1 to S, that trained it."""

    @property
    def own(self) -> float:
        return self.losses[self.visits[-1]]

    @property
    def end(self) -> float:
        return self.losses[-1]

    @property
    def since(self) -> float:
        """How much was lost after its own stage."""
        return self.end - self.own

    @property
    def is_earlier(self) -> bool:
        return bool(self.visits) and self.visits[-1] < len(self.losses) - 1

    @property
    def behind(self) -> float:
        """How far the end is behind the best since it was first trained and before the last stage."""
        return self.end - min(self.losses[self.visits[0] : -1])

    @property
    def before(self) -> int:
        """The row just before it was first trained; the last one where it never was."""
        return self.visits[0] - 1 if self.visits else len(self.losses) - 1

    @property
    def brought(self) -> float:
        """What was done for it by then."""
        return self.losses[0] - self.losses[self.before]


def _courses(
    matrix: Sequence[Sequence[float]],
    tasks: Sequence[str],
    trained: Sequence[Sequence[int]] | None,
    unit: Unit,
) -> list[_Course]:
    """The matrix column by column, if it is whole."""
    count = len(tasks)
    stages = [(j,) for j in range(count)] if trained is None else trained
    if not count or len(matrix) != len(stages) + 1 or any(len(row) != count for row in matrix):
        raise ValueError(f"expected {len(stages) + 1} rows of {count} values for tasks {list(tasks)}")
    places = {j for stage in stages for j in stage}
    if not places or not places <= set(range(count)):
        raise ValueError(f"expected stages that trained some of tasks 0 to {count - 1}, got {list(stages)}")
    return [
        _Course(
            tuple(_sign(unit) * row[j] for row in matrix),
            tuple(i for i, stage in enumerate(stages, 1) if j in stage),
        )
        for j in range(count)
    ]


def _so_far(courses: Sequence[_Course]) -> list[float]:
    """The mean over the tasks trained so far, stage by stage."""
    found = []
    for i in range(1, len(courses[0].losses)):
        known = [course.losses[i] for course in courses if course.visits and course.visits[0] <= i]
        found += [_mean(known)] if known else []
    return found


def _sign(unit: Unit) -> int:
    """What turns a value into a loss."""
    return -1 if unit == "accuracy" else 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- a run's --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskMatrix:
    """What a run measured, stage by stage; the arguments of `transfer_metrics`."""

    rows: tuple[tuple[float, ...], ...]
    """(S + 1) rows of J values; none before the first stage was scored."""
    tasks: tuple[str, ...]
    """J names."""
    trained: tuple[tuple[int, ...], ...]
    """For each stage the columns of the tasks that it trained."""
    route: Route
    """Whose routes the values are measured with."""

    @property
    def untrained(self) -> tuple[str, ...]:
        """Tasks that no stage trained so far."""
        known = {j for stage in self.trained for j in stage}
        return tuple(task for j, task in enumerate(self.tasks) if j not in known)


def task_matrix(
    rows: Sequence[Mapping[str, Any]],
    *,
    split: str = "test",
    route: Route | None = None,
    value: Value = "bits_per_byte",
) -> TaskMatrix:
    """The matrix in a run's eval.csv, as far as it goes; a stage that was scored in part is left out.

    Args:
        rows: of eval.csv, as `RunReader.rows` gives them.
        split: "valid" or "test".
        route: None: the model's own where there is any, else the oracle's, since a method that has to be
            told the task has no other.
        value: the column to read. Tasks without it are left out.
    """
    chosen = [row for row in rows if row["split"] == split and row.get(value) is not None]
    if route is None:
        route = "oracle" if chosen and all(row["route"] == "oracle" for row in chosen) else "own"
    chosen = [row for row in chosen if row["route"] == route]
    tasks = tuple(dict.fromkeys(str(row["task_eval"]) for row in chosen))
    found = {(int(row["stage"]), str(row["task_eval"])): float(row[value]) for row in chosen}
    said = {int(row["stage"]): str(row["task_trained"]) for row in chosen}
    stages = [stage for stage in sorted(said) if all((stage, task) in found for task in tasks)]
    return TaskMatrix(
        rows=tuple(tuple(found[stage, task] for task in tasks) for stage in stages),
        tasks=tasks,
        trained=tuple(_trained(said[stage], tasks) for stage in stages[1:]),
        route=route,
    )


def _trained(said: str, tasks: Sequence[str]) -> tuple[int, ...]:
    """The columns that a stage trained: a task's name, or several joined by "+"."""
    names = {said} if said in tasks else set(said.split("+"))
    return tuple(j for j, task in enumerate(tasks) if task in names)


def run_metrics(
    rows: Sequence[Mapping[str, Any]], *, split: str = "test", value: Value = "bits_per_byte"
) -> TransferMetrics | None:
    """Metrics of what a run's eval.csv holds so far, None before a task was trained and scored.

    Where both the model's own routes and the right ones were scored, they tell what the routes cost.
    """
    matrix = task_matrix(rows, split=split, value=value)
    if not any(matrix.trained):
        return None
    oracle = task_matrix(rows, split=split, route="oracle", value=value)
    both = (matrix.route, oracle.tasks, oracle.trained) == ("own", matrix.tasks, matrix.trained)
    return transfer_metrics(
        matrix.rows,
        matrix.tasks,
        unit="accuracy" if value == "accuracy" else "bits",
        oracle=oracle.rows if both else None,
        trained=matrix.trained,
    )


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


def __getattr__(name: str) -> Any:
    # Reading what a run wrote does not wait for PyTorch.
    if name in ("Likelihood", "bits_per_byte"):
        from cambia import probes

        return getattr(probes, name)
    raise AttributeError(f"module 'cambia.evaluation' has no attribute {name!r}")
