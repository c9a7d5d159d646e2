"""What was learned, forgotten and grown, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.evaluation import TaskMatrix, growth_metrics, run_metrics, task_matrix, transfer_metrics
from cambia.records import GrowthEvent


def event(step: int, before: int, after: int, *, done: bool = True) -> GrowthEvent:
    return GrowthEvent(
        operators=({"type": "widen_ffn"},),
        reason="schedule",
        parameters_before=before,
        parameters_after=after,
        flops_per_token_before=6.0 * before,
        flops_per_token_after=6.0 * after,
        exactness="tolerance",
        loss_before=2.0,
        loss_after=2.0 + 1e-7,
        step=step,
        done=done,
    )


def test_growth_in_numbers() -> None:
    losses = [(step, 4.0 if step <= 100 else 3.0 if step <= 300 else 2.5) for step in range(1, 401)]
    events = [
        event(100, 1_000_000, 1_500_000),
        event(200, 0, 0, done=False),
        event(300, 1_500_000, 3_500_000),
    ]
    found = growth_metrics(events, losses)
    assert (found.events, found.not_done) == (2, 1)
    assert found.events_per_1000_steps == pytest.approx(5.0)
    assert found.steps_between == (200,)
    assert found.parameters_added == (500_000, 2_000_000)
    assert found.flops_per_token == (6e6, 9e6, 21e6)
    assert found.loss_jumps == pytest.approx((1e-7, 1e-7))
    assert found.loss_falls == pytest.approx((1.0, 0.5))
    assert found.loss_per_million_parameters == pytest.approx((2.0, 0.25))


def test_no_growth_is_no_numbers() -> None:
    found = growth_metrics([], [(1, 3.0), (2, 2.0)])
    assert (found.events, found.loss_falls, found.flops_per_token) == (0, (), ())
    assert growth_metrics([], []).events_per_1000_steps == 0.0


# ---- task matrices -------------------------------------------------------------------------------

LOSSES = [[8.0, 8.0, 8.0], [2.0, 7.0, 7.5], [3.0, 1.5, 6.0], [2.5, 1.75, 1.0]]
TASKS = ("a", "b", "c")


def test_a_matrix_in_numbers() -> None:
    found = transfer_metrics(LOSSES, TASKS, reference=[1.9, 1.4, 1.0])
    assert found.final_mean == pytest.approx(5.25 / 3)
    assert found.incremental_mean == pytest.approx((2.0 + 2.25 + 1.75) / 3)
    assert found.learned == (6.0, 6.5, 7.0)
    assert found.forgotten == (0.5, 0.25, 0.0)
    assert found.forgetting == pytest.approx(0.375)
    assert found.relative_forgetting == pytest.approx((100 * (2**0.5 - 1), 100 * (2**0.25 - 1)))
    assert found.backward_transfer == pytest.approx(-0.375)
    assert found.forward_transfer == pytest.approx((1.0 + 2.0) / 2)
    assert found.learning_loss == pytest.approx(1.5)
    assert found.intransigence == pytest.approx((0.1, 0.1, 0.0))
    assert found.forgotten_by_weights is None and found.regret_to_oracle is None


def test_a_last_stage_that_makes_others_better_is_no_forgetting() -> None:
    better = [*LOSSES[:3], [1.8, 1.4, 1.0]]
    found = transfer_metrics(better, TASKS)
    assert found.forgotten == (0.0, 0.0, 0.0)
    assert found.forgetting == pytest.approx(-0.15) and found.backward_transfer == pytest.approx(0.15)


def test_what_is_lost_to_weights_and_what_to_routes() -> None:
    sealed = [[8.0, 8.0, 8.0], [2.0, 7.0, 7.5], [2.0, 1.5, 6.0], [2.0, 1.5, 1.0]]
    found = transfer_metrics(LOSSES, TASKS, oracle=sealed)
    assert found.forgotten_by_weights == (0.0, 0.0, 0.0), "exactly"
    assert found.forgotten_by_routes == pytest.approx((0.5, 0.25, 0.0))
    assert found.regret_to_oracle == pytest.approx(0.75 / 3)


def test_nats_and_bits_forget_alike() -> None:
    nats = [[value * math.log(2) for value in row] for row in LOSSES]
    bits, same = transfer_metrics(LOSSES, TASKS), transfer_metrics(nats, TASKS, unit="nats")
    assert same.relative_forgetting == pytest.approx(bits.relative_forgetting)
    assert same.forgetting == pytest.approx(bits.forgetting * math.log(2))


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    count = draw(st.integers(1, 6))
    value = st.floats(0.0, 10.0)
    return draw(
        st.lists(st.lists(value, min_size=count, max_size=count), min_size=count + 1, max_size=count + 1)
    )


@given(matrices())
def test_identities(matrix: list[list[float]]) -> None:
    tasks = [str(j) for j in range(len(matrix[0]))]
    count = len(tasks)
    found = transfer_metrics(matrix, tasks)
    # ACC = LA + (T - 1) / T BWT, with the sign of losses.
    assert found.final_mean == pytest.approx(
        found.learning_loss - (count - 1) / count * found.backward_transfer, abs=1e-9
    )
    assert found.forgetting >= -found.backward_transfer - 1e-9, "the best is no worse than one's own stage"
    # The same values as accuracies: what was good is bad.
    turned = transfer_metrics([[-value for value in row] for row in matrix], tasks, unit="accuracy")
    assert turned.final_mean == pytest.approx(-found.final_mean)
    assert turned.learned == pytest.approx(found.learned)
    assert turned.forgetting == pytest.approx(found.forgetting)
    assert turned.backward_transfer == pytest.approx(found.backward_transfer)
    assert turned.forward_transfer == pytest.approx(found.forward_transfer)
    assert turned.relative_forgetting is None
    # An oracle that routes as oneself takes all the blame.
    same = transfer_metrics(matrix, tasks, oracle=matrix)
    assert same.regret_to_oracle == 0 and not any(same.forgotten_by_routes or ())
    # Saying that each stage trains the next task says nothing new.
    assert transfer_metrics(matrix, tasks, trained=[[j] for j in range(count)]) == found


@given(matrices())
def test_with_a_task_a_stage_it_is_what_the_papers_say(matrix: list[list[float]]) -> None:
    """Bit for bit: the formulas of Lopez-Paz & Ranzato and of Chaudhry et al., turned for losses."""
    count = len(matrix[0])
    found = transfer_metrics(matrix, [str(j) for j in range(count)], reference=matrix[0])
    end = matrix[count]
    own = [matrix[j + 1][j] for j in range(count)]
    best = [min(matrix[i][j] for i in range(j + 1, count)) for j in range(count - 1)]
    assert found.learned == tuple(matrix[0][j] - own[j] for j in range(count))
    assert found.forgotten == (*(max(0.0, end[j] - best[j]) for j in range(count - 1)), 0.0)
    assert found.intransigence == tuple(own[j] - matrix[0][j] for j in range(count))
    assert found.earlier == found.tasks[:-1]
    for value, expected in (
        (found.final_mean, end),
        (found.learning_loss, own),
        (found.forgetting, [end[j] - best[j] for j in range(count - 1)]),
        (found.backward_transfer, [own[j] - end[j] for j in range(count - 1)]),
        (found.forward_transfer, [matrix[0][j] - matrix[j][j] for j in range(1, count)]),
        (found.incremental_mean, [sum(matrix[i][:i]) / i for i in range(1, count + 1)]),
    ):
        assert value == (sum(expected) / len(expected) if expected else 0.0)


# ---- stages that are not one per task ------------------------------------------------------------

RECURRING = [
    [8.0, 8.0, 8.0],
    [2.0, 7.0, 7.5],  # a
    [3.0, 1.5, 6.0],  # b
    [1.9, 1.8, 5.0],  # a again
    [2.1, 1.75, 1.0],  # c
    [2.4, 1.6, 1.2],  # b again
]
VISITS = [[0], [1], [0], [2], [1]]


def test_a_task_that_comes_again_in_numbers() -> None:
    found = transfer_metrics(RECURRING, TASKS, trained=VISITS, reference=[1.8, 1.6, 1.0])
    assert found.tasks == TASKS and found.earlier == ("a", "c"), "b has just been trained"
    assert found.final_mean == pytest.approx((2.4 + 1.6 + 1.2) / 3)
    assert found.learning_loss == pytest.approx((1.9 + 1.6 + 1.0) / 3), "after the last visit of each"
    assert found.learned == pytest.approx((6.1, 6.4, 7.0))
    assert found.intransigence == pytest.approx((0.1, 0.0, 0.0))
    assert found.forgotten == pytest.approx((0.5, 0.0, 0.2))
    assert found.forgetting == pytest.approx(0.35)
    assert found.backward_transfer == pytest.approx(-0.35)
    assert found.forward_transfer == pytest.approx((1.0 + 3.0) / 2), "before the first visits"
    a_and_b = [(3.0 + 1.5) / 2, (1.9 + 1.8) / 2]
    whole = [(2.1 + 1.75 + 1.0) / 3, (2.4 + 1.6 + 1.2) / 3]
    assert found.incremental_mean == pytest.approx(fmean([2.0, *a_and_b, *whole]))
    assert found.relative_forgetting == pytest.approx([100 * (2**lost - 1) for lost in (0.5, 0.2)])


def test_the_best_of_an_early_visit_is_not_forgotten() -> None:
    # The second visit ended worse than the first: forgetting counts from the best, transfer from the last.
    matrix = [[8.0, 8.0], [1.5, 7.0], [2.0, 2.0], [1.8, 2.2], [1.9, 2.0]]
    found = transfer_metrics(matrix, ["a", "b"], trained=[[0], [1], [0], [1]])
    assert found.earlier == ("a",)
    assert found.forgetting == pytest.approx(0.4) and found.backward_transfer == pytest.approx(-0.1)


def test_several_tasks_in_one_stage() -> None:
    matrix = [[8.0, 8.0, 8.0], [2.0, 1.5, 6.0], [2.5, 1.7, 1.0]]
    found = transfer_metrics(matrix, TASKS, trained=[[0, 1], [2]])
    assert found.earlier == ("a", "b")
    assert found.learning_loss == pytest.approx(1.5) and found.forgetting == pytest.approx(0.35)
    assert found.forward_transfer == pytest.approx(2.0), "of c alone"
    assert found.incremental_mean == pytest.approx((1.75 + 5.2 / 3) / 2)
    joint = transfer_metrics([[8.0, 8.0], [2.0, 1.5]], ["a", "b"], trained=[[0, 1]])
    assert joint.earlier == () and joint.learning_loss == joint.final_mean == joint.incremental_mean == 1.75
    assert (joint.forgetting, joint.backward_transfer, joint.forward_transfer) == (0.0, 0.0, 0.0)
    assert joint.forgotten == (0.0, 0.0)


def test_a_task_that_is_never_trained_counts_in_forward_transfer_alone() -> None:
    watched = [[*row, other] for row, other in zip(LOSSES, (8.0, 6.0, 5.0, 7.0), strict=True)]
    stages = [[0], [1], [2]]
    found = transfer_metrics(watched, (*TASKS, "d"), trained=stages, reference=[1.9, 1.4, 1.0, 0.5])
    without = transfer_metrics(LOSSES, TASKS, reference=[1.9, 1.4, 1.0])
    assert found.forward_transfer == pytest.approx((1.0 + 2.0 + 1.0) / 3)
    assert dataclasses.replace(found, forward_transfer=without.forward_transfer) == without


def test_a_stage_whose_task_is_not_scored() -> None:
    # Stage 2 trained something without test text: a is an earlier task still, and b came after it.
    matrix = [[8.0, 8.0], [2.0, 7.0], [2.5, 6.5], [2.2, 1.0], [2.4, 1.3]]
    found = transfer_metrics(matrix, ["a", "b"], trained=[[0], [], [1], []])
    assert found.earlier == ("a", "b") and found.forgetting == pytest.approx((0.4 + 0.3) / 2)
    assert found.forward_transfer == pytest.approx(1.5)
    assert found.incremental_mean == pytest.approx(fmean([2.0, 2.5, 1.6, 1.85]))
    first = transfer_metrics(matrix, ["a", "b"], trained=[[], [], [1], [0]])
    assert first.incremental_mean == pytest.approx(fmean([1.0, 1.85])), "from the first that is scored on"


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    count, stages = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    trained = draw(
        st.lists(
            st.lists(st.integers(0, count - 1), max_size=3, unique=True), min_size=stages, max_size=stages
        ).filter(any)
    )
    row = st.lists(st.floats(0.0, 10.0), min_size=count, max_size=count)
    return draw(st.lists(row, min_size=stages + 1, max_size=stages + 1)), trained


@given(streams())
def test_identities_of_any_stages(stream: tuple[list[list[float]], list[list[int]]]) -> None:
    matrix, trained = stream
    tasks = [str(j) for j in range(len(matrix[0]))]
    found = transfer_metrics(matrix, tasks, trained=trained, reference=matrix[0], oracle=matrix)
    assert set(found.tasks) == {tasks[j] for stage in trained for j in stage}
    assert set(found.earlier) == set(found.tasks) - {tasks[j] for j in trained[-1]}
    share = len(found.earlier) / len(found.tasks)
    assert found.final_mean == pytest.approx(found.learning_loss - share * found.backward_transfer, abs=1e-9)
    assert found.forgetting >= -found.backward_transfer - 1e-9
    assert found.forgetting_by_weights == pytest.approx(-found.backward_transfer)
    assert found.forgetting_by_routes == found.regret_to_oracle == 0
    assert found.learned == pytest.approx([-behind for behind in found.intransigence or ()])
    kept = set(found.tasks) - set(found.earlier)
    assert not any(lost for task, lost in zip(found.tasks, found.forgotten, strict=True) if task in kept)
    # A stage that changes nothing, and whose tasks are no columns, changes little: the last row again.
    longer = transfer_metrics([*matrix, matrix[-1]], tasks, trained=[*trained, []])
    assert longer.earlier == found.tasks and longer.learned == found.learned
    assert longer.final_mean == found.final_mean and longer.learning_loss == found.learning_loss
    # Columns have no order of their own.
    turned = transfer_metrics(
        [row[::-1] for row in matrix],
        tasks[::-1],
        trained=[[len(tasks) - 1 - j for j in stage] for stage in trained],
    )
    for name in ("final_mean", "incremental_mean", "forgetting", "forward_transfer", "learning_loss"):
        assert getattr(turned, name) == pytest.approx(getattr(found, name), abs=1e-9)


@pytest.mark.parametrize(
    ("matrix", "tasks", "more"),
    [
        ([[1.0]], ["a"], {}),
        ([[1.0, 2.0], [1.0, 2.0]], ["a", "b"], {}),
        ([[1.0, 2.0], [1.0], [1.0, 2.0]], ["a", "b"], {}),
        ([[]], [], {}),
        ([[1.0], [1.0]], ["a"], {"reference": [1.0, 2.0]}),
        ([[1.0], [1.0]], ["a"], {"oracle": [[1.0]]}),
        ([[1.0], [1.0]], ["a"], {"trained": [[0], [0]]}),
        ([[1.0], [1.0]], ["a"], {"trained": [[1]]}),
        ([[1.0], [1.0]], ["a"], {"trained": [[]]}),
        ([[1.0]], ["a"], {"trained": []}),
    ],
)
def test_what_is_not_whole_is_refused(matrix: list[list[float]], tasks: list[str], more: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        transfer_metrics(matrix, tasks, **more)


# ---- eval.csv ------------------------------------------------------------------------------------


def scored(
    trained: Sequence[str],
    tasks: Sequence[str],
    *,
    split: str = "test",
    route: str = "own",
    first: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of eval.csv in which the value of task j at stage i is first + 10 i + j."""
    return [
        {
            "task_trained": said,
            "task_eval": task,
            "split": split,
            "route": route,
            "bits_per_byte": first + 10 * i + j,
            "accuracy": None,
            "stage": i,
        }
        for i, said in enumerate(["none", *trained])
        for j, task in enumerate(tasks)
    ]


def test_a_matrix_is_read_from_the_scores() -> None:
    rows = scored(["a", "b"], ["a", "b"], split="valid", first=100) + scored(["a", "b"], ["a", "b"])
    assert task_matrix(rows) == TaskMatrix(
        ((0.0, 1.0), (10.0, 11.0), (20.0, 21.0)), ("a", "b"), ((0,), (1,)), "own"
    )
    assert task_matrix(rows, split="valid").rows[2] == (120.0, 121.0)
    assert task_matrix([]) == TaskMatrix((), (), (), "own") and run_metrics([]) is None


@pytest.mark.parametrize(
    ("said", "tasks", "trained"),
    [
        ("a", ["a", "b"], (0,)),
        ("b+a", ["a", "b"], (0, 1)),
        ("c++", ["c", "c++"], (1,)),
        ("a+other+b", ["a", "b"], (0, 1)),
        ("other", ["a", "b"], ()),
        ("2024+2025", ["2024", "2025"], (0, 1)),
    ],
)
def test_what_a_stage_trained_is_read_from_its_name(
    said: str, tasks: list[str], trained: tuple[int, ...]
) -> None:
    assert task_matrix(scored([said], tasks)).trained == (trained,)


def test_numbers_as_names_are_names() -> None:
    rows = [{**row, "task_eval": 7, "task_trained": 7} for row in scored(["7"], ["7"])]
    assert task_matrix(rows).tasks == ("7",) and task_matrix(rows).trained == ((0,),)


def test_recurring_tasks_are_rows_of_their_own() -> None:
    matrix = task_matrix(scored(["a", "b", "a", "c", "b"], ["a", "b", "c"]))
    assert len(matrix.rows) == 6 and matrix.trained == ((0,), (1,), (0,), (2,), (1,))
    assert matrix.untrained == () and task_matrix(scored(["a"], ["a", "b"])).untrained == ("b",)


def test_the_models_own_routes_come_first() -> None:
    own = scored(["a", "b"], ["a", "b"])
    oracle = scored(["a", "b"], ["a", "b"], route="oracle", first=100)
    assert task_matrix(own + oracle).route == "own" and task_matrix(own + oracle).rows[0][0] == 0
    assert task_matrix(oracle + own, route="oracle").rows[0][0] == 100
    told = task_matrix(oracle)
    assert told.route == "oracle" and told.rows[0][0] == 100
    assert task_matrix(own, route="oracle").rows == ()


def test_a_stage_that_was_scored_in_part_is_left_out() -> None:
    rows = scored(["a", "b"], ["a", "b"])
    assert len(task_matrix(rows[:-1]).rows) == 2 and task_matrix(rows[:-1]).trained == ((0,),)
    # The oracle's last row is still to come: until then it says nothing.
    late = rows + scored(["a", "b"], ["a", "b"], route="oracle")[:-1]
    metrics = run_metrics(late)
    assert metrics is not None and metrics.regret_to_oracle is None


def test_metrics_with_both_routes() -> None:
    names = ["a", "b"]
    own = scored(["a", "b"], names)
    oracle = [
        {**row, "route": "oracle", "bits_per_byte": row["bits_per_byte"] - row["stage"]}
        for row in scored(["a", "b"], names)
    ]
    metrics = run_metrics(own + oracle)
    assert metrics is not None
    assert (metrics.forgetting_by_weights, metrics.forgetting_by_routes) == (9.0, 1.0)
    assert metrics.regret_to_oracle == 2.0
    told = run_metrics(oracle)
    assert told is not None and told.final_mean == 18.5 and told.regret_to_oracle is None
    assert run_metrics(own[:2]) is None, "nothing was trained so far"


def test_accuracies_are_read_where_they_are() -> None:
    rows = scored(["a", "b"], ["a", "b"])
    for row in rows:
        row["accuracy"] = [[0.0, 0.0], [0.9, 0.1], [0.6, 0.8]][row["stage"]][row["task_eval"] == "b"]
    matrix = task_matrix(rows, value="accuracy")
    assert matrix.rows == ((0.0, 0.0), (0.9, 0.1), (0.6, 0.8))
    metrics = run_metrics(rows, value="accuracy")
    assert metrics is not None
    assert metrics.final_mean == pytest.approx(0.7) and metrics.forgetting == pytest.approx(0.3)
    assert metrics.learning_loss == pytest.approx(0.85) and metrics.relative_forgetting is None
    some = [{**row, "accuracy": None if row["task_eval"] == "b" else row["accuracy"]} for row in rows]
    assert task_matrix(some, value="accuracy").tasks == ("a",)
    assert task_matrix(some, value="accuracy").trained == ((0,), ())
    old = [{name: cell for name, cell in row.items() if name != "accuracy"} for row in rows]
    assert task_matrix(old, value="accuracy") == TaskMatrix((), (), (), "own")
