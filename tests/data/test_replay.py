from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import Batch, ReplayBuffer
from cambia.errors import ConfigError, DataError


def rows(*numbers, length=4):
    ids = torch.tensor(numbers)[:, None].expand(-1, length).contiguous()
    return Batch(ids, ids + 1, num_bytes=length * len(numbers))


def held(buffer):
    """The first token of every row that the buffer holds."""
    return sorted(buffer.sample(len(buffer)).input_ids[:, 0].tolist()) if len(buffer) else []


def shifted(tokens):
    """A batch as windows of text give it: targets are the inputs one place on."""
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), num_bytes=tokens[:, 1:].numel())


def texts(count, length=33, vocab_size=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return shifted(torch.randint(0, vocab_size, (count, length), generator=generator))


# ---- what stays ----------------------------------------------------------------------------------


def test_it_keeps_everything_while_there_is_room():
    buffer = ReplayBuffer(10, seed=0)
    buffer.add(rows(1, 2, 3), tag=0)
    assert (len(buffer), held(buffer)) == (3, [1, 2, 3])


@pytest.mark.parametrize("limit", [{"capacity": 10}, {"capacity": None, "budget_bytes": 300}])
def test_every_row_stays_with_the_same_chance(limit):
    counts = torch.zeros(40)
    kept = 0
    for seed in range(250):
        buffer = ReplayBuffer(**limit, seed=seed)
        for number in range(0, 40, 4):
            buffer.add(rows(*range(number, number + 4)), tag=number % 3)
        counts[held(buffer)] += 1
        kept += len(buffer)
    # Each count is binomial with a standard deviation below 7.
    expected = kept / 40
    assert 55 < expected < 80
    assert counts.min() > expected - 30 and counts.max() < expected + 30


def test_pairs_of_rows_stay_together_as_often_as_chance_has_it():
    together = np.zeros((12, 12))
    for seed in range(400):
        buffer = ReplayBuffer(4, seed=seed)
        for number in range(0, 12, 2):
            buffer.add(rows(number, number + 1), tag=0)
        stay = held(buffer)
        together[np.ix_(stay, stay)] += 1
    pairs = together[np.triu_indices(12, 1)]
    # 400 * 4/12 * 3/11 = 36.4, standard deviation 5.7.
    assert pairs.min() > 12 and pairs.max() < 61


def test_a_short_row_gets_no_second_chance():
    # Long rows fill the budget; a short one would fit beside them whatever its key, which would be unfair.
    long, short = texts(30, length=65), rows(7, length=64)
    stayed = 0
    for seed in range(100):
        buffer = ReplayBuffer(None, budget_bytes=1000, seed=seed)
        buffer.add(long, tag=0)
        buffer.add(short, tag=1)
        stayed += buffer.tags.get(1, 0)
    assert stayed < 55  # 11 or 12 of 31 rows fit, and about as many of 100 short ones stay


def test_drawing_does_not_change_what_is_kept():
    quiet, busy = ReplayBuffer(8, seed=3), ReplayBuffer(8, seed=3)
    for number in range(0, 60, 3):
        quiet.add(rows(number, number + 1, number + 2), tag=0)
        busy.add(rows(number, number + 1, number + 2), tag=0)
        busy.sample(5)
    assert held(quiet) == held(busy)


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(200, 3000),
    capacity=st.none() | st.integers(1, 30),
    quota=st.booleans(),
    logits=st.none() | st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8),
)
def test_no_limit_is_ever_exceeded(budget, capacity, quota, logits, sizes):
    buffer = ReplayBuffer(capacity, budget_bytes=budget, quota=quota, logits=logits, seed=0)
    buffer.check(sequence_length=8, vocab_size=300)
    for number, (count, tag) in enumerate(sizes):
        batch = texts(count, length=9, vocab_size=256 if number % 2 else 300, seed=number)
        said = None if logits is None else torch.randn(count, 8, 300)
        buffer.add(batch, tag, said)
        assert buffer.num_bytes <= budget
        assert capacity is None or len(buffer) <= capacity
        assert sum(buffer.tags.values()) == len(buffer) > 0


def test_a_quota_gives_each_tag_the_same_room():
    buffer = ReplayBuffer(30, seed=0, quota=True)
    for tag, count in enumerate([200, 4, 100, 40]):
        for first in range(0, count, 4):
            buffer.add(rows(*range(first, first + 4)), tag)
    assert buffer.tags[1] == 4  # all that it has
    assert sum(buffer.tags.values()) == 30
    assert max(buffer.tags.values()) - min(buffer.tags[tag] for tag in (0, 2, 3)) <= 1


def test_a_quota_of_bytes_shares_bytes():
    buffer = ReplayBuffer(None, budget_bytes=6000, seed=0, quota=True)
    for tag, vocab_size in enumerate([256, 60_000]):  # one byte a token, and two
        buffer.add(texts(200, vocab_size=vocab_size), tag)
    assert buffer.tags[0] * 54 == pytest.approx(buffer.tags[1] * 87, abs=100)  # with 20 bytes of notes
    assert buffer.num_bytes > 5900


def test_within_its_quota_a_tag_keeps_a_fair_sample():
    counts = torch.zeros(20)
    for seed in range(300):
        buffer = ReplayBuffer(8, seed=seed, quota=True)
        for first in range(0, 20, 4):
            buffer.add(rows(*range(first, first + 4)), tag=0)
        buffer.add(rows(*range(50, 70)), tag=1)
        counts[[number for number in held(buffer) if number < 50]] += 1
    # 300 * 4/20 = 60, standard deviation 6.9.
    assert counts.sum() == 1200 and counts.min() > 32 and counts.max() < 88


def test_without_a_quota_long_tasks_weigh_more():
    buffer = ReplayBuffer(100, seed=0)
    buffer.add(rows(*range(900)), tag=0)
    buffer.add(rows(*range(100)), tag=1)
    assert 2 <= buffer.tags[1] <= 22


def test_clearing_forgets_rows_and_their_shape():
    buffer = ReplayBuffer(3, seed=0)
    buffer.add(rows(*range(20)), tag=0)
    buffer.clear()
    assert (len(buffer), buffer.num_bytes, buffer.tags, buffer.sample(1)) == (0, 0, {}, None)
    buffer.add(rows(1, 2, 3, length=9), tag=1)
    assert held(buffer) == [1, 2, 3]


# ---- what comes back -----------------------------------------------------------------------------


def test_a_sample_leaves_out_a_tag_and_repeats_rows_only_when_it_must():
    buffer = ReplayBuffer(10, seed=0)
    assert buffer.sample(2) is None and not buffer.holds_other_than(None)
    buffer.add(rows(1, 2, 3), tag=0)
    assert buffer.holds_other_than(None) and not buffer.holds_other_than(0)
    buffer.add(rows(7, 8), tag=1)
    assert buffer.holds_other_than(0)
    assert buffer.sample(2, exclude_tag=0).input_ids[:, 0].sort().values.tolist() == [7, 8]
    assert set(buffer.sample(3, exclude_tag=1).input_ids[:, 0].tolist()) == {1, 2, 3}
    assert set(buffer.sample(9, only_tag=1).input_ids[:, 0].tolist()) == {7, 8}
    many = buffer.sample(20, exclude_tag=1)
    assert many.input_ids.shape == (20, 4) and many.input_ids.dtype == torch.int64
    assert torch.equal(many.targets, many.input_ids + 1)
    assert many.num_bytes == 80
    assert buffer.sample(0) is None and buffer.sample(1, only_tag=5) is None
    assert ReplayBuffer(3, seed=0).sample(1, exclude_tag=0) is None


def test_every_row_is_drawn_as_often():
    buffer = ReplayBuffer(12, seed=0)
    buffer.add(rows(*range(5)), tag=0)
    buffer.add(rows(*range(5, 12)), tag=2)
    counts = torch.zeros(12)
    for _ in range(600):
        counts[buffer.sample(2).input_ids[:, 0]] += 1
    assert counts.min() > 65 and counts.max() < 135  # 100, standard deviation 9


def test_a_draw_names_the_tags_of_its_rows():
    buffer = ReplayBuffer(10, seed=0)
    buffer.add(rows(1, 2, 3), tag=0)
    buffer.add(rows(7, 8), tag=5)
    drawn = buffer.draw(4)
    assert drawn.logits is None
    assert torch.equal(drawn.tags == 5, drawn.batch.input_ids[:, 0] >= 7)


@settings(max_examples=80, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 256, 257, 50_257, 65_536, 151_936]),
    length=st.integers(1, 40),
    form=st.sampled_from(["shifted", "masked", "other"]),
    seed=st.integers(0, 1000),
)
def test_tokens_come_back_exactly(vocab_size, length, form, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (3, length + 1), generator=generator)
    tokens[1] = vocab_size - 1  # the widest ids, and a row that deflates
    batch = shifted(tokens)
    if form == "other":
        batch = Batch(batch.input_ids, batch.targets.flip(1), batch.num_bytes)
    if form == "masked":
        batch.targets[torch.rand(batch.targets.shape, generator=generator) < 0.4] = -100
    buffer = ReplayBuffer(3, seed=0)
    buffer.add(batch, tag=0)
    back = buffer.sample(3)
    given_rows = sorted(torch.cat([batch.input_ids, batch.targets], dim=1).tolist())
    assert sorted(torch.cat([back.input_ids, back.targets], dim=1).tolist()) == given_rows


def test_rows_take_little_room():
    buffer = ReplayBuffer(50, seed=0)
    buffer.add(texts(50, length=129), tag=0)
    assert buffer.num_bytes == 50 * (20 + 1 + 129)  # a byte a token, inputs and targets together
    buffer = ReplayBuffer(50, seed=0)
    buffer.add(rows(*range(50), length=128), tag=0)
    assert buffer.num_bytes < 50 * 60  # deflated


def test_untrained_targets_and_bytes_survive():
    batch = rows(1, 2)
    batch.targets[0, :2] = -100
    batch = Batch(batch.input_ids, batch.targets, num_bytes=12)
    buffer = ReplayBuffer(5, seed=0)
    buffer.add(batch, tag=0)
    both = buffer.sample(2)
    assert (both.targets == -100).sum() == 2
    assert both.num_bytes == 12  # 4 bytes for the row with 2 targets, 8 for the one with 4


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [200, 300, 70_000])  # ids of one, two and four bytes
def test_the_largest_logits_come_back_within_float16(vocab_size):
    batch = texts(6, length=6, vocab_size=200)
    logits = 8 * torch.randn(6, 5, vocab_size, generator=torch.Generator().manual_seed(0))
    buffer = ReplayBuffer(6, seed=0, logits=4)
    buffer.add(batch, 0, logits)
    drawn = buffer.draw(6)
    assert drawn.logits.values.shape == drawn.logits.ids.shape == (6, 5, 4)
    assert (drawn.logits.values.dtype, drawn.logits.ids.dtype) == (torch.float32, torch.int64)
    for ids, values, which in zip(drawn.batch.input_ids, drawn.logits.values, drawn.logits.ids, strict=True):
        own = logits[(batch.input_ids == ids).all(dim=1)][0]
        assert torch.equal(which.sort().values, own.topk(4).indices.sort().values)
        assert torch.allclose(values, own.gather(1, which), rtol=2**-10, atol=0)


def test_a_small_vocabulary_is_kept_whole_and_in_order():
    buffer = ReplayBuffer(1, seed=0, logits=16)
    logits = torch.randn(1, 4, 9).to(torch.bfloat16)
    buffer.add(rows(3), 0, logits)
    found = buffer.draw(1).logits
    assert found.ids is None
    assert torch.equal(found.values, logits.to(torch.float16).float())


def test_logits_need_computing_only_for_rows_that_stay():
    buffer = ReplayBuffer(4, seed=0, logits=2)
    asked = 0
    for number in range(50):
        offer = buffer.offer(texts(4, length=5, seed=number), tag=0)
        if offer is not None:
            asked += len(offer.input_ids)
            # A teacher that says each input itself, so that rows and logits cannot be mixed up.
            buffer.keep(offer, torch.nn.functional.one_hot(offer.input_ids, 300).float())
    assert asked < 40  # of 200
    drawn = buffer.draw(4)
    assert torch.equal(drawn.logits.ids[:, :, 0], drawn.batch.input_ids)


def test_a_vocabulary_may_grow_while_ids_have_room():
    buffer = ReplayBuffer(10, seed=0, logits=2)
    buffer.add(rows(1), 0, torch.randn(1, 4, 1000))
    buffer.add(rows(2), 0, torch.randn(1, 4, 1003))
    with pytest.raises(DataError, match=r"clear\(\) it"):
        buffer.add(rows(3), 0, torch.randn(1, 4, 70_000))


# ---- going on ------------------------------------------------------------------------------------

KINDS = {
    "rows": {"capacity": 12},
    "bytes": {"capacity": None, "budget_bytes": 700},
    "quota": {"capacity": 12, "quota": True},
    "logits": {"capacity": None, "budget_bytes": 1500, "logits": 3},
}


def drive(buffer, steps):
    found = []
    for step in steps:
        tag = step % 3
        said = None if buffer.logits is None else torch.randn(5, 32, 99, generator=seeded(step))
        sizes = [256, 2, 60_000, 9]  # rows of many lengths, deflated or not
        buffer.add(texts(5, vocab_size=sizes[step % 4], seed=step), tag, said)
        old = buffer.draw(3, exclude_tag=tag)
        found.append(
            old
            and (old.batch.input_ids.tolist(), old.tags.tolist(), old.logits and old.logits.values.tolist())
        )
    return found


def seeded(number):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 2, 9])
def test_resuming_is_bit_exact(kind, stop):
    whole = ReplayBuffer(**KINDS[kind], seed=1)
    expected = drive(whole, range(20))
    first, second = ReplayBuffer(**KINDS[kind], seed=1), ReplayBuffer(**KINDS[kind], seed=99)
    assert drive(first, range(stop)) == expected[:stop]
    second.load_state_dict(first.state_dict())
    assert (second.num_bytes, second.tags) == (first.num_bytes, first.tags)
    assert drive(second, range(stop, 20)) == expected[stop:]
    mine, its = second.state_dict(), whole.state_dict()
    for name, value in its.items():
        same = torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value
        assert same, name


def test_a_resumed_buffer_still_refuses_what_it_refused():
    buffer = ReplayBuffer(None, budget_bytes=1000, seed=0)
    buffer.add(texts(300, length=65), tag=0)  # 86 bytes each; 54 are left over, enough for a deflated row
    resumed = ReplayBuffer(None, budget_bytes=1000, seed=5)
    resumed.load_state_dict(buffer.state_dict())
    for number in range(3):
        buffer.add(rows(number, length=64), tag=1)
        resumed.add(rows(number, length=64), tag=1)
        assert resumed.tags == buffer.tags


def test_the_state_is_tensors_and_plain_values():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add(rows(*range(30)), tag=0)
    state = buffer.state_dict()
    plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    assert json.loads(json.dumps(plain)) == plain
    kept = state["packed"].clone()
    buffer.add(rows(*range(50)), tag=1)
    assert torch.equal(state["packed"], kept)
    size = sum(value.numel() * value.element_size() for value in state.values() if torch.is_tensor(value))
    restored = ReplayBuffer(4, seed=5)
    restored.load_state_dict(state)
    assert size == restored.num_bytes


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"capacity": 0}, "capacity is 0; expected at least 1"),
        ({"budget_bytes": 0}, "budget_bytes is 0"),
        ({"logits": 0}, "logits is 0"),
        ({"capacity": None}, "needs a limit"),
    ],
)
def test_impossible_limits_are_refused(limits, problem):
    with pytest.raises(ConfigError, match=problem):
        ReplayBuffer(**limits, seed=0)


@pytest.mark.parametrize(
    ("logits", "vocab_size", "size"),
    [
        (None, 256, 20 + 1 + 2 * 2 * 32),
        (None, 50_257, 20 + 1 + 2 * 2 * 32),
        (16, 50_257, 20 + 1 + 2 * 2 * 32 + 32 * 16 * 4),
        (16, 10, 20 + 1 + 2 * 32 + 32 * 10 * 2),
    ],
)
def test_a_budget_below_one_row_is_refused_before_training(logits, vocab_size, size):
    ReplayBuffer(None, budget_bytes=size, logits=logits, seed=0).check(32, vocab_size)
    small = ReplayBuffer(None, budget_bytes=size - 1, logits=logits, seed=0)
    with pytest.raises(ConfigError, match=f"can take {size} bytes"):
        small.check(32, vocab_size)


@settings(max_examples=30, deadline=None)
@given(vocab_size=st.sampled_from([255, 256, 65_536]), logits=st.none() | st.integers(1, 300))
def test_no_row_takes_more_than_the_check_says(vocab_size, logits):
    batch = texts(4, length=9, vocab_size=vocab_size)
    batch.targets[:] = batch.targets.flip(1)
    batch.targets[:, 3] = -100
    batch.targets[:, 4] = vocab_size - 1
    with pytest.raises(ConfigError) as refused:
        ReplayBuffer(None, budget_bytes=1, logits=logits, seed=0).check(8, vocab_size)
    size = int(re.search(r"can take (\d+) bytes", str(refused.value))[1])
    buffer = ReplayBuffer(None, budget_bytes=size, logits=logits, seed=0)
    buffer.add(batch, 0, None if logits is None else torch.randn(4, 8, vocab_size))
    assert len(buffer) == 1


def test_a_row_larger_than_the_budget_throws_nothing_else_out():
    buffer = ReplayBuffer(None, budget_bytes=80, seed=0)
    buffer.add(rows(1, length=64), tag=0)  # short once it is deflated
    with pytest.raises(ConfigError, match="budget_bytes is 80, and one row of 64 tokens can take"):
        buffer.add(texts(1, length=65), tag=0)
    assert held(buffer) == [1]


def test_misuse_is_refused():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add(rows(1), tag=0)
    with pytest.raises(DataError, match="rows of 4 tokens and was given rows of 5"):
        buffer.add(rows(1, length=5), tag=0)
    with pytest.raises(DataError, match="set logits="):
        buffer.add(rows(1), 0, torch.randn(1, 4, 9))
    with pytest.raises(DataError, match="rows without"):
        ReplayBuffer(4, seed=0, logits=3).add(rows(1), 0)


@pytest.mark.parametrize(
    ("name", "value"), [("capacity", 5), ("budget_bytes", 9000), ("quota", True), ("logits", 3)]
)
def test_a_state_of_other_limits_is_refused(name, value):
    saved = ReplayBuffer(4, seed=0).state_dict()
    with pytest.raises(ConfigError, match=f"has {name} (4|None|False), this one {value}: resume"):
        ReplayBuffer(**{"capacity": 4, name: value}, seed=0).load_state_dict(saved)
