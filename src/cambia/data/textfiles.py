"""Text from files: plain text, jsonl, JSON and parquet, each also as .gz.

Files are read as streams; the longest thing held is one document. A path is tried as it is given,
then under the folder that CAMBIA_DATA names, each also with ``.gz`` added.

    >>> FilesSource(path="notes/", filters=[LengthFilter(min_chars=200)])
    >>> FilesSource(path="train.jsonl", valid_path="valid.jsonl", field="content")
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cambia.data.rows import RowSource
from cambia.data.sources import TEST, TRAIN, VALID, Document, Source, key_of
from cambia.errors import ConfigError, DataError, MissingExtraError
from cambia.files import expanded, sha256_file

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".tokens", ".html", ".xml", ".csv", ".sql"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"),
    *(".js", ".ts", ".sh", ".lua", ".jl", ".r", ".scala", ".kt", ".swift", ".rb", ".pl", ".php"),
    *(".yaml", ".yml", ".toml"),
)
"""What counts as text inside a folder; a file named directly may have any suffix."""
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_BY_FILE_FROM = 100  # below this, too few keys: a split of a twentieth might stay empty
_BLOCK_BYTES = 1 << 20
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class FilesSource(RowSource):
    """Files, folders, or a list of both."""

    path: str | list[str] = ""
    """A file, a folder (read with its subfolders, in the order of names), or a list of them."""
    valid_path: str | list[str] | None = None
    """Your own validation files; without them documents are set aside by key."""
    test_path: str | list[str] | None = None
    """Your own test files; without them documents are set aside by key."""
    document_separator: str | None = None
    r"""A string between two documents of a text file, such as "<|endoftext|>"."""
    split_by: Literal["auto", "file", "entry"] = "auto"
    """What falls on one side: whole files, or entries (a few paragraphs); auto: files if there are 100."""

    PLACES: ClassVar[tuple[str, ...]] = ("path", "valid_path", "test_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError("a files source needs `path`: a file, a folder or a list of them")
        if self.document_separator == "":
            raise ConfigError("document_separator is empty; expected a string between documents, or none")

    def own_splits(self) -> dict[str, Source]:
        given = {VALID: self.valid_path, TEST: self.test_path}
        return {
            split: dataclasses.replace(self, path=path, valid_path=None, test_path=None, limit_bytes=None)
            for split, path in given.items()
            if path
        }

    def contents(self) -> dict[str, Any]:
        given = {TRAIN: self.path, VALID: self.valid_path, TEST: self.test_path}
        files = {
            split: [
                {"file": name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for name, file in list_files(path)
            ]
            for split, path in given.items()
            if path
        }
        return {"files": files}

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        files = list_files(self.path)
        plain = sum(not _is_rows(file) for _, file in files)
        by_file = self.split_by == "file" or (self.split_by == "auto" and plain >= _SPLIT_BY_FILE_FROM)
        for name, file in files:
            if _is_rows(file):
                for row, place in read_rows(file):
                    yield self.document(row, place), row
            elif by_file and self.document_separator is None:
                yield Document("".join(read_text(file)), key=name), {}
            else:
                for text in self._entries(file):
                    yield Document(text, key=key_of(text)), {}

    def _entries(self, file: Path) -> Iterator[str]:
        if self.document_separator is not None:
            return split_at(read_text(file), self.document_separator)
        size = file.stat().st_size * (3 if file.suffix == ".gz" else 1)
        # A short file is cut finer, so that each split gets some of it.
        return entries(read_text(file), target=min(4096, max(200, size // 200)))


# ---- finding files -------------------------------------------------------------------------------


def find_path(path: str) -> Path:
    """The file or folder that a user's path means.

    Raises:
        DataError: there is none.
    """
    root = os.environ.get("CAMBIA_DATA")
    given = expanded(path)
    for base in (given, expanded(root) / path) if root else (given,):
        for candidate in (base, base.with_name(base.name + ".gz")):
            if candidate.exists():
                return candidate
    tried = (
        f"nor under CAMBIA_DATA={root}"
        if root
        else "and CAMBIA_DATA, where corpora are looked up, is not set"
    )
    raise DataError(f"there is no file or folder {path!r} here ({Path.cwd()}), {tried}")


def list_files(path: str | list[str]) -> list[tuple[str, Path]]:
    """Every file that a path means, with the name it has below that path (the same on every machine).

    Raises:
        DataError: a path does not exist, a file is empty, or a folder holds no text.
    """
    found: list[tuple[str, Path]] = []
    for one in [path] if isinstance(path, str) else path:
        place = find_path(one)
        if place.is_dir():
            found += _files_below(place)
        elif place.stat().st_size == 0:
            raise DataError(f"{place} is empty; expected text")
        else:
            found.append((place.name, place))
    return found


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    found = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        known = _suffix(file) in (*TEXT_SUFFIXES, *ROW_SUFFIXES)
        if known and not hidden and file.is_file() and file.stat().st_size:
            found.append((relative.as_posix(), file))
    if not found:
        raise DataError(
            f"the folder {folder} holds no text: no file in it ends in .txt, .md, .jsonl, .parquet or "
            "another known suffix (name such files directly in `path`)"
        )
    return found


def _suffix(file: Path) -> str:
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()


def _is_rows(file: Path) -> bool:
    return _suffix(file) in ROW_SUFFIXES


# ---- reading text --------------------------------------------------------------------------------


def _blocks(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}): fetch or pack it again") from None


def read_text(file: Path) -> Iterator[str]:
    """A UTF-8 file in blocks of text; a byte-order mark at its start is left out.

    Raises:
        DataError: the file is not UTF-8 (the message gives the byte offset) or not whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    for block in itertools.chain(_blocks(file), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 text: byte {offset - waiting + error.start} is "
                f"{error.object[error.start]:#04x}; convert it (iconv -t UTF-8) or take it out of `path`"
            ) from None
        offset += len(block)
        yield text


def split_at(blocks: Iterator[str], separator: str) -> Iterator[str]:
    """The pieces between separators, white space around them left out."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split(separator)
        yield from (text.strip() for text in whole)
    yield rest.strip()


def entries(blocks: Iterator[str], target: int) -> Iterator[str]:
    """Pieces of about `target` characters: cut at a blank line, else at a line's end, else at a space."""
    most = 2 * target
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > most + target:
            end = _cut(rest, start + target, start + most)
            yield rest[start:end].strip("\r\n")
            start = end
        rest = rest[start:]
    while len(rest) > most:
        end = _cut(rest, target, most)
        yield rest[:end].strip("\r\n")
        rest = rest[end:]
    yield rest.strip("\r\n")


def _cut(text: str, start: int, stop: int) -> int:
    blank = _BLANK_LINE.search(text, start, stop)
    if blank:
        return blank.end()
    for mark in ("\n", " "):
        place = text.find(mark, start, stop)
        if place >= 0:
            return place + 1
    return stop


# ---- reading rows --------------------------------------------------------------------------------


def read_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """The rows of a jsonl, JSON or parquet file, each with its place for errors.

    Raises:
        DataError: a line is not JSON; MissingExtraError: parquet without the data extra.
    """
    suffix = _suffix(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    return _json_lines(file) if suffix == ".jsonl" else _json_rows(file)


def _json_lines(file: Path) -> Iterator[tuple[Any, str]]:
    number = 0
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield _parse(line, f"{file} line {number}"), f"{file} line {number}"


def _lines(file: Path) -> Iterator[str]:
    rest = ""
    for block in read_text(file):
        *whole, rest = (rest + block).split("\n")
        yield from whole
    yield rest


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    # A .json file is one array of objects, held whole, or in truth lines of JSON.
    first = next((block.lstrip()[:1] for block in read_text(file) if block.strip()), "")
    if first != "[":
        yield from _json_lines(file)
        return
    for number, row in enumerate(_parse("".join(read_text(file)), str(file)), start=1):
        yield row, f"{file} entry {number}"


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error}): correct or remove it") from None


def _parquet_rows(file: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingExtraError.of("pyarrow", "data") from None
    try:
        number = 0
        for group in parquet.ParquetFile(file).iter_batches():
            for row in group.to_pylist():
                number += 1
                yield row, f"{file} row {number}"
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file ({' '.join(str(error).split())})") from None
