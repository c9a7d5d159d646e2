"""Searches find a known top through noise, and all that was tried helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cambia.decoding.parameters import SEARCHED, DecodingParameters
from cambia.decoding.process import Process, spread
from cambia.decoding.searching import CmaSearch, GridSearch, ProcessSearch, Search, Space, TpeSearch
from cambia.errors import ConfigError

TOP = DecodingParameters(temperature=0.7, top_p=0.85, repetition_penalty=1.1)
SPACE = Space(SEARCHED, DecodingParameters())


def noisy(seed: int, noise: float):
    """Falls off from TOP; all of a round share what is hard about it."""
    generator = np.random.default_rng(seed)

    def worth(candidates: Sequence[DecodingParameters], number: int) -> list[float]:
        shared = np.random.default_rng(number).normal()
        away = [float(((SPACE.place(one) - SPACE.place(TOP)) ** 2).sum()) for one in candidates]
        return [shared - value + noise * float(generator.normal()) for value in away]

    return worth


def away(found: DecodingParameters) -> float:
    return float(np.abs(SPACE.place(found) - SPACE.place(TOP)).max())


@pytest.mark.parametrize("search", [ProcessSearch(), CmaSearch(), TpeSearch()])
def test_a_search_finds_the_top(search) -> None:
    found = search.run(noisy(0, 0.0), SPACE, rounds=12, seed=1)
    assert away(found.best) < (0.3 if isinstance(search, TpeSearch) else 0.05)
    assert len(found.tried) == 12 * search.population
    assert search.run(noisy(0, 0.0), SPACE, rounds=12, seed=1).best == found.best


def test_a_grid_has_every_point_once() -> None:
    found = GridSearch(points=4).run(noisy(0, 0.0), SPACE, rounds=GridSearch(points=4).rounds(SPACE))
    assert len({one.parameters for one in found.tried}) == len(found.tried) == 64
    assert away(found.best) <= 1 / 3 / 2 + 1e-9


def test_through_noise_the_mean_of_an_evolution_is_nearer_than_the_best_that_was_tried() -> None:
    mine, tried = [], []
    for seed in range(8):
        found = CmaSearch().run(noisy(seed, 0.04), SPACE, rounds=12, seed=seed)
        mine.append(away(found.best))
        tried.append(away(max(found.tried, key=lambda one: one.worth).parameters))
    assert np.mean(mine) < 0.85 * np.mean(tried)


def test_a_process_needs_fewer_trials() -> None:
    def mean(search: Search) -> float:
        return float(
            np.mean([away(search.run(noisy(i, 0.04), SPACE, rounds=5, seed=i).best) for i in range(8)])
        )

    process, tpe, cma = map(mean, (ProcessSearch(), TpeSearch(), CmaSearch()))
    assert process < 0.8 * tpe and process < cma


def test_where_nothing_is_better_it_stays() -> None:
    """Noise alone must not lead away from where it began by much: with its own top there, it is found."""
    space = Space(SEARCHED, TOP)
    found = [ProcessSearch().run(noisy(seed, 0.1), space, rounds=5, seed=seed).best for seed in range(6)]
    lost = [float(((space.place(one) - space.place(TOP)) ** 2).sum()) for one in found]
    assert np.mean(lost) < 0.05  # what is drawn at first loses 0.19


def test_one_value_is_enough_and_equal_ones_are_no_trouble() -> None:
    point = np.array([[0.2, 0.4, 0.6]])
    assert Process.of(point, np.zeros(1)).surest() == 0
    points = spread(5, 3, np.random.default_rng(0))
    assert sorted((5 * points[:, 0]).astype(int)) == list(range(5))  # each fifth has one
    assert Process.of(points, np.zeros(5), np.arange(5)).surest() in range(5)


def test_noise_alone_seldom_leads_away_from_where_it_began() -> None:
    """Values that are noise and nothing else: the best of them would nearly always be another."""
    space = Space(SEARCHED, DecodingParameters())
    stayed = 0
    for seed in range(24):
        generator = np.random.default_rng(seed)
        search = ProcessSearch()
        found = search.run(
            lambda asked, _, g=generator: g.normal(size=len(asked)).tolist(), space, rounds=2, seed=seed
        )
        stayed += found.best == space.start
    assert stayed >= 10  # it stays in more than half of many; without, in one of fifteen
    points = np.linspace(0, 1, 11)[:, None]
    worth = -((points[:, 0] - 0.7) ** 2)
    assert Process.of(points, worth).surest(than=0) == 7  # what is surely better is taken
    assert Process.of(points, worth).surest(than=7) == 7


def test_what_cannot_be_searched_is_said() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Space(("temp",), DecodingParameters())


def test_what_compares_all_at_once_is_refused_beside_weights_that_learn() -> None:
    for search in (TpeSearch(), GridSearch()):
        with pytest.raises(ConfigError, match=r"search\.type process or cma"):
            search.begin(SPACE, moving=True)


def test_another_search_does_not_go_on() -> None:
    one = CmaSearch().begin(SPACE, seed=2)
    one.tell(noisy(0, 0.0)(one.ask(), 0))
    for other in (ProcessSearch().begin(SPACE, seed=2), CmaSearch().begin(SPACE, seed=3)):
        with pytest.raises(ConfigError, match="settings that it began with"):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("search", "moving"),
    [
        (ProcessSearch(), False),
        (ProcessSearch(), True),
        (CmaSearch(), True),
        (TpeSearch(), False),
        (GridSearch(points=3, population=5), False),
    ],
)
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(search, moving) -> None:
    worth = noisy(0, 0.0)
    whole = search.begin(SPACE, seed=2, moving=moving)
    for number in range(5):
        if number == 3:
            state = whole.state_dict()
        whole.tell(worth(whole.ask(), whole.round))
    again = search.begin(SPACE, seed=2, moving=moving)
    again.load_state_dict(state)
    for _ in range(2):
        again.tell(worth(again.ask(), again.round))
    assert again.tried == whole.tried and again.best == whole.best and again.ask() == whole.ask()


def test_a_top_that_moves_is_followed() -> None:
    """Beside weights that learn what was good at first is not good later."""
    ongoing = ProcessSearch().begin(SPACE, seed=0, moving=True)
    for number in range(16):
        wanted = np.array([0.2, 0.8, 0.5]) if number < 6 else np.array([0.8, 0.3, 0.5])
        away = [float(((SPACE.place(one) - wanted) ** 2).sum()) for one in ongoing.ask()]
        ongoing.tell([number - value for value in away])  # the weights get better, too
    assert np.abs(SPACE.place(ongoing.best) - wanted).max() < 0.1


def test_rounds_of_other_levels_do_not_lead_away() -> None:
    """Later rounds are worth more whatever is tried in them: that says nothing of their candidates."""
    generator = np.random.default_rng(0)
    points, rounds = generator.random((64, 3)), np.repeat(np.arange(8), 8)
    points[rounds > 3, 0] *= 0.3  # later ones lie where it is worse
    top = np.array([0.7, 0.5, 0.5])
    values = 3.0 * rounds - ((points - top) ** 2).sum(1)
    surest = Process.of(points, values, rounds).surest()
    assert ((points[surest] - top) ** 2).sum() <= np.sort(((points - top) ** 2).sum(1))[5]  # of 64


def test_nothing_is_tried_twice() -> None:
    space = Space(("temperature",), DecodingParameters())
    found = ProcessSearch().run(
        lambda candidates, _: [one.temperature for one in candidates], space, rounds=6
    )
    assert len({one.parameters for one in found.tried}) == len(found.tried)
