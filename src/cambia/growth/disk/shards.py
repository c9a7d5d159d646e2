"""Safetensors files, read and written a few rows at a time.

The safetensors library maps a file into memory and wants all tensors of a file before it writes the first. A
checkpoint that is larger than memory needs neither. The format is simple: eight bytes that say how long the
header is, a JSON header with type, shape and place of each tensor, then the values without gaps.

    >>> stored = read_shards(Path("llama"))
    >>> stored["model.embed_tokens.weight"].read(torch.arange(4)).shape
    torch.Size([4, 4096])
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cambia.errors import CheckpointError
from cambia.files import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""How transformers calls the weights of a model: in one file, or the list of several."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that can grow, by the format's names, in the order in which the library writes them. The
format knows more types, for quantized weights and masks."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the library refuses longer ones
_PIECE = 2**22  # bytes that are copied at a time


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file and is read a few rows at a time.

    The file is opened for each read and not mapped into memory, so nothing of it stays in the process.
    """

    file: Path
    start: int
    """Where its values begin in the file, in bytes."""
    shape: tuple[int, ...]
    kind: str
    """Its type as the format calls it."""
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Its type; only those in `DTYPES` have one here."""
        return DTYPES[self.kind]

    def read(self, index: Tensor) -> Tensor:
        """Rows by their number; zeros where it is negative.

        Args:
            index: (n,) int64.

        Returns:
            (n, rest of the shape)
        """
        rows = torch.zeros(len(index), *self.shape[1:], dtype=self.dtype)
        target = _bytes_of(rows)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as file:
            for place, first, count in _runs(index):
                file.seek(self.start + first * size)
                _fill(file, target[place * size : (place + count) * size], self.file)
        return rows

    def pieces(self) -> Iterator[memoryview]:
        """All of its bytes, a few megabytes at a time."""
        buffer = memoryview(bytearray(min(_PIECE, self.num_bytes)))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for done in range(0, self.num_bytes, _PIECE):
                piece = buffer[: min(_PIECE, self.num_bytes - done)]
                _fill(file, piece, self.file)
                yield piece


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _fill(file: Any, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise CheckpointError(f"{path} ends too early: it was cut short while it was read")
        done += count


def _runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """Stretches of an index that lie next to each other in the file: place, first row, number of rows."""
    if not len(index):
        return
    breaks = torch.nonzero((index[1:] != index[:-1] + 1) | (index[:-1] < 0)).flatten() + 1
    starts = [0, *breaks.tolist()]
    for place, end in zip(starts, [*starts[1:], len(index)], strict=True):
        first = int(index[place])
        if first >= 0:
            yield place, first, end - place


# ---- reading -------------------------------------------------------------------------------------


def read_shards(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by their names in the files; only the headers are read.

    Raises:
        CheckpointError: files are missing, cut short, or not of this format.
    """
    if (folder / WHOLE).exists():
        return read_header(folder / WHOLE)
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise CheckpointError(f"{folder / INDEX} has no weight_map: it was altered or cut short")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the file {name!r} that {INDEX} names: download it again")
        tensors.update(read_header(folder / name))
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{folder / places[missing[0]]} does not hold {missing[0]!r}, as {INDEX} says")
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: it is none, or was cut short.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{path} is no safetensors file, or was cut short: get it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, 8 + length, each) for name, each in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has no safetensors header that can be read ({error})") from None
    last = max((each.start + each.num_bytes for each in tensors.values()), default=0)
    if last > size:
        raise CheckpointError(f"{path} has {size:,} bytes of {last:,}: it was cut short, get it again")
    return tensors


def _stored(path: Path, data: int, fields: Mapping[str, Any]) -> StoredTensor:
    start, end = fields["data_offsets"]
    shape, kind = tuple(int(n) for n in fields["shape"]), str(fields["dtype"])
    if start < 0 or (kind in DTYPES and end - start != TensorSpec(shape, DTYPES[kind]).num_bytes):
        raise ValueError(f"{kind} of shape {shape} in {end - start} bytes")
    return StoredTensor(path, data + start, shape, kind, end - start)


# ---- writing -------------------------------------------------------------------------------------

Contents = Callable[[str], Iterable[Tensor | memoryview]]
"""The values of a tensor by its name, piece by piece."""


def split_into_shards(tensors: Mapping[str, TensorSpec], most_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, as transformers splits and names them.

    Args:
        tensors: in any order; files take them by name, layer 2 before layer 10.
        most_bytes: of a file; a larger tensor gets a file of its own.
    """
    shards: list[list[str]] = []
    current, size = [], 0
    for name in sorted(tensors, key=_by_parts):
        spec = tensors[name]
        if spec.num_bytes > most_bytes:
            shards.append([name])
            continue
        if current and size + spec.num_bytes > most_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += spec.num_bytes
    shards += [current] if current else []
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _by_parts(name: str) -> list[tuple[bool, int, str]]:
    """A name's parts for sorting, numbers by their value and before words."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def index_text(tensors: Mapping[str, TensorSpec], shards: Mapping[str, Sequence[str]]) -> str:
    """What stands in the list of several files, as transformers writes it."""
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in tensors.values()),
        "total_size": sum(spec.num_bytes for spec in tensors.values()),
    }
    places = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def write_shard(
    path: Path, tensors: Mapping[str, TensorSpec], contents: Contents, wrote: Callable[[int], None]
) -> None:
    """Write one safetensors file, byte for byte as the library would.

    Args:
        tensors: what it holds.
        contents: gives the values of each, when its turn comes.
        wrote: is told the number of bytes after each piece.
    """
    # The library's order: wide types first, so that every tensor is aligned, and then by name.
    kinds = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = tensors[name]
        begin, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            begin = file.tell()
            for piece in contents(name):
                wrote(file.write(_bytes_of(piece) if isinstance(piece, Tensor) else piece))
            assert file.tell() - begin == tensors[name].num_bytes, f"{name} has not the size that was planned"


def spool(path: Path, spec: TensorSpec, blocks: Iterable[Tensor]) -> StoredTensor:
    """Write a tensor into a file of its own, without a header, from where its rows can be read again."""
    with open(path, "wb") as file:
        for block in blocks:
            file.write(_bytes_of(block))
    return StoredTensor(path, 0, spec.shape, _NAMES[spec.dtype], spec.num_bytes)
