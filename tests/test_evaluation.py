"""What growth has brought, in numbers."""

from __future__ import annotations

import pytest

from cambia.evaluation import growth_metrics
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
