from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cambia.data import PreparedCorpus, Stream, Task, TokenFile
from cambia.errors import ConfigError, DataError


def task(name, token, length=400):
    """A task whose text is one token over and over, so that a row shows where it comes from."""
    tokens = np.full(length, token, dtype=np.uint16)
    file = TokenFile(tokens, np.array([1]), np.array([length - 2]))
    return Task(name, PreparedCorpus(Path(name), {"train": file}, {}))


def stream(fraction=0.25, batch_size=8, capacity=64, tasks=3):
    found = [task(name, token) for token, name in enumerate("abc"[:tasks])]
    return Stream(
        found,
        batch_size=batch_size,
        sequence_length=10,
        seed=0,
        replay_fraction=fraction,
        replay_capacity=capacity,
    )


def test_the_first_task_replays_nothing():
    first = stream()
    for _ in range(20):
        batch = first.next_batch(0)
        assert (batch.input_ids == 0).all() and batch.source == "a"


@pytest.mark.parametrize(
    ("fraction", "batch_size"), [(0.25, 8), (0.1, 8), (0.1, 1), (1 / 3, 7), (0.9, 2), (0.05, 3)]
)
def test_the_fraction_is_met_exactly_on_average(fraction, batch_size):
    one = stream(fraction, batch_size, capacity=4000)
    for _ in range(5):
        one.next_batch(0)
    replayed = 0
    for count in range(1, 241):
        batch = one.next_batch(1)
        assert batch.input_ids.shape == (batch_size, 10)
        old = (batch.input_ids[:, 0] == 0).sum().item()
        assert (batch.input_ids[batch_size - old :, 0] == 0).all(), "replayed rows come last"
        replayed += old
        assert abs(replayed - fraction * batch_size * count) <= 1 + 1e-6 * count


def test_replay_draws_from_every_other_task_and_never_from_the_present_one():
    one = stream(0.5)
    for index in (0, 1):
        for _ in range(6):
            one.next_batch(index)
    seen = torch.cat([one.next_batch(2).input_ids[4:, 0] for _ in range(20)])
    assert set(seen.tolist()) == {0, 1}


def test_without_replay_nothing_is_kept():
    one = stream(0.0)
    for index in (0, 1):
        for _ in range(5):
            assert (one.next_batch(index).input_ids == index).all()
    assert len(one.buffer) == 0


@pytest.mark.parametrize("stop", [0, 4, 11, 17])
def test_resuming_is_bit_exact(stop):
    plan = [0] * 7 + [1] * 7 + [2] * 7 + [0] * 4
    whole = stream(0.3)
    expected = [whole.next_batch(index) for index in plan]
    first, second = stream(0.3), stream(0.3)
    for index in plan[:stop]:
        first.next_batch(index)
    second.load_state_dict(first.state_dict())
    for index, batch in zip(plan[stop:], expected[stop:], strict=True):
        resumed = second.next_batch(index)
        assert torch.equal(resumed.input_ids, batch.input_ids)
        assert torch.equal(resumed.targets, batch.targets)
        assert (resumed.num_bytes, resumed.source) == (batch.num_bytes, batch.source)


def test_misuse_is_refused():
    settings = {"batch_size": 2, "sequence_length": 10, "seed": 0}
    with pytest.raises(ConfigError, match="below 1"):
        stream(1.0)
    with pytest.raises(ConfigError, match="its own name"):
        Stream([task("a", 0), task("a", 1)], **settings)
    with pytest.raises(DataError, match="'tiny' is 5 tokens long"):
        Stream([task("tiny", 0, length=5)], **settings)
    with pytest.raises(ConfigError, match="the saved stream has the tasks"):
        stream(tasks=2).load_state_dict(stream(tasks=3).state_dict())
