from __future__ import annotations

import json
import sys

import pytest

from cambia.data import HubSource
from cambia.errors import ConfigError, DataError, MissingExtraError


@pytest.fixture
def local_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split, count in {"train": 5, "validation": 2}.items():
        rows = [{"body": f"{split} {number}", "answer": str(number)} for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_a_set_is_streamed_by_split_and_field(local_set):
    source = HubSource(local_set, field="body", valid_split="validation")
    assert [document.text for document in source.documents()] == [f"train {number}" for number in range(5)]
    valid = source.own_splits()["valid"]
    assert [document.text for document in valid.documents()] == ["validation 0", "validation 1"]
    assert source.describe()["files"]


def test_instructions(local_set):
    source = HubSource(local_set, instruction_field="body", output_field="answer")
    document = next(source.documents())
    assert document.text == "train 0\n0" and document.loss_from == 8


def test_what_is_missing_is_named(local_set):
    with pytest.raises(DataError, match="row 1 has no field 'text'; its fields are body, answer"):
        next(HubSource(local_set).documents())
    with pytest.raises(DataError, match="split nothing") as caught:
        next(HubSource(local_set, split="nothing", field="body").documents())
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="needs `dataset`"):
        HubSource()


def test_without_the_extra_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cambia\[data\]'"):
        next(HubSource("some/set").documents())
