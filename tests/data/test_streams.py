from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.data import PreparedCorpus, Stage, Stream, Task, TokenFile, TrainBatches
from cambia.data.loaders import LoaderStream
from cambia.errors import ConfigError, DataError

SETTINGS = {"batch_size": 8, "sequence_length": 10, "seed": 0}


def task(name, token, length=400):
    """A task whose text is one token over and over, so that a row shows where it comes from."""
    tokens = np.full(length, token, dtype=np.uint16)
    file = TokenFile(tokens, np.array([1]), np.array([length - 2]))
    return Task(name, PreparedCorpus(Path(name), {"train": file, "valid": file}, {}))


def numbered(name, length=400, vocab=1000, **more):
    """A task whose tokens are their own positions."""
    file = TokenFile(np.arange(length, dtype=np.uint16), np.array([1]), np.array([length - 2]))
    splits = {"train": file, "valid": file}
    return Task(name, PreparedCorpus(Path(name), splits, {"vocab_size": vocab}), **more)


def stream(stages=None, tasks=3, **settings):
    found = [task(name, token) for token, name in enumerate("abcdefgh"[:tasks])]
    return Stream(found, stages, **{**SETTINGS, **settings})


def rows_of(batch, tasks=3):
    """How many rows each task gave."""
    return np.bincount(batch.input_ids[:, 0].numpy(), minlength=tasks)


def equal(left, right):
    same = torch.equal(left.input_ids, right.input_ids) and torch.equal(left.targets, right.targets)
    return same and (left.num_bytes, left.source) == (right.num_bytes, right.source)


# ---- one task ------------------------------------------------------------------------------------


def test_without_stages_each_task_comes_once_in_order():
    one = stream()
    assert [stage.name for stage in one.stages] == one.names == ["a", "b", "c"]
    for index in range(3):
        batch = one.next_batch(index)
        assert (batch.input_ids == index).all() and batch.source == "abc"[index]
    assert one.lengths == [400, 400, 400] and one.tokens_per_batch == 80


def test_a_stage_of_one_task_gives_what_the_tasks_own_batches_give():
    one = Stream([numbered("a"), numbered("b", 300)], **SETTINGS)
    alone = TrainBatches(one.tasks[1].file("train"), source="b", **{**SETTINGS, "seed": 1})
    for _ in range(20):
        assert equal(one.next_batch(1), next(alone))


def test_the_rows_of_a_seed_never_change():
    batch = Stream([numbered("a")], **SETTINGS).next_batch(0)
    assert batch.input_ids[:, 0].tolist() == [118, 278, 48, 248, 238, 28, 38, 348]
    assert batch.num_bytes == 80


def test_a_task_that_comes_again_is_read_on():
    names = ["a", "b"]
    stages = [Stage.only(names, index) for index in (0, 1, 0)]
    one = Stream([numbered("a"), numbered("b")], stages, **SETTINGS)
    alone = TrainBatches(one.tasks[0].file("train"), source="a", **SETTINGS)
    for stage in (0, 2):
        for _ in range(3):
            assert equal(one.next_batch(stage), next(alone))


# ---- mixtures ------------------------------------------------------------------------------------

weights = st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(any)


@given(weights=weights, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_a_mixture_keeps_its_shares(weights, sizes):
    shares = np.array(weights) / sum(weights)
    count = len(weights)
    one = stream([Stage.of("abcde"[:count], shares.tolist())], tasks=count)
    given, total = np.zeros(count), 0
    for rows in sizes:
        batch = one.next_batch(0, rows=rows)
        assert batch.input_ids.shape == batch.targets.shape == (rows, 10)
        given += rows_of(batch, count)
        total += rows
        assert (given[shares == 0] == 0).all(), "what has no weight gives nothing"
        assert (np.abs(given - shares * total) <= max(1, np.count_nonzero(shares) - 1) + 1e-6).all()


def test_equal_shares_take_turns_to_the_row():
    one = stream([Stage.of("abc", [1 / 3] * 3)])
    total = sum(rows_of(one.next_batch(0)) for _ in range(3000))
    assert total.tolist() == [8000, 8000, 8000]


def test_a_mixture_counts_all_its_bytes_and_bears_its_name():
    batch = stream([Stage.of("abc", [0.5, 0, 0.5])]).next_batch(0)
    assert (batch.source, batch.num_bytes) == ("a+c", 80)


def test_what_a_mixture_owes_is_no_matter_of_other_stages():
    stages = [Stage.of("abc", [0.5, 0.5, 0]), Stage.only("abc", 0), Stage.of("abc", [0, 0.5, 0.5])]
    one = stream(stages, batch_size=3)
    assert rows_of(one.next_batch(0)).tolist() == [2, 1, 0]
    assert rows_of(one.next_batch(1)).tolist() == [3, 0, 0]
    assert rows_of(one.next_batch(2)).tolist() == [0, 2, 1]
    assert rows_of(one.next_batch(0)).tolist() == [1, 2, 0]


def test_weights_pass_over_to_those_at_the_end():
    stage = Stage("a", (1.0, 0.0), until=(0.0, 1.0), hold=0.5)
    assert [stage.weights_at(at) for at in (0, 0.5, 0.75, 1)] == [(1, 0), (1, 0), (0.5, 0.5), (0, 1)]
    assert stage.mean_weights() == (0.75, 0.25)
    assert Stage("a", (1.0, 0.0), until=(0.0, 1.0)).mean_weights() == (0.5, 0.5)
    one = stream([stage, Stage.only("ab", 1)], tasks=2)
    given = np.array([rows_of(one.next_batch(0, at=step / 200), 2)[1] for step in range(200)])
    assert given[:100].sum() == 0 and given[-1] == 8
    assert abs(given.sum() - sum(8 * stage.weights_at(step / 200)[1] for step in range(200))) <= 1
    for quarter in range(100, 200, 25):
        expected = sum(8 * stage.weights_at(step / 200)[1] for step in range(quarter, quarter + 25))
        assert abs(given[quarter : quarter + 25].sum() - expected) <= 2


def test_the_length_of_a_mixture_is_the_mean_of_its_tasks():
    names = ["a", "b"]
    stages = [
        Stage.of(names, [0.25, 0.75]),
        Stage.only(names, 1),
        Stage.of(names, [1, 0], [0, 1], hold=0.5),
    ]
    assert Stream([numbered("a", 400), numbered("b", 800)], stages, **SETTINGS).lengths == [700, 800, 500]


def test_batches_mixed_from_outside_owe_the_stages_nothing():
    stages = [Stage.of("abc", [0.5, 0.5, 0])]
    one, alone = stream(stages, batch_size=3), stream(stages, batch_size=3)
    total = np.zeros(3)
    for _ in range(9):
        mixed = one.mixed_batch([2, 2, 5], rows=4, source="joint")
        assert mixed.source == "joint"
        total += rows_of(mixed)
        assert rows_of(one.next_batch(0)).tolist() == rows_of(alone.next_batch(0)).tolist()
    assert total.tolist() == [8, 8, 20]


# ---- views of a corpus ---------------------------------------------------------------------------


def test_a_permuted_task_reads_other_ids_and_the_same_bytes():
    moved = np.arange(1000)
    moved[1:] = np.roll(moved[1:], 7)
    plain, other = numbered("a"), numbered("a", permutation=moved, special_ids=(0,))
    assert np.shares_memory(other.file("train").tokens, other.corpus.splits["train"].tokens)
    streams = [Stream([one], **SETTINGS) for one in (plain, other)]
    pairs = [tuple(one.next_batch(0) for one in streams) for _ in range(60)]
    pairs += zip(*(one.evaluation(0, "valid", 10_000, 4) for one in streams), strict=True)
    for here, there in pairs:
        assert (there.input_ids.numpy() == moved[here.input_ids.numpy()]).all()
        counted = here.targets != -100
        assert torch.equal(counted, there.targets != -100)
        assert (there.targets[counted].numpy() == moved[here.targets[counted].numpy()]).all()
        assert here.num_bytes == there.num_bytes


def test_rows_in_the_order_of_the_text():
    one = Stream([numbered("a", shuffle=False)], **SETTINGS)
    starts = torch.cat([one.next_batch(0).input_ids[:, 0] for _ in range(4)])
    assert (starts[1:] - starts[:-1] == 10).all()


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 4, 11, 17])
def test_resuming_is_bit_exact(stop):
    stages = [
        Stage.only("abc", 2),
        Stage.of("abc", [0.2, 0.3, 0.5]),
        Stage.of("abc", [0, 1, 0], [1, 0, 0]),
        Stage.only("abc", 2),
    ]
    plan = [(index, step / 6) for index in range(4) for step in range(6)]

    def fresh():
        return Stream([numbered(name) for name in "abc"], stages, **{**SETTINGS, "batch_size": 7})

    def go(one, stage, at):
        return [one.next_batch(stage, at=at), one.mixed_batch([1, 1, 2], rows=2)]

    whole, first, second = fresh(), fresh(), fresh()
    expected = [go(whole, *place) for place in plan]
    for place in plan[:stop]:
        go(first, *place)
    second.load_state_dict(first.state_dict())
    for place, batches in zip(plan[stop:], expected[stop:], strict=True):
        assert all(equal(*pair) for pair in zip(go(second, *place), batches, strict=True))


def test_a_saved_state_is_a_copy():
    one = stream([Stage.of("abc", [0.5, 0.3, 0.2])])
    state = one.state_dict()
    before = repr(state)
    one.next_batch(0)
    assert repr(state) == before
    one.load_state_dict(state)
    one.next_batch(0)
    assert repr(state) == before


def test_a_loader_is_a_stream_of_one_stage():
    one = LoaderStream([torch.zeros(2, 5, dtype=torch.int64)], name="mine")
    assert one.stages == [Stage("mine", (1.0,))] and one.boundaries
    assert one.next_batch(0, at=0.5, rows=1).input_ids.shape == (2, 4)


# ---- misuse --------------------------------------------------------------------------------------


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="its own name"):
        Stream([task("a", 0), task("a", 1)], **SETTINGS)
    with pytest.raises(ConfigError, match="at least one"):
        Stream([], **SETTINGS)
    with pytest.raises(ConfigError, match=r"has a '\+' in its name.*call it 'c__'"):
        Stream([task("c++", 0)], **SETTINGS)
    with pytest.raises(DataError, match="'tiny' is 5 tokens long"):
        Stream([task("tiny", 0, length=5)], **SETTINGS)
    with pytest.raises(ConfigError, match="no stages"):
        stream([])
    with pytest.raises(ConfigError, match="'a' has 2 weights for 3 tasks"):
        stream([Stage.only("ab", 0)])
    with pytest.raises(ConfigError, match="one for each of"):
        stream().mixed_batch([1, 1])
    with pytest.raises(ConfigError, match="one above"):
        stream().mixed_batch([0, 0, 0])
    with pytest.raises(ConfigError, match="the saved stream has the tasks"):
        stream(tasks=2).load_state_dict(stream(tasks=3).state_dict())
    with pytest.raises(ConfigError, match="the saved stream has the stages"):
        stream([Stage.only("abc", 1)]).load_state_dict(stream([Stage.only("abc", 0)]).state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": (0.5, 0.4)},
        {"weights": (1.5, -0.5)},
        {"weights": (0.5, 0.5), "until": (1.0,)},
        {"weights": (0.5, 0.5), "until": (1.0, 1.0)},
        {"weights": (1.0, 0.0), "until": (0.0, 1.0), "hold": 1.0},
    ],
)
def test_stages_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="stage 'x' has"):
        Stage("x", **wrong)


def test_permutations_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="does not hold each of its ids once"):
        numbered("a", permutation=np.array([0, 1, 1]))
    with pytest.raises(ConfigError, match="moves one of the special ids"):
        numbered("a", permutation=np.array([1, 0, 2]), special_ids=(2, 0))
    with pytest.raises(ConfigError, match="special ids"):
        numbered("a", permutation=np.array([1, 0]), special_ids=(5,))
