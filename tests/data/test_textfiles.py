from __future__ import annotations

import gzip
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import FilesSource, LicenseFilter, textfiles
from cambia.data.textfiles import entries, read_text, split_at
from cambia.errors import ConfigError, DataError, MissingExtraError


def texts(source):
    return [document.text for document in source.documents()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- plain text ----


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=60), block=st.integers(1, 7))
def test_blocks_may_end_inside_a_character(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "_BLOCK_BYTES", block)
        assert "".join(read_text(path)) == text.removeprefix("\ufeff")


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=" ab.\n\r", max_size=400), target=st.integers(1, 50), block=st.integers(1, 60))
def test_entries_lose_nothing_but_line_ends_and_keep_their_size(text, target, block):
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    found = [*entries(blocks, target)]
    assert "".join(found).replace("\n", "").replace("\r", "") == text.replace("\n", "").replace("\r", "")
    assert all(len(entry) <= 2 * target for entry in found)


def test_entries_prefer_blank_lines_then_line_ends_then_spaces():
    assert [*entries(iter(["one\ntwo\n\nthree four five six"]), 6)] == ["one\ntwo", "three four ", "five six"]
    assert next(entries(iter(["aaaa bbbb\ncccc dddd eeee"]), 6)) == "aaaa bbbb"


def test_a_single_file_is_cut_into_entries_with_keys_of_their_own(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {number}. " + "word " * 40 for number in range(200)))
    documents = [*FilesSource(str(path)).documents()]
    assert len(documents) > 80
    assert len({document.key for document in documents}) == len(documents)
    assert len([*FilesSource(str(path), split_by="file").documents()]) == 1


def test_many_files_are_split_by_file(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}\n" * 300)
    documents = [*FilesSource(str(tmp_path)).documents()]
    assert [document.key for document in documents] == [f"{number:03}.txt" for number in range(100)]
    assert next(FilesSource(str(tmp_path), split_by="entry").documents()).key != "000.txt"


def test_a_separator_stands_between_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|end|>\ntwo\n<|end|>\n")
    assert texts(FilesSource(str(path), document_separator="<|end|>")) == ["one", "two"]
    assert [*split_at(iter(["a<", "|>b"]), "<|>")] == ["a", "b"]


def test_gzip_is_read_through_and_found_without_its_suffix(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("packed")
    assert texts(FilesSource(str(tmp_path / "a.txt.gz"))) == ["packed"]
    assert texts(FilesSource(str(tmp_path / "a.txt"))) == ["packed"]


def test_paths_are_looked_up_under_cambia_data(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.md").write_text("found")
    monkeypatch.setenv("CAMBIA_DATA", str(tmp_path))
    assert texts(FilesSource("set/a.md")) == ["found"]
    monkeypatch.delenv("CAMBIA_DATA")
    with pytest.raises(DataError, match="CAMBIA_DATA, where corpora are looked up, is not set"):
        texts(FilesSource("set/a.md"))


def test_a_folder_gives_its_text_files_in_order_and_no_others(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/two.txt", "a.md", ".hidden.txt", "picture.png", "empty.txt"):
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    assert texts(FilesSource(str(tmp_path))) == ["a.md", "b/two.txt"]


def test_the_description_follows_the_bytes_and_not_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    one, two = (FilesSource(str(tmp_path / name)).describe() for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.txt").write_text("other")
    assert FilesSource(str(tmp_path / "two")).describe() != one


# ---- rows ----


def test_jsonl_by_a_named_field(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "two"}, {"body": None}])
    assert texts(FilesSource(path, field="body")) == ["one", "two"]


def test_equal_rows_share_a_key(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    keys = [document.key for document in FilesSource(path).documents()]
    assert keys[0] == keys[2] != keys[1]


def test_instructions_are_shown_and_not_trained_on(tmp_path):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    source = FilesSource(path, instruction_field="instruction", input_field="input", output_field="output")
    documents = [*source.documents()]
    assert [document.text for document in documents] == ["Add\n1 2\n3", "Greet\nHi"]
    assert [document.text[document.loss_from :] for document in documents] == ["3", "Hi"]


def test_json_arrays_and_license_filter(tmp_path):
    rows = [{"text": "free", "license": "mit"}, {"text": "not", "license": "gpl-3.0"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=2))
    assert texts(FilesSource(str(path))) == ["free", "not"]
    assert texts(FilesSource(str(path), filters=[LicenseFilter()])) == ["free"]
    write_lines(path, rows)
    assert texts(FilesSource(str(path))) == ["free", "not"]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), path)
    assert texts(FilesSource(str(path))) == ["one", "two"]
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="is not a parquet file"):
        texts(FilesSource(str(path)))


def test_parquet_without_the_extra_names_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"pip install 'cambia\[data\]'"):
        texts(FilesSource(str(path)))


# ---- what is wrong with a file, in one line ----


def bad_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"abc\xff\xfe", "byte 3 is 0xff"),
        ("a.txt", "é".encode()[:1], "byte 0 is 0xc3"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n', "fields are question, answer"),
        ("a.jsonl", b'["one"]\n', "line 1 is a list"),
        ("a.jsonl", b'{"text": ["one"]}\n', "field 'text' holds a list"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        texts(FilesSource(bad_file(tmp_path, name, content)))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_the_offset_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "_BLOCK_BYTES", 4)
    path = bad_file(tmp_path, "a.txt", "aéé".encode() + b"\xe9" + b"bcdefg")
    with pytest.raises(DataError, match="byte 5 is 0xe9"):
        texts(FilesSource(path))


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"1")
    with pytest.raises(DataError, match="holds no text"):
        texts(FilesSource(str(tmp_path)))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="set both"):
        FilesSource("x", output_field="answer")
    with pytest.raises(ConfigError, match="may name"):
        FilesSource("x", template="{question}")


def test_real_corpora(corpora):
    del corpora
    own = FilesSource(
        "wikitext-2/wiki.train.tokens",
        valid_path="wikitext-2/wiki.valid.tokens",
        test_path="wikitext-2/wiki.test.tokens",
        limit_bytes=50_000,
    )
    assert sum(len(text.encode()) for text in texts(own)) == 50_000
    assert sorted(own.own_splits()) == ["test", "valid"]
    alpaca = FilesSource(
        "codealpaca/code_alpaca_2k.json",
        instruction_field="instruction",
        input_field="input",
        output_field="output",
    )
    assert len(texts(alpaca)) == 2015  # of 2017 rows two have an empty answer
