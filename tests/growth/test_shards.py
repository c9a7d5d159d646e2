"""Safetensors files by pieces: the bytes that the library writes, the rows that it reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cambia.errors import CheckpointError
from cambia.growth.disk import shards
from cambia.growth.disk.shards import TensorSpec, read_header, split_into_shards, spool, write_shard

MIXED = {
    "b": torch.arange(6.0).view(2, 3).to(torch.bfloat16),
    "ä": torch.ones(2, 2),
    "c": torch.zeros(3, 0, dtype=torch.float16),
    "a": torch.arange(5, dtype=torch.float64),
    "half": torch.ones(1, dtype=torch.float16),
    "one": torch.tensor(3.0),
}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_it_writes_the_librarys_bytes(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "theirs", metadata={"format": "pt"})
    told: list[int] = []
    write_shard(tmp_path / "ours", specs(MIXED), lambda name: [MIXED[name]], told.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(told) == sum(tensor.nbytes for tensor in MIXED.values())
    assert load_file(tmp_path / "ours").keys() == MIXED.keys()


def test_a_tensor_of_another_size_than_was_said_is_an_error(tmp_path: Path) -> None:
    said = {"a": TensorSpec((3,), torch.float32)}
    with pytest.raises(AssertionError, match="not the size"):
        write_shard(tmp_path / "x", said, lambda _: [torch.ones(2)], lambda _: None)


@given(index=st.lists(st.integers(-2, 9), max_size=30), width=st.integers(0, 3))
@example(index=[-2, -1, 0, 1, 1, 2, 9], width=2)
def test_rows_are_read_by_number(
    index: list[int], width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.arange(1.0, 1 + 10 * width).view(10, width).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("rows") / "file"
    save_file({"before": torch.ones(3), "rows": tensor}, path)
    wanted = torch.tensor(index, dtype=torch.int64)
    expected = tensor[wanted.clamp_min(0)] * (wanted >= 0)[:, None]
    assert read_header(path)["rows"].read(wanted).equal(expected)
    spooled = spool(
        path.with_name("spooled"), TensorSpec((10, width), tensor.dtype), [tensor[:4], tensor[4:]]
    )
    assert spooled.read(wanted).equal(expected)


def test_bytes_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PIECE", 7)
    save_file(MIXED, tmp_path / "file")
    for name, stored in read_header(tmp_path / "file").items():
        pieces = [bytes(piece) for piece in stored.pieces()]
        assert b"".join(pieces) == MIXED[name].flatten().view(torch.uint8).numpy().tobytes()
        assert all(len(piece) <= 7 for piece in pieces)


@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=14), most=st.integers(20, 400))
def test_shards_are_split_as_transformers_splits_them(rows: list[int], most: int) -> None:
    # Names are in the order that transformers puts them into first.
    tensors = {f"model.layers.{i}.weight": torch.zeros(n) for i, n in enumerate(rows)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    ours = split_into_shards(specs(dict(sorted(tensors.items()))), most)
    assert list(ours.values()) == list(theirs.filename_to_tensors.values())
    assert list(ours) == list(theirs.filename_to_tensors)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"[]", "no safetensors header"),
        (b'{"a": 3}', "no safetensors header"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "F32 of shape (2,) in 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "cut short"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', "F32 of shape (2,)"),
        (b"\xff\xfe{}", "no safetensors header"),
    ],
)
def test_a_header_that_cannot_be_trusted_is_refused(header: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        read_header(tmp_path / "file")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "file")
    stored = read_header(tmp_path / "file")["a"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends too early"):
        list(stored.pieces())
