"""Public sets that are one file each: fetched once, checked by SHA-256, found again by CAMBIA_DATA.

Nothing is downloaded unless `fetch` is called (`cambia data fetch NAME`). A file is written under a
temporary name, checked, and only then put in its place.

    >>> fetch("tiny-shakespeare", into="corpora")
    [PosixPath('corpora/tiny-shakespeare/input.txt')]
    >>> FetchSource("tiny-shakespeare")                  # with CAMBIA_DATA=corpora
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import Progress

from cambia.config import did_you_mean
from cambia.data.sources import Document, Source
from cambia.data.textfiles import FilesSource
from cambia.errors import ConfigError, DataError
from cambia.files import fsync_path, one_line_when_full

_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class PublicFile:
    """A set that anyone may download as one file."""

    url: str
    sha256: str
    """Of the file as it is downloaded."""
    license: str
    """As its makers state it."""
    files: tuple[str, ...]
    """What lies below CAMBIA_DATA afterwards."""
    recipe: str = "as_is"
    """How the download becomes `files`: a key of `RECIPES`."""
    reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the files source that reads it."""


_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_HUMANEVAL = "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz"
_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
_QUESTIONS = {"instruction_field": "question", "output_field": "answer"}

FETCHABLE: dict[str, PublicFile] = {
    "tiny-shakespeare": PublicFile(
        url=_SHAKESPEARE,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        license="public domain",
        files=("tiny-shakespeare/input.txt",),
    ),
    "enwik8": PublicFile(
        url="https://mattmahoney.net/dc/enwik8.zip",
        sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        license="CC BY-SA 3.0 and GFDL (Wikipedia)",
        files=("enwik8/train.txt", "enwik8/valid.txt", "enwik8/test.txt"),
        recipe="unzip_90_5_5",
    ),
    "text8": PublicFile(
        url="https://mattmahoney.net/dc/text8.zip",
        sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        license="CC BY-SA 3.0 and GFDL (Wikipedia)",
        files=("text8/train.txt", "text8/valid.txt", "text8/test.txt"),
        recipe="unzip_90_5_5",
    ),
    "humaneval": PublicFile(
        url=_HUMANEVAL,
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        license="MIT (OpenAI)",
        files=("humaneval/HumanEval.jsonl.gz",),
        reads={
            "instruction_field": "prompt",
            "output_field": "canonical_solution",
            "template": "{instruction}",
        },
    ),
    "gsm8k": PublicFile(
        url=_GSM8K + "train.jsonl",
        sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        license="MIT (OpenAI)",
        files=("domains/math-en/gsm8k_train.jsonl",),
        reads=_QUESTIONS,
    ),
    "gsm8k-test": PublicFile(
        url=_GSM8K + "test.jsonl",
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        license="MIT (OpenAI)",
        files=("domains/math-en/gsm8k_test.jsonl",),
        reads=_QUESTIONS,
    ),
}


# ---- recipes: a download -> the set's files ------------------------------------------------------


def _as_is(download: Path, targets: list[Path]) -> None:
    shutil.copyfile(download, targets[0])


def _unzip_90_5_5(download: Path, targets: list[Path]) -> None:
    """The archive's one member, cut in order into 90 %, 5 % and 5 % of its bytes.

    These are the borders by which the literature reports enwik8 and text8, moved back by at most three
    bytes so that no character is cut in two.
    """
    with zipfile.ZipFile(download) as archive:
        raw = archive.read(archive.namelist()[0])
    borders = [0, len(raw) * 90 // 100, len(raw) * 95 // 100, len(raw)]
    for index in (1, 2):
        while raw[borders[index]] & 0xC0 == 0x80:
            borders[index] -= 1
    for target, start, stop in zip(targets, borders, borders[1:], strict=False):
        target.write_bytes(raw[start:stop])


RECIPES: dict[str, Callable[[Path, list[Path]], None]] = {"as_is": _as_is, "unzip_90_5_5": _unzip_90_5_5}


# ---- fetching ------------------------------------------------------------------------------------


def public_file(name: str) -> PublicFile:
    """The entry of a known set.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FETCHABLE:
        raise ConfigError(f"{name!r} is no set that can be fetched{did_you_mean(name, FETCHABLE)}")
    return FETCHABLE[name]


def fetch(name: str, *, into: str | Path, base_url: str | None = None) -> list[Path]:
    """Download a known set, unless its files are there already.

    Args:
        name: a key of `FETCHABLE`.
        into: the folder that CAMBIA_DATA names.
        base_url: a mirror: a folder on another server that holds a file of the same name.

    Returns:
        The set's files.

    Raises:
        DataError: the download failed or is not what was expected; nothing of it is kept.
        StorageFullError: the disk is full; nothing half-written is left.
    """
    public = public_file(name)
    present = [_present(into, file) for file in public.files]
    if None not in present:
        return [path for path in present if path is not None]
    targets = [Path(into) / file for file in public.files]
    filename = public.url.rpartition("/")[2]
    url = public.url if base_url is None else f"{base_url.rstrip('/')}/{filename}"
    with one_line_when_full(into):
        Path(into).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into) as temporary:
            download = Path(temporary) / filename
            _download(url, download, public.sha256)
            made = [Path(temporary) / f"{index}.made" for index in range(len(targets))]
            RECIPES[public.recipe](download, made)
            for source, target in zip(made, targets, strict=True):
                fsync_path(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
    return targets


def _present(root: str | Path, file: str) -> Path | None:
    """A set's file as it lies there, plain or packed; None if it does not."""
    return next((path for path in (Path(root, file), Path(root, file + ".gz")) if path.exists()), None)


def _download(url: str, path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
            length = response.headers.get("Content-Length")
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task(path.name, total=int(length) if length else None)
                while block := response.read(_BLOCK_BYTES):
                    file.write(block)
                    digest.update(block)
                    progress.advance(bar, len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise DataError(
            f"{url} could not be downloaded ({error}): check the network, or give a mirror by base_url"
        ) from None
    if digest.hexdigest() != sha256:
        raise DataError(
            f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: the file was changed or cut short; "
            "nothing of it was kept"
        )


@dataclass(frozen=True)
class FetchSource(Source):
    """A known public set, read from the folder that CAMBIA_DATA names."""

    dataset: str = ""
    """The set's name: tiny-shakespeare, enwik8, text8, humaneval, gsm8k, gsm8k-test."""

    PLACES: ClassVar[tuple[str, ...]] = ("dataset",)

    def __post_init__(self) -> None:
        super().__post_init__()
        public_file(self.dataset)

    def _files(self) -> FilesSource:
        root = os.environ.get("CAMBIA_DATA")
        if not root:
            raise DataError(
                "CAMBIA_DATA is not set; expected the folder that holds corpora: set it, then "
                f"`cambia data fetch {self.dataset}`"
            )
        public = public_file(self.dataset)
        for file in public.files:
            if _present(root, file) is None:
                raise DataError(
                    f"there is no {file} under CAMBIA_DATA={root}: "
                    f"`cambia data fetch {self.dataset}` brings it"
                )
        places = dict(zip(("path", "valid_path", "test_path"), public.files, strict=False))
        settings: dict[str, Any] = {key: str(Path(root, file)) for key, file in places.items()}
        return FilesSource(**settings, **public.reads)

    def own_splits(self) -> dict[str, Source]:
        own = self._files().own_splits()
        return {
            split: dataclasses.replace(source, filters=self.filters, plain=self.plain)
            for split, source in own.items()
        }

    def contents(self) -> dict[str, Any]:
        return {"reads": self._files().describe()}

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        return self._files().rows()
