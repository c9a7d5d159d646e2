"""Text that is already on every machine with Python and torch: four domains without a download.

english: plain sentences of the language reference (pydoc topics), readmes of installed packages, docstrings.
python: the standard library's own modules. cpp: torch's C++ headers. legal: license texts. Code comes without
its comments and docstrings, which are prose, and in one layout: a tab for each level in Python, two spaces
in C++.

One rule splits them all, by file: a module's docstrings (english) and its code (python) have one key
and fall on one side. The bytes differ between versions of Python and torch, so `describe` names them;
for runs that must be equal on every machine use generated text.

    >>> EmbeddedSource("cpp", limit_bytes=1_000_000).describe()["fallback"] is None
    True
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cambia.data import installed
from cambia.data.duplicates import LEAST_CHARS, normal_form
from cambia.data.generated import GeneratedSource
from cambia.data.installed import TextFile
from cambia.data.sources import Document, Source
from cambia.data.textfiles import entries

DOMAINS = ("english", "python", "cpp", "legal")
"""What an `EmbeddedSource` can give."""

_LEAST_BYTES = 50_000  # with less than this on the machine, generated text is the better corpus
_FALLBACK_TASK: dict[str, Any] = {
    "english": "counting",
    "python": "brackets",
    "cpp": "modular_arithmetic",
    "legal": "copy",
}


@dataclass(frozen=True)
class EmbeddedSource(Source):
    """Real text found on this machine; where it is missing generated text, as the description then says."""

    domain: Literal["english", "python", "cpp", "legal"] = "english"
    """english (plain sentences of documentation), python, cpp (C++ headers) or legal (license texts)."""
    limit_bytes: int | None = field(default=3_000_000, kw_only=True)
    """Read at most this many bytes of text (UTF-8); none reads everything that is there."""

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        tiers = self._tiers()
        if tiers is None:
            yield from self._fallback().rows()
            return
        documents = self._read(tiers)
        if self.domain == "legal":
            documents = _clauses(documents)
        for document in documents:
            yield document, {}

    def _tiers(self) -> list[list[TextFile]] | None:
        tiers = installed.DOMAINS[self.domain](installed.places())
        found = sum(file.size for tier in tiers for file in tier)
        return tiers if found >= _LEAST_BYTES else None

    def _read(self, tiers: list[list[TextFile]]) -> list[Document]:
        """As much as the limit asks for, by tiers; then in one order, so that any part is a fair sample."""
        found: list[Document] = []
        size = 0
        for file in (file for tier in tiers for file in sorted(tier, key=lambda file: _order(file.key))):
            if self.limit_bytes is not None and size >= self.limit_bytes:
                break
            for part, text in file.read():
                found.append(Document(text, file.key + part))
                size += len(text.encode("utf-8", "replace"))
        return sorted(found, key=lambda document: _order(document.key))

    def contents(self) -> dict[str, Any]:
        tiers = self._tiers()
        if tiers is None:
            generated = self._fallback()
            note = f"generated text ({generated.task}) in place of {self.domain}: none on this machine"
            return {"fallback": note, "generated": generated.describe()}
        listing = sorted((file.key, file.size) for tier in tiers for file in tier)
        return {
            "fallback": None,
            "reader": installed.READER_VERSION,
            "python": platform.python_version(),
            "files": len(listing),
            "listing_sha256": hashlib.sha256(repr(listing).encode("utf-8")).hexdigest(),
        }

    def _fallback(self) -> GeneratedSource:
        return GeneratedSource(task=_FALLBACK_TASK[self.domain], difficulty=2, size_bytes=1_000_000)


def _order(key: str) -> bytes:
    # Another hash than the one that splits: the first files of this order must not all be test files.
    return hashlib.sha256(f"order {key}".encode()).digest()


def _clauses(documents: list[Document]) -> list[Document]:
    """Licenses repeat each other: each line is kept where it stands first, so that no split echoes another.

    What is left is cut into entries with keys of their own, since some files collect many licenses.
    """
    seen: set[str] = set()
    kept = []
    for document in documents:
        lines = []
        for line in document.text.split("\n"):
            plain = normal_form(line)
            if len(plain) < LEAST_CHARS or plain not in seen:
                lines.append(line)
            seen.add(plain)
        whole = "\n".join(lines).strip()
        parts = entries(iter([whole]), target=1500)
        kept += [
            Document(text, f"{document.key}#{index}") for index, text in enumerate(parts) if len(text) >= 200
        ]
    return kept
