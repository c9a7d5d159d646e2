"""The measures that rewards are made of, against their definitions."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.decoding.rewards.calibration import Ruler
from cambia.decoding.rewards.clusters import Clusters
from cambia.decoding.rewards.distance import HistogramDistance, Histograms, LineDistance
from cambia.decoding.rewards.diversity import _left_out, self_bleu
from cambia.decoding.rewards.grams import Grams

rows = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=5)


def counted(row: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def shares(texts: list[list[int]], n: int) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = Counter()
    for text in texts:
        grams = counted(text, n) or Counter({(): 1})
        for gram, count in grams.items():
            found[gram] += count / sum(grams.values()) / len(texts)
    return found


def histograms(texts: list[list[int]], n: int) -> Histograms:
    return Grams.up_to(texts, n)[-1].histograms()


def equal(number: int) -> Tensor:
    return torch.ones(number, dtype=torch.float64)


some = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=2, max_size=5)


@given(some, some, some, st.integers(1, 3), st.floats(0.01, 1))
def test_distance_of_runs(
    one: list[list[int]], other: list[list[int]], usual: list[list[int]], n: int, rare: float
) -> None:
    q, u = shares(other, n), shares(usual, n)

    def pairs(left: dict[tuple[int, ...], float], right: dict[tuple[int, ...], float]) -> float:
        return sum(x * right.get(g, 0) / ((q.get(g, 0) + u.get(g, 0)) / 2 + rare) for g, x in left.items())

    def among(texts: list[list[int]]) -> float:
        return statistics.fmean(pairs(shares([a], n), shares([b], n)) for a, b in permutations(texts, 2))

    expected = among(one) - 2 * pairs(shares(one, n), q) + among(other)
    distance = HistogramDistance(histograms(other, n), histograms(usual, n), rare=rare)
    assert distance.of(histograms(one, n))(equal(len(one))).item() == pytest.approx(expected, abs=1e-9)


@given(some, some, st.integers(1, 2), st.data())
def test_few_texts_are_as_far_as_many(
    texts: list[list[int]], other: list[list[int]], n: int, data: st.DataObject
) -> None:
    few = data.draw(st.integers(2, len(texts)))
    far = HistogramDistance(histograms(other, n), histograms(other, n), rare=0.1).of(histograms(texts, n))
    found = []
    for chosen in combinations(range(len(texts)), few):
        weights = torch.zeros(len(texts), dtype=torch.float64)
        weights[list(chosen)] = 1
        found.append(far(weights).item())
    assert statistics.fmean(found) == pytest.approx(far(equal(len(texts))).item(), abs=1e-9)


numbers = st.lists(st.floats(-5, 5), min_size=2, max_size=5).map(lambda x: torch.tensor(x).double())


@given(numbers, numbers)
def test_distance_of_numbers(one: Tensor, other: Tensor) -> None:
    def apart(x: Tensor) -> float:
        return statistics.fmean(abs(a - b) for a, b in permutations(x.tolist(), 2))

    across = statistics.fmean(abs(a - b) for a in one.tolist() for b in other.tolist())
    found = LineDistance(other).of(one)(equal(len(one)))
    assert found.item() == pytest.approx(2 * across - apart(one) - apart(other), abs=1e-9)


def test_one_text_has_a_distance() -> None:
    one, others = histograms([[0, 1]], 1), histograms([[0, 1], [2]], 1)
    assert torch.isfinite(HistogramDistance(others, others, rare=0.1).of(one)(equal(1)))
    assert torch.isfinite(HistogramDistance(one, one, rare=0.1).of(others)(equal(2)))


@given(rows)
def test_self_bleu(texts: list[list[int]]) -> None:
    assert self_bleu(Grams.up_to(texts[:1], 4)).tolist() == [0]
    for place, found in enumerate(self_bleu(Grams.up_to([*texts, [0, 1]], 4)).tolist()[:-1]):
        logs = []
        for n in range(1, min(4, len(texts[place])) + 1):
            mine = counted(texts[place], n)
            others = [counted(text, n) for other, text in enumerate([*texts, [0, 1]]) if other != place]
            right = sum(min(count, max((o[g] for o in others), default=0)) for g, count in mine.items())
            more = n > 1
            logs.append(math.log(max(right + more, 1e-12) / (sum(mine.values()) + more)))
        assert found == pytest.approx(math.exp(sum(logs) / max(1, len(logs))), rel=1e-9)


def distinct(texts: list[list[int]], n: int) -> float:
    grams = [counted(text, n) for text in texts]
    return len(set().union(*grams)) / max(1, sum(sum(each.values()) for each in grams))


@given(rows, st.integers(1, 3))
def test_what_each_text_adds_to_distinct_runs(texts: list[list[int]], n: int) -> None:
    changes = [distinct(texts, n) - distinct(texts[:i] + texts[i + 1 :], n) for i in range(len(texts))]
    expected = torch.tensor(changes, dtype=torch.float64) * (len(texts) - 1)
    torch.testing.assert_close(_left_out(Grams.up_to(texts, n)[-1]), expected - expected.mean())


def test_clusters_are_those_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 3
    points = 10 * truth[:, None] + torch.randn(60, 2, generator=generator)
    clusters = Clusters.of(points, 3)
    found = clusters.assign(points)
    assert all(len(found[truth == kind].unique()) == 1 for kind in range(3)) and len(found.unique()) == 3
    assert clusters.assign(torch.tensor([[500.0, 0.0]])).tolist() == [3]  # like none
    assert len(Clusters.of(torch.ones(5, 2), 3)) == 1


def test_ends_are_those_of_the_number_that_is_scored() -> None:
    # An error that falls with one over the number is continued exactly beyond what there is.
    ruler = Ruler(lambda weights: 1 + 3 / weights.sum(), lambda weights: 2 + 3 / weights.sum(), 40)
    for number in (1, 10, 40, 400):
        ends = ruler.at(number)
        assert (ends.human, ends.plain) == (pytest.approx(1 + 3 / number), pytest.approx(2 + 3 / number))
        assert ends.nearness(torch.tensor(1.5 + 3 / number)).item() == pytest.approx(0.5)
        assert ends.likeness(torch.tensor(0.5 + 3 / number)).item() == pytest.approx(0.5)
