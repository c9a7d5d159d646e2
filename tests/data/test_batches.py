from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import BpeTokenizer, TokenFile, TrainBatches, build_tokenizer, evaluation_batches
from cambia.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat", "", "naïve Straße", "漢字 and more", "x", "the dog and the cat"]


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(BpeTokenizer(vocab_size=270), texts=lambda: TEXTS)


def numbered(length):
    """A file whose tokens are their own positions, so that a window shows where it was cut."""
    tokens = np.arange(length, dtype=np.uint32)
    return TokenFile(tokens, np.array([1]), np.array([length - 2]))


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    batch_size=st.integers(1, 4),
    length=st.integers(1, 12),
)
def test_evaluation_predicts_each_token_once_and_counts_all_bytes(
    byte_tokenizer, bpe, texts, batch_size, length
):
    for tokenizer in (byte_tokenizer, bpe):
        file = TokenFile.from_texts(texts, tokenizer)
        batches = [*evaluation_batches(file, batch_size=batch_size, sequence_length=length)]
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
        on = targets != -100
        assert targets[on].tolist() == file.tokens[1:].tolist()
        assert inputs[on].tolist() == file.tokens[:-1].tolist()
        assert (inputs[~on][1:] == tokenizer.eos_id).all()
        assert all(
            batch.input_ids.shape == batch.targets.shape == (len(batch.targets), length) for batch in batches
        )
        assert max(len(batch.targets) for batch in batches) <= batch_size
        assert (
            sum(batch.num_bytes for batch in batches) == file.num_bytes == sum(len(t.encode()) for t in texts)
        )


@given(
    text=st.text(min_size=1, max_size=60),
    batch_size=st.integers(1, 4),
    length=st.integers(2, 12),
    data=st.data(),
)
def test_with_context_each_later_token_is_scored_once_and_has_it(
    byte_tokenizer, text, batch_size, length, data
):
    file = TokenFile.from_texts([text], byte_tokenizer)
    context = data.draw(st.integers(1, min(length - 1, file.num_tokens - 2) or 1))
    if context >= min(length, file.num_tokens - 1):
        with pytest.raises((ConfigError, DataError), match="context of"):
            [*evaluation_batches(file, batch_size=batch_size, sequence_length=length, context=context)]
        return
    batches = [*evaluation_batches(file, batch_size=batch_size, sequence_length=length, context=context)]
    targets = torch.cat([batch.targets for batch in batches])
    on = targets != -100
    assert not on[:, :context].any()
    assert targets[on].tolist() == file.tokens[1 + context :].tolist()
    inputs = torch.cat([batch.input_ids for batch in batches])
    for row, scored in enumerate(on):
        first = int(scored.nonzero()[0])
        place = context + int(on[:row].sum())  # of that row's first scored input in the text
        assert first == context
        assert inputs[row, : first + 1].tolist() == file.tokens[place - context : place + 1].tolist()
    assert sum(batch.num_bytes for batch in batches) == int((targets[on] < 256).sum())


def test_bytes_of_a_window_are_exact_for_bytes(byte_tokenizer):
    file = TokenFile.from_texts(TEXTS, byte_tokenizer)
    for batch in evaluation_batches(file, batch_size=1, sequence_length=5):
        assert batch.num_bytes == int(((batch.targets >= 0) & (batch.targets < 256)).sum())


def test_masked_tokens_are_no_targets():
    file = numbered(9)
    mask = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1], dtype=np.uint8)
    masked = TokenFile(file.tokens, file.starts, file.document_bytes, mask)
    [batch] = evaluation_batches(masked, batch_size=2, sequence_length=4)
    assert batch.targets.tolist() == [[-100, -100, -100, 4], [5, 6, 7, 8]]


@settings(deadline=None, max_examples=60)
@given(length=st.integers(3, 200), width=st.integers(1, 20), seed=st.integers(0, 5))
def test_an_epoch_visits_windows_that_share_only_their_ends(length, width, seed):
    if length < width + 1:
        with pytest.raises(DataError, match="sequence_length"):
            TrainBatches(numbered(length), batch_size=1, sequence_length=width, seed=seed)
        return
    batches = TrainBatches(numbered(length), batch_size=1, sequence_length=width, seed=seed)
    for _ in range(2):
        windows = [next(batches) for _ in range(batches.windows_per_epoch)]
        starts = sorted(int(batch.input_ids[0, 0]) for batch in windows)
        assert all(b - a == width for a, b in itertools.pairwise(starts))
        assert starts[0] < width or len(starts) == 1
        for batch in windows:
            assert (batch.targets == batch.input_ids + 1).all()
            assert int(batch.targets.max()) < length
    assert batches.windows_per_epoch >= (length - width) // width


def test_epochs_differ_in_order_and_offset_and_seeds_too():
    batches = TrainBatches(numbered(4000), batch_size=1, sequence_length=32, seed=0)
    size = batches.windows_per_epoch
    orders = [[int(next(batches).input_ids[0, 0]) for _ in range(size)] for _ in range(3)]
    assert len({order[0] % 32 for order in orders}) > 1
    assert orders[0] != orders[1] != orders[2]
    again = TrainBatches(numbered(4000), batch_size=1, sequence_length=32, seed=0)
    assert [int(next(again).input_ids[0, 0]) for _ in range(size)] == orders[0]
    other = TrainBatches(numbered(4000), batch_size=1, sequence_length=32, seed=1)
    assert [int(next(other).input_ids[0, 0]) for _ in range(size)] != orders[0]


@pytest.mark.parametrize("masked", [False, True])
def test_unshuffled_windows_come_in_the_order_of_the_text(masked):
    file = masked_file([(3, 5)] * 20) if masked else numbered(400)
    batches = TrainBatches(file, batch_size=1, sequence_length=20, seed=0, shuffle=False)
    for _ in range(2):
        starts = [int(next(batches).input_ids[0, 0]) for _ in range(batches.windows_per_epoch)]
        assert starts == sorted(starts) and len(set(starts)) == len(starts) > 5


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 20])
def test_resuming_is_invisible_even_across_epochs(stop):
    def fresh():
        return TrainBatches(numbered(100), batch_size=3, sequence_length=10, seed=5)

    whole = fresh()
    expected = [next(whole) for _ in range(40)]
    first = fresh()
    for _ in range(stop):
        next(first)
    second = fresh()
    second.load_state_dict(first.state_dict())
    for batch in expected[stop:]:
        resumed = next(second)
        assert torch.equal(resumed.input_ids, batch.input_ids)
        assert resumed.num_bytes == batch.num_bytes


def test_batches_carry_their_shape_type_and_source():
    batches = TrainBatches(numbered(100), batch_size=4, sequence_length=8, seed=0, source="python")
    batch = next(iter(batches))
    assert batch.input_ids.shape == batch.targets.shape == (4, 8)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert (batch.source, batch.num_bytes) == ("python", 32)
    assert batches.next(rows=2).input_ids.shape == (2, 8)


def test_what_cannot_be_batched_is_refused(byte_tokenizer):
    with pytest.raises(DataError, match=r"too short for a window of 65.*--training\.sequence_length"):
        TrainBatches(numbered(20), batch_size=1, sequence_length=64, seed=0, source="notes")
    with pytest.raises(ConfigError, match="at least 1"):
        TrainBatches(numbered(20), batch_size=0, sequence_length=4, seed=0)
    with pytest.raises(DataError, match="no text to score"):
        TokenFile.from_texts([""], byte_tokenizer)
    empty = TokenFile(
        np.array([256], dtype=np.uint16), np.array([], dtype=np.int64), np.array([], dtype=np.int64)
    )
    with pytest.raises(DataError, match="no text to evaluate"):
        next(evaluation_batches(empty, batch_size=1, sequence_length=4))


def masked_file(documents):
    """Documents of (untrained, trained) lengths; tokens are their own positions, a trained one is a byte."""
    mask, starts, sizes = [1], [], []
    for head, tail in documents:
        starts.append(len(mask))
        sizes.append(tail)
        mask += [0] * head + [1] * (tail + 1)
    tokens = np.arange(len(mask), dtype=np.uint32)
    return TokenFile(tokens, np.array(starts), np.array(sizes), np.array(mask, dtype=np.uint8))


documents = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=80)
@given(documents=documents, batch_size=st.integers(1, 4), length=st.integers(2, 40))
def test_under_a_mask_each_answer_is_scored_once_with_all_before_it(documents, batch_size, length):
    file = masked_file(documents)
    batches = [*evaluation_batches(file, batch_size=batch_size, sequence_length=length)]
    rows = [row for batch in batches for row in zip(batch.input_ids, batch.targets, strict=True)]
    counted = [int(t) for _, targets in rows for t in targets[targets != -100]]
    assert counted == (np.flatnonzero(file.mask[1:]) + 1).tolist()
    assert sum(batch.num_bytes for batch in batches) == file.num_bytes == sum(tail for _, tail in documents)
    ends = [*(file.starts[1:] - 1), file.num_tokens - 1]
    for inputs, targets in rows:
        assert (targets != -100).any(), "no row is empty"
        for target in targets[targets != -100].tolist():
            document = int(np.searchsorted(file.starts, target, side="right")) - 1
            begin, end = int(file.starts[document]), int(ends[document])
            if end - begin + 1 <= length:  # then it is whole in this row
                assert {*range(begin - 1, end)} <= set(inputs.tolist())
            elif target == end:
                assert {*range(end - length, end)} <= set(inputs.tolist())


@settings(deadline=None, max_examples=40)
@given(documents=documents, length=st.integers(2, 40))
def test_training_rows_under_a_mask_are_those_of_evaluation(documents, length):
    file = masked_file(documents)
    batches = TrainBatches(file, batch_size=1, sequence_length=length, seed=3)
    expected = sorted(
        batch.targets.tolist() for batch in evaluation_batches(file, batch_size=1, sequence_length=length)
    )
    for _ in range(2):
        epoch = [next(batches) for _ in range(batches.windows_per_epoch)]
        assert sorted(batch.targets.tolist() for batch in epoch) == expected
        assert sum(batch.num_bytes for batch in epoch) == file.num_bytes
    assert batches.packed.cut == sum(head + tail + 1 > length for head, tail in documents)
    again = TrainBatches(file, batch_size=1, sequence_length=length, seed=3)
    again.load_state_dict(batches.state_dict())
    assert torch.equal(next(again).input_ids, next(batches).input_ids)


# ---- views ---------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), min_size=1, max_size=30),
    count=st.integers(1, 8),
    masked=st.booleans(),
)
def test_chunks_share_out_whole_documents(sizes, count, masked):
    file = masked_file(sizes) if masked else TokenFile(*_fields(masked_file(sizes)))
    if len(sizes) < count:
        with pytest.raises(DataError, match=f"cannot be shared out among {count}"):
            file.chunk(0, count)
        return
    chunks = [file.chunk(number, count) for number in range(count)]
    assert sum(chunk.num_documents for chunk in chunks) == file.num_documents
    assert sum(chunk.num_bytes for chunk in chunks) == file.num_bytes
    # Tokens are their own positions: chunks meet at the end-of-text token that both of them stand beside.
    assert chunks[0].tokens[0] == 0 and chunks[-1].tokens[-1] == file.num_tokens - 1
    for here, after in itertools.pairwise(chunks):
        assert here.tokens[-1] == after.tokens[0]
    begins = [int(chunk.tokens[start]) for chunk in chunks for start in chunk.starts]
    assert begins == file.starts.tolist()
    longest = max(tail for _, tail in sizes)
    for chunk in chunks:
        assert chunk.num_documents and np.shares_memory(chunk.tokens, file.tokens)
        assert chunk.starts[0] == 1
        if count < len(sizes) / 4:
            assert abs(chunk.num_bytes - file.num_bytes / count) <= 4 * longest
    ends = np.arange(1, file.num_tokens + 1)
    counted = [chunk.bytes_before(np.array([chunk.num_tokens]))[0] for chunk in chunks]
    assert sum(counted) == file.bytes_before(ends[-1:])[0]


def _fields(file):
    return file.tokens, file.starts, file.document_bytes


def test_chunks_are_about_equal():
    file = masked_file([(0, 10)] * 1000)
    assert [file.chunk(number, 7).num_documents for number in range(7)] == [143, 143, 143, 143, 143, 143, 142]


@given(documents=documents, batch_size=st.integers(1, 3), length=st.integers(2, 30), seed=st.integers(0, 9))
def test_a_permutation_changes_the_ids_alone(documents, batch_size, length, seed):
    file = masked_file(documents)
    permutation = np.append(0, 1 + np.random.default_rng(seed).permutation(file.num_tokens - 1))
    permuted = dataclasses.replace(file, permutation=permutation)
    assert permuted.eos_id == file.eos_id and permuted.num_bytes == file.num_bytes
    for view, other in ((file, permuted), (file.head(20), permuted.head(20))):
        pairs = [
            evaluation_batches(each, batch_size=batch_size, sequence_length=length) for each in (view, other)
        ]
        for plain, moved in zip(*pairs, strict=True):
            counted = plain.targets != -100
            assert torch.equal(moved.targets != -100, counted)
            assert (moved.targets[counted].numpy() == permutation[plain.targets[counted].numpy()]).all()
            assert (moved.input_ids.numpy() == permutation[plain.input_ids.numpy()]).all()
            assert moved.num_bytes == plain.num_bytes
            assert moved.input_ids.dtype == torch.int64
