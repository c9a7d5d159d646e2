"""What was learned, forgotten and grown, in numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cambia.evaluation import growth_metrics, transfer_metrics
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


@pytest.mark.parametrize(
    ("matrix", "tasks", "more"),
    [
        ([[1.0]], ["a"], {}),
        ([[1.0, 2.0], [1.0, 2.0]], ["a", "b"], {}),
        ([[1.0, 2.0], [1.0], [1.0, 2.0]], ["a", "b"], {}),
        ([[]], [], {}),
        ([[1.0], [1.0]], ["a"], {"reference": [1.0, 2.0]}),
        ([[1.0], [1.0]], ["a"], {"oracle": [[1.0]]}),
    ],
)
def test_what_is_not_whole_is_refused(matrix: list[list[float]], tasks: list[str], more: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        transfer_metrics(matrix, tasks, **more)
