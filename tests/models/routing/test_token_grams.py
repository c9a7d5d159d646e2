"""n-gram likelihoods: proper probabilities, causal, within a limit of memory, and restored to the bit."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.errors import ConfigError
from cambia.models.routing import token_grams
from cambia.models.routing.token_grams import GramKeys, TokenGrams

V = 7
texts = st.lists(st.lists(st.integers(0, V - 1), min_size=12, max_size=12), min_size=1, max_size=12)


def fitted(rows: Tensor, *, order: int = 3, max_grams: int = 1000) -> TokenGrams:
    grams = TokenGrams(V, order=order, max_grams=max_grams)
    grams.observe(rows)
    grams.seal()
    return grams


def losses(grams: TokenGrams, rows: Tensor, lengths: Tensor | None = None) -> np.ndarray:
    return grams.token_losses(GramKeys.of(rows, lengths, order=grams.order))


def by_hand(rows: list[list[int]], text: list[int], order: int) -> list[float]:
    """The same likelihood, token by token and out of dictionaries."""
    found = Counter(
        tuple(row[end - n : end])
        for row in rows
        for n in range(1, order + 1)
        for end in range(n, len(row) + 1)
    )
    told = []
    for end in range(1, len(text) + 1):
        probability = 1 / V
        for n in range(1, min(order, end) + 1):
            context = tuple(text[end - n : end - 1])
            followers = {gram: c for gram, c in found.items() if len(gram) == n and gram[:-1] == context}
            if not followers:
                break
            total = max(sum(followers.values()), found[context] if context else 0) + len(followers)
            share = {gram: c / total for gram, c in followers.items()}
            left = 1 - sum(share.values())
            probability = share.get((*context, text[end - 1]), 0) + left * probability
        told.append(-math.log(probability))
    return told


@given(texts, st.integers(1, 4))
def test_the_likelihood_is_that_of_witten_and_bell(rows: list[list[int]], order: int) -> None:
    text = rows[-1][3:] + rows[0][:3]
    grams = fitted(torch.tensor(rows), order=order)
    told = losses(grams, torch.tensor([text]))[0]
    np.testing.assert_allclose(told, by_hand(rows, text, order), rtol=1e-5)


@given(texts, st.integers(1, 4), st.integers(1, 60))
def test_the_probabilities_of_all_next_tokens_sum_to_one_however_few_are_kept(
    rows: list[list[int]], order: int, max_grams: int
) -> None:
    grams = fitted(torch.tensor(rows), order=order, max_grams=max_grams)
    before = torch.tensor(rows[0][:5]).expand(V, 5)
    told = losses(grams, torch.cat([before, torch.arange(V)[:, None]], 1))
    assert np.exp(-told[:, -1]).sum() == pytest.approx(1, abs=1e-5)


@given(texts, st.integers(0, 12))
def test_a_token_is_judged_by_those_before_it_alone(rows: list[list[int]], length: int) -> None:
    ids = torch.tensor(rows)
    grams = fitted(ids)
    whole = losses(grams, ids)
    ends = torch.full((len(rows),), 12)
    ends[0] = length
    other = torch.randint(V, ids.shape)
    other[0, :length] = ids[0, :length]
    cut = losses(grams, other, ends)
    assert (cut[0, :length] == whole[0, :length]).all() and (cut[0, length:] == 0).all()
    assert (losses(grams, ids[:1])[0] == whole[0]).all()


def test_the_order_in_which_text_comes_does_not_matter() -> None:
    ids = torch.randint(V, (30, 12))
    together, apart = fitted(ids), TokenGrams(V, order=3, max_grams=1000)
    for rows in ids.flip(0).split(7):
        apart.observe(rows)
    apart.seal()
    assert (losses(together, ids) == losses(apart, ids)).all()


def test_only_tokens_that_count_are_counted() -> None:
    ids = torch.randint(V, (5, 12))
    lengths = torch.tensor([12, 0, 3, 1, 12])
    ours = TokenGrams(V, order=3)
    ours.observe(ids, lengths)
    theirs = TokenGrams(V, order=3)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        theirs.observe(row[None, :length])
    ours.seal(), theirs.seal()
    assert (losses(ours, ids) == losses(theirs, ids)).all()


def test_memory_is_limited_and_what_is_frequent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_grams, "_UNCUT", 2000)
    generator = torch.Generator().manual_seed(0)
    grams = TokenGrams(5000, order=3, max_grams=50)
    for _ in range(40):
        rows = torch.randint(100, 5000, (10, 20), generator=generator)
        rows[:, 5:9] = torch.tensor([1, 2, 3, 4])
        grams.observe(rows)
        state = grams.state_dict()
        assert len(state["keys"]) <= 4 * 50 + 2000
    grams.seal()
    assert len(grams.state_dict()["keys"]) <= 50 and grams.num_bytes <= 50 * 16
    told = losses(grams, torch.tensor([[77, 1, 2, 3, 4]]))[0]
    assert told[2:].max() < 0.1 < told[1]


@given(texts, st.booleans(), st.integers(1, 3))
def test_a_restored_one_goes_on_to_the_bit(rows: list[list[int]], sealed: bool, cut: int) -> None:
    ids = torch.tensor(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_grams, "_UNCUT", 60)  # so that the rarest go while it counts
        ours = TokenGrams(V, order=3, max_grams=8)
        ours.observe(ids[:cut])
        if sealed:
            ours.seal()
        theirs = TokenGrams(V, order=3, max_grams=8)
        theirs.load_state_dict(ours.state_dict())
        for grams in (ours, theirs):
            if not sealed:
                for row in ids:
                    grams.observe(row[None])
            grams.seal()
    assert (losses(ours, ids) == losses(theirs, ids)).all()
    for name, value in ours.state_dict().items():
        other = theirs.state_dict()[name]
        assert value.equal(other) if isinstance(value, Tensor) else value == other


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"order": 0}, {"max_grams": 0}):
        with pytest.raises(ConfigError, match="expected at least 1"):
            TokenGrams(V, **settings)
    grams = TokenGrams(V)
    with pytest.raises(ConfigError, match="seal\\(\\) them first"):
        losses(grams, torch.ones(1, 3))
    with pytest.raises(ConfigError, match=r"observe\(\) some text"):
        grams.seal()
    grams.observe(torch.ones(1, 3))
    grams.seal()
    with pytest.raises(ConfigError, match="another Part"):
        grams.observe(torch.ones(1, 3))
