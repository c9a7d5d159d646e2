"""The two phases of a learning rate: true rates, every group its ratio, and Parts that are born later."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from cambia.continual.course import Course
from cambia.continual.two_phase import TwoPhaseLRScheduler
from cambia.errors import ConfigError


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def optimizer_of(*rates: float, cls: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    return cls([{"params": [parameter()], "lr": rate} for rate in rates])


def step(optimizer: torch.optim.Optimizer) -> list[float]:
    """One optimizer step; the rates that it took."""
    taken: list[float] = []
    handle = optimizer.register_step_post_hook(
        lambda opt, *_: taken.extend(float(group["lr"]) for group in opt.param_groups)
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    handle.remove()
    return taken


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[list[float]]:
    taken = []
    for _ in range(steps):
        taken.append(step(optimizer))
        scheduler.step()
    return taken


def test_rates_are_rates_and_no_multipliers() -> None:
    optimizer = optimizer_of(1e-3)
    scheduler = TwoPhaseLRScheduler(optimizer, 5e-3, 5e-4, 10, warmup_steps=0, decay_steps=0)
    assert [rate for (rate,) in rates(optimizer, scheduler, 14)] == [5e-3] * 10 + [5e-4] * 4


@settings(max_examples=25)
@given(st.integers(0, 12), st.none() | st.integers(1, 20), st.floats(0.01, 1))
def test_a_course_seeds_at_the_schedulers_rates(warmup: int, cycle: int | None, low: float) -> None:
    course = Course(warmup_steps=warmup, cycle_steps=cycle, cycle_low=low)
    scheduler = TwoPhaseLRScheduler(optimizer_of(1.0), 1.0, low, 60, warmup_steps=warmup, cycle_steps=cycle)
    taken = [course.rate("seeding", step) for step in range(1, 61)]
    assert taken == [scheduler.rate(step) for step in range(60)]


def test_it_warms_up_and_decays() -> None:
    optimizer = optimizer_of(1.0)
    scheduler = TwoPhaseLRScheduler(optimizer, 1.0, 0.1, 40)
    taken = [rate for (rate,) in rates(optimizer, scheduler, 100)]
    assert taken[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert taken[2:40] == [1.0] * 38
    assert all(a > b for a, b in itertools.pairwise(taken[39:81]))
    assert taken[80:] == [0.1] * 20


def test_cycles_fall_to_the_low_rate_and_start_again() -> None:
    optimizer = optimizer_of(1.0)
    scheduler = TwoPhaseLRScheduler(optimizer, 1.0, 0.2, 12, warmup_steps=2, decay_steps=0, cycle_steps=5)
    taken = [rate for (rate,) in rates(optimizer, scheduler, 14)]
    assert taken[2] == taken[7] == 1.0
    assert taken[2:7] == taken[7:12] == sorted(taken[2:7], reverse=True)
    assert 0.2 < taken[6] < 0.3
    assert taken[12:] == [0.2, 0.2]


@given(
    ratios=st.lists(st.floats(0, 100), min_size=0, max_size=3),
    own=st.floats(1e-5, 1.0),
    steps=st.integers(1, 30),
)
def test_every_group_keeps_its_ratio(ratios: list[float], own: float, steps: int) -> None:
    optimizer = optimizer_of(own, *(own * ratio for ratio in ratios), cls=torch.optim.SGD)
    scheduler = TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 8)
    for first, *others in rates(optimizer, scheduler, steps):
        assert 0 < first <= 1e-2
        assert others == pytest.approx([first * ratio for ratio in ratios])


def test_a_part_born_later_is_seeded_from_its_first_step() -> None:
    optimizer = optimizer_of(1e-3)
    scheduler = TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 10, warmup_steps=4, decay_steps=5)
    alone = TwoPhaseLRScheduler(optimizer_of(1e-3), 1e-2, 1e-3, 10, warmup_steps=4, decay_steps=5)
    rates(optimizer, scheduler, 7)
    optimizer.add_param_group({"params": [parameter()], "lr": 5e-4})
    for at, (old, new) in enumerate(rates(optimizer, scheduler, 20)):
        assert old == pytest.approx(alone.rate(7 + at))
        assert new == pytest.approx(alone.rate(at) / 2)
    assert scheduler.get_last_lr() == pytest.approx([1e-3, 5e-4])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("born_after", [None, 3, 9])
@pytest.mark.parametrize("cut", [0, 5, 12, 25])
def test_it_goes_on_where_it_was_saved(born_after: int | None, cut: int) -> None:
    def made() -> tuple[torch.optim.Optimizer, TwoPhaseLRScheduler]:
        optimizer = optimizer_of(1e-3, 2e-3)
        return optimizer, TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 10, cycle_steps=3)

    optimizer, scheduler = made()
    whole: list[list[float]] = []
    for at in range(30):
        if at == cut:
            saved = through_a_file(optimizer.state_dict()), through_a_file(scheduler.state_dict())
        if at == born_after:
            optimizer.add_param_group({"params": [parameter()]})
        whole += rates(optimizer, scheduler, 1)

    again, scheduler = made()
    if born_after is not None and born_after < cut:
        again.add_param_group({"params": [parameter()]})
    again.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for at in range(cut, 30):
        if at == born_after:
            again.add_param_group({"params": [parameter()]})
        assert rates(again, scheduler, 1) == [whole[at]]


def test_a_second_scheduler_begins_anew() -> None:
    optimizer = optimizer_of(1e-3)
    rates(optimizer, TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 5), 20)
    scheduler = TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 5, warmup_steps=0)
    assert rates(optimizer, scheduler, 1) == [[1e-2]]


def test_rates_that_are_tensors_stay_the_same_tensors() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=torch.tensor(0.5))
    scheduler = TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 4, warmup_steps=0, decay_steps=0)
    held = torch.tensor(0.25)
    optimizer.add_param_group({"params": [parameter()], "lr": held})
    assert rates(optimizer, scheduler, 6)[-1] == pytest.approx([1e-3, 5e-4])
    assert optimizer.param_groups[1]["lr"] is held


def test_an_optimizer_can_be_copied() -> None:
    optimizer = optimizer_of(1e-3)
    rates(optimizer, TwoPhaseLRScheduler(optimizer, 1e-2, 1e-3, 5), 3)
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"low_lr": 0.0}, "rates above 0"),
        ({"low_lr": 1.0}, "not the higher"),
        ({"seeding_steps": -1}, "at least 0"),
        ({"warmup_steps": 11}, "no more warm-up than seeding"),
        ({"decay_steps": -1}, "at least 0"),
        ({"cycle_steps": 0}, "no cycles"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TwoPhaseLRScheduler(
            optimizer_of(1e-3), **{"high_lr": 1e-2, "low_lr": 1e-3, "seeding_steps": 10, **settings}
        )


def test_a_first_group_without_a_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        TwoPhaseLRScheduler(optimizer_of(0.0, 1e-3), 1e-2, 1e-3, 10)
