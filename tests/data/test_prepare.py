from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import BpeTokenizer, FilesSource, GeneratedSource, PreparedCorpus, build_tokenizer
from cambia.data.prepare import _pieces, prepare, train_texts
from cambia.data.sources import Document, Splits
from cambia.errors import CheckpointError, DataError, StorageFullError

SENTENCE = "This sentence number {} is long enough to be compared with the others, {}."


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    words = ["apple", "river", "stone", "cloud", "lantern", "garden", "winter", "copper"]
    lines = [
        f"{words[n % 8]} {words[n // 8 % 8]} {words[n // 64 % 8]} {words[n // 512]}" for n in range(2000)
    ]
    path.write_text("\n\n".join(f"The {line} stood there {line[::-1]}" for line in lines))
    return FilesSource(str(path))


def documents_of(file, tokenizer):
    tokens = np.asarray(file.tokens)
    ends = np.append(file.starts[1:], len(tokens)) - 1
    return [tokenizer.decode(tokens[start:end]) for start, end in zip(file.starts, ends, strict=True)]


def test_the_layout_of_a_split(book, tmp_path, byte_tokenizer):
    corpus = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    rule = Splits()
    expected = {"train": [], "valid": [], "test": []}
    for document in book.documents():
        expected[rule.of(document.key)].append(document.text)
    for split, file in corpus.splits.items():
        assert file.tokens.dtype == np.uint16 and isinstance(file.tokens, np.memmap)
        assert file.tokens[0] == file.tokens[-1] == 256
        assert (file.tokens[file.starts - 1] == 256).all()
        assert np.count_nonzero(file.tokens == 256) == file.num_documents + 1
        assert documents_of(file, byte_tokenizer) == expected[split]
        assert file.num_bytes == sum(len(text.encode()) for text in expected[split])
        assert file.mask is None
        counts = corpus.summary["splits"][split]
        assert (counts["num_tokens"], counts["num_bytes"]) == (file.num_tokens, file.num_bytes)


def test_the_manifest_names_every_file(book, tmp_path, byte_tokenizer):
    corpus = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert sorted([*manifest["sha256"], "manifest.json"]) == sorted(os.listdir(corpus.folder))


def test_equal_configurations_share_a_folder_and_do_the_work_once(
    book, tmp_path, byte_tokenizer, monkeypatch
):
    first = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(FilesSource, "documents", lambda self: pytest.fail("read again"))
    again = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert again.folder == first.folder
    assert (again.splits["train"].tokens == first.splits["train"].tokens).all()


def test_of_several_at_once_one_does_the_work(book, tmp_path, byte_tokenizer, monkeypatch):
    read = []
    documents = FilesSource.documents
    monkeypatch.setattr(FilesSource, "documents", lambda self: read.append(1) or documents(self))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(prepare, book, byte_tokenizer, cache_dir=tmp_path / "cache") for _ in range(4)]
    assert len({job.result().folder for job in jobs}) == 1
    assert read == [1]


def test_another_configuration_gets_another_folder(book, tmp_path, byte_tokenizer):
    cache = tmp_path / "cache"
    bpe = build_tokenizer(BpeTokenizer(vocab_size=280), texts=train_texts(book))
    folders = {
        prepare(book, byte_tokenizer, cache_dir=cache).folder,
        prepare(book, bpe, cache_dir=cache).folder,
        prepare(book, byte_tokenizer, cache_dir=cache, splits=Splits(0.1, 0.1)).folder,
        prepare(GeneratedSource(), byte_tokenizer, cache_dir=cache).folder,
    }
    assert len(folders) == 4


def test_a_damaged_folder_is_written_anew(book, tmp_path, byte_tokenizer):
    corpus = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    path = corpus.folder / "train.tokens.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(CheckpointError):
        PreparedCorpus.open(corpus.folder)
    prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert path.read_bytes() == good


def test_lines_of_the_training_split_leave_validation_and_test(tmp_path, byte_tokenizer):
    path = tmp_path / "rows.jsonl"
    banner = "Copyright (c) {} The Authors, all rights reserved."
    rows = [
        {"text": f"{banner.format(n)}\nshort\n{SENTENCE.format('x' * (n + 1), 'abc' * n)}"}
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare(FilesSource(str(path)), byte_tokenizer, cache_dir=tmp_path / "cache")
    held_out = [*documents_of(corpus.splits["valid"], byte_tokenizer)]
    assert held_out and all(text.startswith("short\n") for text in held_out)
    counts = corpus.summary["splits"]["valid"]
    assert counts["duplicate_lines_dropped"] == counts["num_documents"] == len(held_out)
    assert documents_of(corpus.splits["train"], byte_tokenizer)[0].startswith("Copyright")


@pytest.fixture
def own_splits(tmp_path):
    for name, numbers in {"train": range(50), "valid": range(45, 60), "test": range(55, 70)}.items():
        lines = [SENTENCE.format(chr(97 + n % 26) * 9, chr(97 + n // 26) * 9) for n in numbers]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    paths = {
        f"{split}path": str(tmp_path / name)
        for split, name in {"": "train.txt", "valid_": "valid.txt", "test_": "test.txt"}.items()
    }
    return FilesSource(**paths)


def test_own_splits_are_kept_and_their_duplicates_reported(own_splits, tmp_path, byte_tokenizer):
    corpus = prepare(own_splits, byte_tokenizer, cache_dir=tmp_path / "cache")
    counts = corpus.summary["splits"]
    assert [counts[split]["duplicate_lines_kept"] for split in ("valid", "test")] == [5, 5]
    assert [counts[split]["duplicate_lines_dropped"] for split in ("valid", "test")] == [0, 0]
    lines = {
        split: "\n".join(documents_of(file, byte_tokenizer)).count("This sentence")
        for split, file in corpus.splits.items()
    }
    assert lines == {"train": 50, "valid": 15, "test": 15}


def test_own_splits_lose_their_duplicates_on_request(own_splits, tmp_path, byte_tokenizer):
    corpus = prepare(own_splits, byte_tokenizer, cache_dir=tmp_path / "cache", drop_duplicates=True)
    assert corpus.summary["splits"]["test"]["duplicate_lines_dropped"] == 5
    assert "\n".join(documents_of(corpus.splits["test"], byte_tokenizer)).count("This sentence") == 10


def test_a_missing_split_is_cut_from_the_rest(own_splits, tmp_path, byte_tokenizer):
    source = FilesSource(own_splits.path, test_path=own_splits.test_path)
    corpus = prepare(source, byte_tokenizer, cache_dir=tmp_path / "cache", splits=Splits(0.2, 0.2))
    assert 0 < corpus.splits["valid"].num_documents < corpus.splits["train"].num_documents
    texts = "".join(train_texts(source, Splits(0.2, 0.2))())
    assert texts.count("This") == "".join(documents_of(corpus.splits["train"], byte_tokenizer)).count("This")


def test_instructions_are_masked_and_their_bytes_not_counted(tmp_path, byte_tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"q": f"question {n * 7919}", "a": f"answer é {n * 104729}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(str(path), instruction_field="q", output_field="a")
    corpus = prepare(source, byte_tokenizer, cache_dir=tmp_path / "cache", splits=Splits(0.1, 0.1))
    file = corpus.splits["train"]
    trained = bytes(token for token, on in zip(file.tokens, file.mask, strict=True) if on and token < 256)
    assert b"question" not in trained and trained.count("answer é".encode()) == file.num_documents
    assert len(trained) == file.num_bytes
    assert file.mask[file.tokens == 256].all()


def test_documents_without_a_new_line_for_the_split_are_refused(tmp_path, byte_tokenizer):
    path = tmp_path / "one.txt"
    path.write_text("only one entry")
    with pytest.raises(DataError, match=r"the (valid|train|test) split is empty|no text to train on"):
        prepare(FilesSource(str(path)), byte_tokenizer, cache_dir=tmp_path / "cache")
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []
    corpus = prepare(FilesSource(str(path)), byte_tokenizer, cache_dir=tmp_path / "c", splits=Splits(0, 0))
    assert corpus.splits["valid"].num_documents == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(book, tmp_path, byte_tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageFullError, match="no space left") as caught:
        prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="ab é漢\n", max_size=200), limit=st.integers(4, 40))
def test_long_documents_are_cut_between_characters_and_lose_nothing(text, limit):
    pieces = [*_pieces(Document(text, "key"), limit)]
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text.encode()) <= limit for piece in pieces)
    assert {piece.key for piece in pieces} <= {"key"}


def test_head_is_whole_documents_and_at_least_one(book, tmp_path, byte_tokenizer):
    file = prepare(book, byte_tokenizer, cache_dir=tmp_path / "cache").splits["train"]
    sizes = np.cumsum(file.document_bytes)
    for limit, count in ((1, 1), (int(sizes[4]), 5), (int(sizes[4]) - 1, 4), (10**9, file.num_documents)):
        head = file.head(limit)
        assert head.num_documents == count
        assert head.num_bytes == sizes[count - 1]
        assert head.tokens[-1] == head.eos_id
        assert documents_of(head, byte_tokenizer) == documents_of(file, byte_tokenizer)[:count]


def test_real_corpora(corpora, tmp_path, byte_tokenizer):
    del corpora
    source = FilesSource("tiny-shakespeare/input.txt")
    corpus = prepare(source, byte_tokenizer, cache_dir=tmp_path)
    shares = {split: file.num_bytes / 1_115_394 for split, file in corpus.splits.items()}
    assert shares["train"] == pytest.approx(0.9, abs=0.04)
    assert min(shares.values()) > 0.02
