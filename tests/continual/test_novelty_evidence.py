"""Ranks among held-out windows, and bets on shares: what is stated holds, and changes are found in time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.continual.novelty.calibration import Calibration
from cambia.continual.novelty.evidence import Rule, advance, log_bets, log_evidence
from cambia.errors import DataError

LEVELS = [0.01, 0.05, 0.2]
ALLOWED = [0.04, 0.125, 0.325]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- p-values ------------------------------------------------------------------------------------


def heavy_tailed(rows: int, scores: int, seed: int) -> Tensor:
    """Skewed, heavy-tailed, correlated and full of ties: nothing but exchangeable."""
    drawn = torch.randn(rows, scores, generator=generator(seed), dtype=torch.float64)
    drawn[:, 1:] += drawn[:, :1]
    return (drawn.abs() ** 3 * 4).floor()


@pytest.mark.parametrize("held_out", [20, 101])
def test_p_values_of_exchangeable_windows_are_small_no_more_often_than_they_say(held_out: int) -> None:
    draws, new = 300, 40
    small = torch.zeros(len(LEVELS))
    for seed in range(draws):
        windows = heavy_tailed(held_out + new, 3, seed)
        calibration = Calibration.of(windows[:held_out])
        p_values = calibration.p_values(calibration.combined(windows[held_out:]))
        small += (p_values[:, None] <= torch.tensor(LEVELS)).sum(0)
    share = small / (draws * new)
    # New windows of one draw share their held-out ones, so the draws are what is independent.
    slack = [4 * math.sqrt(level * (1 - level) / draws) for level in LEVELS]
    assert all(s <= level + more for s, level, more in zip(share.tolist(), LEVELS, slack, strict=True))


@given(
    scale=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    shift=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_units_of_scores_do_not_matter(scale: list[float], shift: list[float], seed: int) -> None:
    windows = torch.randn(60, 3, generator=generator(seed), dtype=torch.float64)
    other = windows * torch.tensor(scale) + torch.tensor(shift)
    here, there = Calibration.of(windows[:40]), Calibration.of(other[:40])
    assert torch.allclose(here.combined(windows[40:]), there.combined(other[40:]), atol=1e-6)


def test_stranger_windows_have_smaller_p_values() -> None:
    calibration = Calibration.of(torch.randn(200, 1, generator=generator(0)))
    p_values = calibration.p_values(torch.linspace(-5, 5, 50, dtype=torch.float64))
    assert (p_values.diff() <= 0).all()
    assert p_values[0] == 1 and p_values[-1] == pytest.approx(1 / 101)


@pytest.mark.parametrize("held_out", [0, 1, 2, 3])
def test_nothing_is_strange_to_a_domain_of_which_nothing_was_held_out(held_out: int) -> None:
    calibration = Calibration.of(torch.zeros(held_out, 2))
    p_values = calibration.p_values(calibration.combined(torch.full((1, 2), 1e6)))
    assert p_values.item() >= 0.5


def test_risk_is_how_often_the_held_out_windows_mislead() -> None:
    count, level, allowed = 99, 0.05, 0.08
    held_out = torch.rand(20_000, count, generator=generator(1), dtype=torch.float64).sort(1).values
    rank = math.floor(level * (count + 1))
    share = 1 - held_out[:, count - rank]  # of uniform scores, beyond the one of that rank
    calibration = Calibration.of(torch.zeros(2 * count, 1))
    assert len(calibration.ranked) == count
    assert calibration.risk(level, allowed) == pytest.approx(
        (share > allowed).double().mean().item(), abs=0.01
    )


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="not a number"):
        Calibration.of(torch.tensor([[1.0], [math.nan]]))


# ---- bets ----------------------------------------------------------------------------------------


def clumped(streams: int, seed: int) -> Tensor:
    """Shares as far from independent windows as can be, all of a group or none, and as many as allowed."""
    drawn = torch.rand(streams, 1, generator=generator(seed), dtype=torch.float64)
    return (drawn < torch.tensor(ALLOWED)).double()


def first_times(rule: Rule, threshold: float, *, streams: int, groups: int) -> Tensor:
    """When the evidence in each stream first reaches a threshold; `groups` + 1 where it never does."""
    wealth = torch.full((streams, len(LEVELS)), -math.inf, dtype=torch.float64)
    first = torch.full((streams,), groups + 1)
    for group in range(1, groups + 1):
        wealth = advance(rule, wealth, log_bets(clumped(streams, group), ALLOWED, 0.9), group)
        reached = log_evidence(wealth) >= threshold
        first = torch.where(reached & (first > groups), group, first)
    return first


@pytest.mark.parametrize("delta", [0.2, 0.05])
def test_the_martingale_ever_raises_a_false_alarm_as_seldom_as_it_says(delta: float) -> None:
    streams, groups = 4000, 400
    alarms = (
        (first_times("martingale", -math.log(delta), streams=streams, groups=groups) <= groups).sum().item()
    )
    assert 0 < alarms <= delta * streams + 3 * math.sqrt(delta * streams)


@pytest.mark.parametrize("run_length", [20, 200])
def test_cusum_runs_as_long_between_false_alarms_as_it_says(run_length: int) -> None:
    groups = 30 * run_length
    first = first_times("cusum", math.log(run_length), streams=500, groups=groups).double()
    assert first.mean().item() >= run_length


@given(share=st.floats(0.5, 1.0), quiet=st.integers(0, 500))
def test_a_change_is_found_within_the_bound(share: float, quiet: int) -> None:
    """After any stretch of nothing at all, by the level that grows fastest."""
    threshold = -math.log(0.01)
    fastest = log_bets(torch.full((3,), share), ALLOWED, 0.9).max().item()
    bound = 1 + (threshold + math.log(3) + math.log((quiet + 1) * (quiet + 2))) / fastest
    wealth = torch.full((3,), -math.inf, dtype=torch.float64)
    group = 0
    while log_evidence(wealth) < threshold:
        group += 1
        shares = torch.full((3,), 0.0 if group <= quiet else share, dtype=torch.float64)
        wealth = advance("martingale", wealth, log_bets(shares, ALLOWED, 0.9), group)
    assert group - quiet <= bound
