"""The measures that rewards are made of, against their definitions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.decoding.rewards.calibration import Ruler
from cambia.decoding.rewards.diversity import _left_out, self_bleu
from cambia.decoding.rewards.frontier import Clusters, frontier_area
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


@given(rows, rows, st.integers(1, 3))
def test_divergence_of_runs(one: list[list[int]], other: list[list[int]], n: int) -> None:
    p, q = shares(one, n), shares(other, n)
    expected = 0.0
    for gram in {*p, *q}:
        middle = (p.get(gram, 0) + q.get(gram, 0)) / 2
        expected += sum(x.get(gram, 0) / 2 * math.log((x.get(gram, 0) or 1) / middle) for x in (p, q))
    mine, theirs = (Grams.up_to(each, n)[-1].histogram() for each in (one, other))
    ones = torch.ones(len(one), dtype=torch.float64)
    found = mine.divergence(ones, theirs, theirs(torch.ones(len(other), dtype=torch.float64)))
    assert found.item() == pytest.approx(expected, abs=1e-9)
    # Twice the weight is the text twice.
    ones[0] = 2
    again = Grams.up_to([*one, one[0]], n)[-1].histogram()
    torch.testing.assert_close(mine(ones), again(torch.ones(len(one) + 1, dtype=torch.float64)))


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


odds = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda x: torch.tensor(x).double() / sum(x))


@given(odds, odds)
def test_the_frontier_tells_how_alike_two_distributions_are(p: Tensor, q: Tensor) -> None:
    area = frontier_area(p, q).item()
    assert 0 < area <= 1 + 1e-12
    assert area == pytest.approx(frontier_area(q, p).item())
    assert frontier_area(p, p).item() == pytest.approx(1)
    assert frontier_area(p, (p + q) / 2).item() >= area - 1e-9
    far = torch.tensor([1e-9, 1e-9, 1 - 2e-9], dtype=torch.float64)
    assert frontier_area(far, far.flip(0)).item() < 0.1


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
