from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from cambia.config import Member, build, dump
from cambia.data import SOURCES, FilesSource, GeneratedSource, LengthFilter, MixtureSource, Source
from cambia.data.plain_text import VERSION
from cambia.data.sources import Document, Splits, without_surrogates
from cambia.errors import ConfigError, DataError


@dataclass(frozen=True)
class ListSource(Source):
    """Texts given in a list, keyed by themselves."""

    texts: list[str] = field(default_factory=list)

    def rows(self):
        for text in self.texts:
            yield Document(text, key=text), {}

    def contents(self):
        return {}


@dataclass(frozen=True)
class Section:
    source: Annotated[Source, Member(SOURCES, "source")]


def test_a_key_decides_the_split_and_the_shares_are_met():
    rule = Splits(valid_fraction=0.1, test_fraction=0.2)
    found = [rule.of(f"key {number}") for number in range(4000)]
    assert found == [rule.of(f"key {number}") for number in range(4000)]
    assert found.count("test") / 4000 == pytest.approx(0.2, abs=0.03)
    assert found.count("valid") / 4000 == pytest.approx(0.1, abs=0.03)


def test_what_is_in_test_stays_there_when_validation_shrinks():
    keys = [f"key {number}" for number in range(500)]
    wide, narrow = Splits(0.2, 0.1), Splits(0.05, 0.1)
    assert [k for k in keys if wide.of(k) == "test"] == [k for k in keys if narrow.of(k) == "test"]


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (1.0, 0.0)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ConfigError, match="valid_fraction"):
        Splits(*fractions)


def test_the_limit_counts_bytes_and_cuts_inside_no_character():
    source = ListSource(texts=["é" * 10, "é" * 10], limit_bytes=25)
    texts = [document.text for document in source.documents()]
    assert texts == ["é" * 10, "é" * 2]


def test_filters_come_before_the_limit():
    source = ListSource(
        texts=["short", "long enough", "x"], filters=[LengthFilter(min_chars=6)], limit_bytes=11
    )
    assert [document.text for document in source.documents()] == ["long enough"]


def test_halves_of_surrogate_pairs_are_replaced_and_pairs_joined():
    assert without_surrogates("a\ud800b") == "a\ufffdb"
    assert without_surrogates("\ud83d\ude00") == "\U0001f600"
    assert without_surrogates("plain é") == "plain é"


def test_filters_and_the_limit_see_the_plain_text():
    texts = ["“Oh…”", "“It is — well — long enough.”", "“More of it.”"]
    source = ListSource(texts=texts, filters=[LengthFilter(min_chars=12)], limit_bytes=35, plain=True)
    assert [document.text for document in source.documents()] == ['"It is - well - long enough."', '"More ']
    assert [document.key for document in source.documents()] == texts[1:]  # the splits stay what they were


def test_a_text_of_which_nothing_is_left_is_no_document():
    assert [*ListSource(texts=[" The <unk> , it is . \n"], plain=True).documents()] == []


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"instruction_field": "ask", "output_field": "say"}, "instructions with answers"),
        ({"messages_field": "chat"}, "chats"),
    ],
)
def test_only_running_text_is_made_plain(tmp_path, fields, what):
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"ask": "Why?", "say": "So.", "chat": chat}))
    source = FilesSource(str(tmp_path / "rows.jsonl"), plain=True, **fields)
    with pytest.raises(DataError, match=f"this source gives {what}: leave it out"):
        next(source.documents())


def test_own_splits_are_made_plain_as_well(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("“Said”\n")
    source = FilesSource(str(tmp_path / "a"), valid_path=str(tmp_path / "b"), plain=True)
    assert next(source.own_splits()["valid"].documents()).text == '"Said"'
    mixed = MixtureSource([source]).own_splits()["valid"]
    assert next(mixed.documents()).text == '"Said"'


def test_a_mixture_keeps_its_proportions_to_the_end():
    mixture = MixtureSource(
        [GeneratedSource("copy", size_bytes=40_000), GeneratedSource("brackets", size_bytes=40_000)],
        weights=[80, 20],
    )
    sizes = {"copy": 0, "brackets": 0}
    for document in mixture.documents():
        sizes[document.key.split()[1]] += len(document.text)
    assert sizes["copy"] / sum(sizes.values()) == pytest.approx(0.8, abs=0.02)
    assert sizes["copy"] > 39_000


def test_a_mixture_refuses_splits_that_only_some_sources_bring(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("some text\n")
    with_valid = FilesSource(str(tmp_path / "a"), valid_path=str(tmp_path / "b"))
    with pytest.raises(DataError, match="1 of the mixture's 2 sources"):
        MixtureSource([with_valid, FilesSource(str(tmp_path / "a"))]).own_splits()
    both = MixtureSource([with_valid, with_valid]).own_splits()
    assert len([*both["valid"].documents()]) == 2


@pytest.mark.parametrize("fields", [{"sources": []}, {"sources": ["x"], "weights": [1, 2]}])
def test_a_mixture_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError, match="mixture"):
        MixtureSource(**fields)


def test_the_description_tells_texts_apart_and_not_names():
    one = GeneratedSource("copy", seed=1)
    assert one.describe() == GeneratedSource("copy", seed=1, name="mine").describe()
    assert one.describe() != GeneratedSource("copy", seed=2).describe()
    assert MixtureSource([one]).describe()["sources"] == [one.describe()]


def test_a_description_without_plain_text_is_as_it_always_was():
    source = GeneratedSource("copy", size_bytes=9)
    described = source.describe()
    assert not {"plain", "plain_text"} & described.keys()
    plain = dataclasses.replace(source, plain=True)
    assert plain.describe() == {**described, "plain_text": VERSION}
    assert MixtureSource([plain]).describe() != MixtureSource([source]).describe()


def test_sources_come_from_plain_settings_and_go_back_to_them():
    tree = {
        "source": {
            "type": "mixture",
            "weights": [80, 20],
            "sources": [
                {"type": "embedded", "domain": "cpp", "filters": [{"type": "length", "min_chars": 10}]},
                {"type": "files", "path": "notes"},
            ],
        }
    }
    section = build(Section, tree)
    assert section.source.sources[0].limit_bytes == 3_000_000
    assert section.source.sources[0].filters == [LengthFilter(min_chars=10)]
    assert build(Section, dump(section)) == section


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ({"type": "embeded"}, "did you mean 'embedded'"),
        ({"type": "files", "pth": "x"}, "did you mean 'path'"),
        ({"type": "embedded", "domain": "klingon"}, "source.domain"),
        ({"type": "generated", "difficulty": 9}, "difficulty is 9"),
        ({"type": "embedded", "limit_bytes": 0}, "limit_bytes is 0"),
        ({"type": "embedded", "plian": True}, "did you mean 'plain'"),
        ({"type": "files"}, "needs `path`"),
        ({"type": "embedded", "filters": [{"type": "language", "script": "latn"}]}, "did you mean 'latin'"),
    ],
)
def test_wrong_settings_are_named(source, place):
    with pytest.raises(ConfigError, match=place):
        build(Section, {"source": source})
