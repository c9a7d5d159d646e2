"""Where text comes from: the `Source` family, its documents, and the rule that splits them.

A source gives `Document`s in a fixed order. A document's key, never chance, decides whether it is
trained on, validated on or tested on: documents with one key fall on one side, on every machine and
in every run.

    >>> source = MixtureSource([EmbeddedSource("python"), EmbeddedSource("english")], weights=[80, 20])
    >>> document = next(source.documents())
    >>> Splits().of(document.key)
    'train'
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from cambia.config import Member, dump, type_name
from cambia.data import FILTERS, SOURCES
from cambia.data.filters import Filter
from cambia.data.plain_text import VERSION, plain_text
from cambia.errors import ConfigError, DataError

TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = (TRAIN, VALID, TEST)
ASSISTANT = "assistant"
"""The role in a chat whose messages are trained on."""


@dataclass(frozen=True, slots=True)
class Document:
    """A stretch of text that stands for itself."""

    text: str
    key: str
    """Decides the split; documents with one key fall on one side."""
    loss_from: int = 0
    """`text[:loss_from]` (characters) is shown to the model and not trained on: an instruction."""
    turns: tuple[tuple[str, str], ...] = ()
    """Of a chat: role and content of each message. The tokenizer writes it, and what the assistant says is
    trained on; `text` holds the contents alone, for filters, limits and the search for duplicates."""


@dataclass(frozen=True, slots=True)
class Splits:
    """How documents are divided, by the SHA-256 of their keys."""

    valid_fraction: float = 0.05
    """The share of keys kept for validation."""
    test_fraction: float = 0.05
    """The share of keys kept for testing."""

    def __post_init__(self) -> None:
        if min(self.valid_fraction, self.test_fraction) < 0 or self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} must be at "
                "least 0 and together below 1: the rest is what trains"
            )

    def of(self, key: str) -> str:
        """The split of a key: train, valid or test."""
        place = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8]) / 2**64
        if place < self.test_fraction:
            return TEST
        return VALID if place < self.test_fraction + self.valid_fraction else TRAIN

    def without(self, given: Sequence[str]) -> Splits:
        """The rule where files are given for some splits, so that nothing need be cut off for them."""
        return Splits(
            valid_fraction=0.0 if VALID in given else self.valid_fraction,
            test_fraction=0.0 if TEST in given else self.test_fraction,
        )


def key_of(text: str) -> str:
    """The key of a document that has no name of its own: equal texts fall on one side."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def without_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs (from JSON or Python escapes) are replaced."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A corpus, read as a stream of documents in a fixed order."""

    name: str = ""
    """What to call it in reports; the task's name where it is empty."""
    limit_bytes: int | None = None
    """Read at most this many bytes of text (UTF-8); none reads everything."""
    filters: list[Annotated[Filter, Member(FILTERS, "filter")]] = dataclasses.field(default_factory=list)
    """Only documents that all of these keep are given."""
    plain: bool = False
    """Undo the marks of how a corpus was made: typographic quotes and dashes, tokenization (WikiText), lines
    broken to fit a page. For prose alone: code and verse need their lines. Filters and limit_bytes see the
    text that is left. Of tokenized text, sentences with <unk> are left out."""

    PLACES: ClassVar[tuple[str, ...]] = ()
    """Fields that say where the text lies, not what it is; they stay out of `describe`."""

    def __post_init__(self) -> None:
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ConfigError(f"limit_bytes is {self.limit_bytes}; expected at least 1, or none")

    @abstractmethod
    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        """Every document before filters and limit, with the fields of the row that it came from."""

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """Plain values that differ when the text differs: hashes of files, versions, member sources."""

    def own_splits(self) -> dict[str, Source]:
        """Sources for the splits that the user gave; the others are cut from `documents` by key."""
        return {}

    def documents(self) -> Iterator[Document]:
        """The documents, filtered; the one that crosses `limit_bytes` is cut there."""
        left = self.limit_bytes
        for document, row in self.rows():
            text = without_surrogates(document.text)
            if self.plain:
                _refuse_parts(document)
                text = plain_text(text)
            if not text.strip() or not all(kept.keep(text, row) for kept in self.filters):
                continue
            size = len(text.encode("utf-8"))
            if left is not None and size > left:
                if document.turns:  # a chat is whole or not there
                    return
                text = text.encode("utf-8")[:left].decode("utf-8", "ignore")
            if document.loss_from < len(text) and text.strip():
                yield dataclasses.replace(document, text=text)
            if left is not None:
                left -= size
                if left <= 0:
                    return

    def describe(self) -> dict[str, Any]:
        """Plain values that decide the text: two sources with equal descriptions give equal documents."""
        fields = {key: value for key, value in dump(self).items() if key not in ("name", *self.PLACES)}
        # Without it, a description is what it was before there was a choice, and prepared corpora stay valid.
        plain = {"plain_text": VERSION} if fields.pop("plain") else {}
        return {"type": type_name(type(self), SOURCES), **fields, **plain, **self.contents()}


def _refuse_parts(document: Document) -> None:
    """Where a prompt ends and who says what would be lost with the marks."""
    if document.loss_from or document.turns:
        what = "chats" if document.turns else "instructions with answers"
        raise DataError(f"plain: true is for running text, and this source gives {what}: leave it out there")


@dataclass(frozen=True)
class MixtureSource(Source):
    """Several sources interleaved so that their bytes keep the given proportions.

    It ends when the source whose turn it is has no more text, so the proportions hold to the end.
    """

    sources: list[Annotated[Source, Member(SOURCES, "source")]] = dataclasses.field(default_factory=list)
    """The sources to mix."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """How much of each, by bytes, in any unit: [80, 20] or [0.8, 0.2]. Empty means equal parts."""

    PLACES: ClassVar[tuple[str, ...]] = ("sources",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ConfigError("a mixture needs `sources`: a list of at least one source")
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise ConfigError(
                f"a mixture of {len(self.sources)} sources has weights {self.weights}; expected "
                f"{len(self.sources)} numbers above 0"
            )

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        weights = self.weights or [1.0] * len(self.sources)
        streams = [source.documents() for source in self.sources]
        given = [0] * len(streams)
        while True:
            turn = min(range(len(streams)), key=lambda index: given[index] / weights[index])
            document = next(streams[turn], None)
            if document is None:
                return
            given[turn] += len(document.text.encode("utf-8"))
            yield document, {}

    def own_splits(self) -> dict[str, Source]:
        given = [source.own_splits() for source in self.sources]
        for split in (VALID, TEST):
            having = sum(split in own for own in given)
            if having not in (0, len(given)):
                raise DataError(
                    f"{having} of the mixture's {len(given)} sources bring a {split} split of their own; "
                    f"give {split}_path to all of them or to none"
                )
        return {
            split: dataclasses.replace(self, sources=[own[split] for own in given], limit_bytes=None)
            for split in given[0]
        }

    def contents(self) -> dict[str, Any]:
        return {"sources": [source.describe() for source in self.sources]}
