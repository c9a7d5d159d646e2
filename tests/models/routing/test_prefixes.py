"""Prefixes: what stands behind a row's end is nobody's business, and no question is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from cambia.errors import ConfigError
from cambia.models.routing import prefixes as module
from cambia.models.routing.prefixes import Prefixes, PrefixReader


class Asked:
    """Answers at once, and remembers for which rows it was asked."""

    def __init__(self) -> None:
        self.losses: list[tuple[str | None, list[int]]] = []
        self.features = 0

    def losses_of(self, name: str | None, ids: Tensor, mask: Tensor) -> Tensor:
        self.losses.append((name, ids[:, 0].tolist()))
        return ids.sum(1).double() + len(name or "")

    def features_of(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.features += 1
        return (ids * mask).float()

    def about(self, ids: Tensor, lengths: Tensor | None = None) -> Prefixes:
        return Prefixes(ids, lengths, features_of=self.features_of, losses_of=self.losses_of)


def test_each_answer_is_computed_once_and_for_the_rows_that_are_asked_for() -> None:
    asked = Asked()
    prefixes = asked.about(torch.tensor([[1, 5], [2, 5], [3, 5]]))
    assert prefixes.losses("ab", torch.tensor([2, 0])).tolist() == [10, 8]
    assert prefixes.losses("ab").tolist() == [8, 9, 10]
    assert prefixes.losses("ab", torch.tensor([1])).tolist() == [9]
    assert prefixes.losses(None).tolist() == [6, 7, 8]
    assert asked.losses == [("ab", [3, 1]), ("ab", [2]), (None, [1, 2, 3])]
    assert prefixes.features() is prefixes.features() and asked.features == 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 7))
def test_what_stands_behind_a_rows_end_is_overwritten(lengths: list[int], first: int) -> None:
    ends = torch.tensor(lengths)
    ids, other = torch.randint(1, 9, (len(lengths), 6)), torch.randint(1, 9, (len(lengths), 6))
    inside = torch.arange(6) < ends[:, None]
    ours, theirs = (Asked().about(x, ends).first(first) for x in (ids, torch.where(inside, ids, other)))
    assert ours.input_ids.equal(theirs.input_ids) and ours.mask.equal(theirs.mask)
    assert ours.lengths.tolist() == [min(length, first) for length in lengths]
    assert ours.input_ids.equal((ids * inside)[:, :first])


def test_lengths_that_do_not_fit_are_refused() -> None:
    for lengths in ([3, 1], [-1, 1], [1]):
        with pytest.raises(ConfigError, match="expected 2 numbers from 0 to 2"):
            Prefixes(torch.ones(2, 2), torch.tensor(lengths))


def test_prefixes_without_answers_say_so() -> None:
    bare = Prefixes(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="features_of="):
        bare.features()
    with pytest.raises(ConfigError, match="losses_of="):
        bare.losses(None)


# ---- asked of a model ----------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny("llama").train()


def reader(model: PreTrainedModel, layer: int = -1) -> PrefixReader:
    """One in which a Part "loud" doubles what the head says."""

    @contextmanager
    def using(name: str | None) -> Generator[None]:
        weight = model.get_output_embeddings().weight
        assert isinstance(weight, torch.nn.Parameter)
        plain = weight.data
        weight.data = 2 * plain if name else plain
        yield
        weight.data = plain

    return PrefixReader(model, using, layer)


def test_losses_and_features_are_those_of_each_row_alone(model: PreTrainedModel) -> None:
    ids, lengths = torch.randint(31, (4, 9)), torch.tensor([9, 4, 1, 0])
    prefixes = reader(model, layer=1).read(ids, lengths)
    model.eval()
    for row, length in enumerate(lengths.tolist()):
        alone = ids[row : row + 1, :length]
        if length > 1:
            with torch.no_grad():
                out = model(alone, labels=alone, output_hidden_states=True)
            assert prefixes.losses(None)[row].item() == pytest.approx(out.loss.item(), rel=1e-5)
            torch.testing.assert_close(prefixes.features()[row], out.hidden_states[1][0].mean(0))
            assert prefixes.losses("loud")[row] != prefixes.losses(None)[row]
        else:
            assert prefixes.losses(None)[row] == 0
    assert prefixes.features()[3].eq(0).all()
    assert prefixes.losses(None).dtype == torch.float64 and prefixes.features().dtype == torch.float32


def test_nothing_behind_a_rows_end_and_no_other_row_changes_a_bit(model: PreTrainedModel) -> None:
    ids, lengths = torch.randint(31, (3, 8)), torch.tensor([5, 8, 3])
    other = ids.clone()
    other[0, 5:] += 1
    other[1] = 7
    ours, theirs = (reader(model).read(x, lengths) for x in (ids, other))
    same = torch.tensor([0, 2])
    assert ours.features()[same].equal(theirs.features()[same])
    assert ours.losses("loud")[same].equal(theirs.losses("loud")[same])
    assert not ours.losses("loud")[1].equal(theirs.losses("loud")[1])


def test_a_large_vocabulary_is_read_a_few_rows_at_a_time(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(31, (5, 8))
    whole = reader(model).read(ids).losses(None)
    seen = []
    monkeypatch.setattr(module, "_MOST_HELD", 2 * 8 * 31)
    model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    torch.testing.assert_close(reader(model).read(ids).losses(None), whole)
    assert seen == [2, 2, 1]


def test_a_model_is_left_in_its_mode_and_one_token_has_no_loss(model: PreTrainedModel) -> None:
    prefixes = reader(model).read(torch.tensor([[3], [4]]))
    assert prefixes.losses(None).tolist() == [0, 0]
    prefixes.features()
    assert model.training
