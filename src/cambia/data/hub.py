"""Sets from the Hugging Face Hub, streamed (extra: data).

>>> HubSource("roneneldan/TinyStories", valid_split="validation", limit_bytes=50_000_000)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cambia.data.rows import RowSource
from cambia.data.sources import TEST, VALID, Document, Source
from cambia.errors import ConfigError, DataError, MissingExtraError
from cambia.files import sha256_file


@dataclass(frozen=True)
class HubSource(RowSource):
    """A set on the Hugging Face Hub, or a local folder in a form that `datasets` reads."""

    dataset: str = ""
    """The set's name on the Hub ("owner/name"), or a local folder."""
    config: str | None = None
    """The set's configuration, where it has several."""
    revision: str | None = None
    """A commit of the set; without it a later version may give other text under the same name."""
    split: str = "train"
    """Which of the set's splits to read."""
    valid_split: str | None = None
    """The set's own validation split; without it documents are set aside by key."""
    test_split: str | None = None
    """The set's own test split; without it documents are set aside by key."""
    streaming: bool = True
    """Read over the network as needed; otherwise download the whole set first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset:
            raise ConfigError("a hub source needs `dataset`: its name on the Hub, owner/name")

    def own_splits(self) -> dict[str, Source]:
        given = {VALID: self.valid_split, TEST: self.test_split}
        return {
            name: dataclasses.replace(self, split=split, valid_split=None, test_split=None, limit_bytes=None)
            for name, split in given.items()
            if split
        }

    def contents(self) -> dict[str, Any]:
        folder = Path(self.dataset)
        if not folder.is_dir():
            return {}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {"files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}}

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        for number, row in enumerate(self._load(), start=1):
            yield self.document(row, f"{self.dataset} {self.split} row {number}"), row

    def _load(self) -> Any:
        try:
            load_dataset = import_module("datasets").load_dataset  # an extra: type checkers may not see it
        except ModuleNotFoundError:
            raise MissingExtraError.of("datasets", "data") from None
        try:
            return load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError) as error:  # unknown set, configuration or split; no network
            raise DataError(
                f"the set {self.dataset!r} (config {self.config}, split {self.split}) could not be opened: "
                f"{' '.join(str(error).split())}; without a network use a files source"
            ) from None
