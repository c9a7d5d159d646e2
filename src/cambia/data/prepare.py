"""From a source to token files: split by key, drop duplicates, encode, write; once per configuration.

The corpus is never held in memory. Training documents are written as they come; held-out ones wait
in a file until every training line is known, and then lose the lines that training also has
(law: what is measured was not trained on).

    >>> corpus = prepare(EmbeddedSource("python"), tokenizer, cache_dir="cache")
    >>> corpus.summary["splits"]["valid"]["duplicate_lines_dropped"]
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from cambia.data.chats import ChatEncoder
from cambia.data.corpus import SUMMARY, PreparedCorpus, file_names, token_dtype
from cambia.data.duplicates import HashFile, HeldOutHashes, without_lines
from cambia.data.sources import ASSISTANT, SPLITS, TEST, TRAIN, VALID, Document, Source, Splits
from cambia.data.tokenizers import Tokenizer
from cambia.errors import CheckpointError, DataError
from cambia.files import atomic_folder, one_line_when_full, write_json

_VERSION = 1  # raise it when a change here changes the files
_ENCODE_CHARS = 1 << 20


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    splits: Splits | None = None,
    drop_duplicates: bool = False,
    document_bytes: int = 65_536,
) -> PreparedCorpus:
    """Write a corpus as token files, or open the ones that an equal configuration wrote before.

    Args:
        source: where the text comes from.
        tokenizer: how it becomes tokens.
        cache_dir: the folder that keeps prepared corpora, each in a folder named by its hash.
        splits: how much is set aside; by default 5 % for validation and 5 % for testing.
        drop_duplicates: drop duplicate lines from validation and test files that you gave yourself,
            too; otherwise they are counted there and kept. Splits cut by key always lose them.
        document_bytes: longer documents are cut at a line's end, under one key.

    Raises:
        DataError: the source cannot be read, or a split would be empty.
        StorageFullError: the disk is full; nothing half-written is left.
    """
    splits = splits or Splits()
    template = tokenizer.hf.chat_template
    configuration = {
        "version": _VERSION,
        **({"chat_template": template} if template else {}),
        "source": source.describe(),
        "tokenizer": tokenizer.fingerprint,
        "splits": dataclasses.asdict(splits),
        "drop_duplicates": drop_duplicates,
        "document_bytes": document_bytes,
    }
    fingerprint = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir) / fingerprint[:20]
    with _lock(folder):
        with contextlib.suppress(CheckpointError):  # missing or damaged: written anew
            return PreparedCorpus.open(folder)
        with atomic_folder(folder) as temporary:
            with contextlib.ExitStack() as opened:
                work = _Preparation(temporary, opened, splits, drop_duplicates)
                counts = work.run(source, tokenizer, document_bytes)
            summary = {
                "fingerprint": fingerprint,
                "configuration": configuration,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "splits": counts,
            }
            write_json(temporary / SUMMARY, summary)
        return PreparedCorpus.open(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Generator[None]:
    """One process prepares, the others wait and then find the work done."""
    with one_line_when_full(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def train_texts(source: Source, splits: Splits | None = None) -> Callable[[], Iterator[str]]:
    """The texts of a source's training split, for a tokenizer that learns from them."""
    rule = (splits or Splits()).without(tuple(source.own_splits()))
    return lambda: (document.text for document in source.documents() if rule.of(document.key) == TRAIN)


class _Preparation:
    """The files of one corpus while they are being written."""

    def __init__(self, folder: Path, opened: contextlib.ExitStack, splits: Splits, drop_duplicates: bool):
        self.folder, self.opened = folder, opened
        self.splits, self.drop_duplicates = splits, drop_duplicates
        self.training = HashFile(opened.enter_context((folder / "train.hashes").open("w+b")))
        self.waiting = {
            split: _Waiting(opened.enter_context((folder / f"{split}.waiting").open("w+", encoding="utf-8")))
            for split in (VALID, TEST)
        }

    def run(self, source: Source, tokenizer: Tokenizer, document_bytes: int) -> dict[str, dict[str, int]]:
        """Write every split and give its counts."""
        writers = {split: _SplitWriter(self, split, tokenizer, document_bytes) for split in SPLITS}
        own = source.own_splits()
        rule = self.splits.without(tuple(own))
        documents = 0
        for document in source.documents():
            documents += 1
            split = rule.of(document.key)
            if split == TRAIN:
                self.training.add(document.text)
                writers[TRAIN].add(document)
            else:
                self.waiting[split].add(document)
        for split, given in own.items():
            for document in given.documents():
                self.waiting[split].add(document)

        counts = {TRAIN: writers[TRAIN].close()}
        seen = {VALID: [self.training.common], TEST: [self.training.common, self.waiting[VALID].common]}
        for split in (VALID, TEST):
            known = self.waiting[split].known(seen[split])
            drop = split not in own or self.drop_duplicates
            counts[split] = self._held_out(split, writers[split], known, drop=drop)
        for path in (self.folder / "train.hashes", *self.folder.glob("*.waiting")):
            path.unlink()
        _refuse_empty(counts, rule, tuple(own), documents)
        return counts

    def _held_out(self, split: str, writer: _SplitWriter, known: set[int], *, drop: bool) -> dict[str, int]:
        found = dropped = 0
        for document in self.waiting[split].documents():
            text, duplicates = without_lines(document.text, document.loss_from, known)
            found += duplicates
            kept = dataclasses.replace(document, text=text) if drop else document
            if not kept.text[kept.loss_from :].strip():
                dropped += duplicates
                continue
            if document.turns:
                kept = document  # a chat goes whole, where nothing in it is new, or stays whole
            elif drop:
                dropped += duplicates
            writer.add(kept)
        counts = writer.close()
        return {**counts, "duplicate_lines_dropped": dropped, "duplicate_lines_kept": found - dropped}


def _refuse_empty(
    counts: dict[str, dict[str, int]], rule: Splits, own: tuple[str, ...], documents: int
) -> None:
    if not counts[TRAIN]["num_documents"]:
        raise DataError(f"the source gave no text to train on ({documents} documents in all, after filters)")
    wanted = {VALID: rule.valid_fraction > 0 or VALID in own, TEST: rule.test_fraction > 0 or TEST in own}
    for split in (VALID, TEST):
        if counts[split]["num_documents"] or not wanted[split]:
            continue
        dropped = counts[split]["duplicate_lines_dropped"]
        why = f" ({dropped} of its lines were dropped because they also stand in training)" if dropped else ""
        raise DataError(
            f"the {split} split is empty{why}: the source gave {documents} documents; give it more text, set "
            f"{split}_path, or another {split}_fraction"
        )


class _Waiting:
    """Held-out documents that wait on disk for the training split to be complete."""

    def __init__(self, file: IO[str]):
        self._file = file
        self._hashes = HeldOutHashes()

    def add(self, document: Document) -> None:
        self._hashes.add(document.text)
        self._file.write(json.dumps(dataclasses.astuple(document)) + "\n")

    def known(self, others: Iterable[Callable[[np.ndarray], np.ndarray]]) -> set[int]:
        """Which of these documents' hashes the others have as well."""
        hashes = self._hashes.array()
        return {int(value) for common in others for value in common(hashes)}

    def common(self, hashes: np.ndarray) -> np.ndarray:
        return np.intersect1d(hashes, self._hashes.array())

    def documents(self) -> Iterator[Document]:
        self._file.seek(0)
        for line in self._file:
            text, key, loss_from, turns = json.loads(line)
            yield Document(text, key, loss_from, tuple((role, content) for role, content in turns))


class _SplitWriter:
    """Appends documents to one split's files."""

    def __init__(self, work: _Preparation, split: str, tokenizer: Tokenizer, document_bytes: int):
        self.names = {what: work.folder / name for what, name in file_names(split).items()}
        self.tokenizer, self.document_bytes = tokenizer, document_bytes
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.starts, self.sizes = array("q"), array("q")
        self.untrained = array("q")  # where each stretch of these starts and stops, one after another
        self.position = 0
        self._waiting: list[Document] = []
        self._waiting_chars = 0
        self._file = work.opened.enter_context(self.names["tokens"].open("wb"))
        self._write(np.array([tokenizer.eos_id]))

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer)

    def _write(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self.dtype).tobytes())
        self.position += len(ids)

    def add(self, document: Document) -> None:
        for piece in _pieces(document, self.document_bytes):
            self._waiting.append(piece)
            self._waiting_chars += len(piece.text)
        if self._waiting_chars >= _ENCODE_CHARS:
            self._encode()

    def _encode(self) -> None:
        plain = [piece for piece in self._waiting if not piece.turns]
        # An instruction and its answer are encoded apart, so that no token spans the border.
        heads = iter(self.tokenizer.encode_batch([piece.text[: piece.loss_from] for piece in plain]))
        tails = iter(self.tokenizer.encode_batch([piece.text[piece.loss_from :] for piece in plain]))
        for piece in self._waiting:
            if piece.turns:
                ids, trained = self._chat(piece.turns)
                said = "".join(content for role, content in piece.turns if role == ASSISTANT)
            else:
                head, tail = next(heads), next(tails)
                ids, said = np.concatenate([head, tail]), piece.text[piece.loss_from :]
                trained = np.arange(len(ids)) >= len(head)
            if trained.any():  # else there is nothing that the tokenizer knows how to write
                self._append(ids, trained, len(said.encode("utf-8")))
        self._waiting, self._waiting_chars = [], 0

    def _append(self, ids: np.ndarray, trained: np.ndarray, size: int) -> None:
        """One document, of whose tokens some are trained on; the token that ends it always is."""
        opening = self.tokenizer.opening
        if len(opening) and ids[0] != opening[0]:  # a chat template may have written it already
            ids, trained = np.concatenate([opening, ids]), np.concatenate([trained[:1], trained])
        self.starts.append(self.position)
        self.sizes.append(size)
        edges = np.diff(np.concatenate([[True], trained, [True]]).astype(np.int8))
        self.untrained.extend((self.position + np.flatnonzero(edges)).tolist())
        self._write(np.append(ids, self.tokenizer.eos_id))

    def close(self) -> dict[str, int]:
        self._encode()
        self._file.close()
        np.save(self.names["starts"], np.array(self.starts, dtype=np.int64))
        np.save(self.names["bytes"], np.array(self.sizes, dtype=np.int64))
        if self.untrained:
            mask = np.memmap(self.names["mask"], dtype=np.uint8, mode="w+", shape=(self.position,))
            mask[:] = 1
            for start, stop in zip(self.untrained[::2], self.untrained[1::2], strict=True):
                mask[start:stop] = 0
            mask.flush()
        return {
            "num_tokens": self.position,
            "num_bytes": sum(self.sizes),
            "num_documents": len(self.starts),
        }


def _pieces(document: Document, limit_bytes: int) -> Iterator[Document]:
    """A document, or its parts of at most `limit_bytes`, cut at line ends where there are any."""
    if document.loss_from or document.turns or len(document.text.encode("utf-8")) <= limit_bytes:
        yield document
        return
    raw = document.text.encode("utf-8")
    start = 0
    while start < len(raw):
        end = min(start + limit_bytes, len(raw))
        if end < len(raw):
            line = raw.rfind(b"\n", start, end)
            end = line + 1 if line > start else end
            while raw[end] & 0xC0 == 0x80:  # never inside a character
                end -= 1
        yield dataclasses.replace(document, text=raw[start:end].decode("utf-8"))
        start = end
