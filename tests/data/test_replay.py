from __future__ import annotations

import json

import pytest
import torch

from cambia.data import Batch, ReplayBuffer
from cambia.errors import ConfigError, DataError


def rows(*numbers, length=4):
    ids = torch.tensor(numbers)[:, None].expand(-1, length).contiguous()
    return Batch(ids, ids + 1, num_bytes=length * len(numbers))


def held(buffer):
    return sorted(buffer.state_dict()["input_ids"][:, 0].tolist())


def test_it_keeps_everything_while_there_is_room():
    buffer = ReplayBuffer(10, seed=0)
    buffer.add(rows(1, 2, 3), tag=0)
    assert (len(buffer), held(buffer)) == (3, [1, 2, 3])


def test_every_row_stays_with_the_same_chance():
    counts = torch.zeros(40)
    for seed in range(300):
        buffer = ReplayBuffer(10, seed=seed)
        for number in range(0, 40, 4):
            buffer.add(rows(*range(number, number + 4)), tag=0)
        assert len(buffer) == 10
        counts[held(buffer)] += 1
    # Each count is binomial with mean 75 and standard deviation 7.5.
    assert counts.min() > 45 and counts.max() < 105


def test_a_sample_leaves_out_a_tag_and_repeats_rows_only_when_it_must():
    buffer = ReplayBuffer(10, seed=0)
    assert buffer.sample(2) is None
    buffer.add(rows(1, 2, 3), tag=0)
    buffer.add(rows(7, 8), tag=1)
    assert buffer.sample(2, exclude_tag=0).input_ids[:, 0].sort().values.tolist() == [7, 8]
    assert set(buffer.sample(3, exclude_tag=1).input_ids[:, 0].tolist()) == {1, 2, 3}
    many = buffer.sample(20, exclude_tag=1)
    assert many.input_ids.shape == (20, 4) and many.input_ids.dtype == torch.int64
    assert torch.equal(many.targets, many.input_ids + 1)
    assert many.num_bytes == 80
    assert buffer.sample(0) is None
    assert ReplayBuffer(3, 0).sample(1, exclude_tag=0) is None


def test_untrained_targets_and_bytes_survive():
    batch = rows(1, 2)
    batch.targets[0, :2] = -100
    batch = Batch(batch.input_ids, batch.targets, num_bytes=12)
    buffer = ReplayBuffer(5, seed=0)
    buffer.add(batch, tag=0)
    both = buffer.sample(2)
    assert (both.targets == -100).sum() == 2
    assert both.num_bytes == 12  # 4 bytes for the row with 2 targets, 8 for the one with 4


@pytest.mark.parametrize("stop", [0, 2, 9])
def test_resuming_is_bit_exact(stop):
    def drive(buffer, steps):
        found = []
        for step in steps:
            buffer.add(rows(*range(step * 5, step * 5 + 5)), tag=step % 3)
            old = buffer.sample(3, exclude_tag=step % 3)
            found.append(None if old is None else old.input_ids.tolist())
        return found

    whole = ReplayBuffer(12, seed=1)
    expected = drive(whole, range(20))
    first, second = ReplayBuffer(12, seed=1), ReplayBuffer(12, seed=99)
    assert drive(first, range(stop)) == expected[:stop]
    second.load_state_dict(first.state_dict())
    assert drive(second, range(stop, 20)) == expected[stop:]
    assert torch.equal(second.state_dict()["input_ids"], whole.state_dict()["input_ids"])


def test_the_state_is_tensors_and_plain_values():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add(rows(1, 2), tag=0)
    state = buffer.state_dict()
    plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    assert json.loads(json.dumps(plain)) == plain
    kept = state["input_ids"].clone()
    buffer.add(rows(*range(50)), tag=1)
    assert torch.equal(state["input_ids"], kept)


def test_misuse_is_refused():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add(rows(1), tag=0)
    with pytest.raises(DataError, match="rows of 4 tokens and was given rows of 5"):
        buffer.add(rows(1, length=5), tag=0)
    with pytest.raises(ConfigError, match="holds 4 rows, this one 5"):
        ReplayBuffer(5, seed=0).load_state_dict(buffer.state_dict())
    with pytest.raises(ConfigError, match="at least 1"):
        ReplayBuffer(0, seed=0)
