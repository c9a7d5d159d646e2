"""Filters: which of a source's documents are kept.

A filter sees a document's text and, where the text came from a row (jsonl, parquet, the Hub), the row.

    >>> LanguageFilter(script="cyrillic").keep("Привет, world", {})
    False
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cambia.config import did_you_mean
from cambia.errors import ConfigError, DataError

# Ranges of letters as regular-expression classes; enough to tell scripts apart, not languages.
SCRIPTS = {
    "latin": r"A-Za-zªºÀ-ÖØ-öø-ɏ\u1e00-\u1eff",
    "greek": "Ͱ-Ͽἀ-῿",
    "cyrillic": "Ѐ-ԯ",
    "hebrew": "א-ת",
    "arabic": "ؠ-ۿݐ-ݿ",
    "devanagari": "ऀ-ॿ",
    "han": "㐀-䶿一-鿿",
    "kana": "ぁ-ゟァ-ヿ",
    "hangul": "가-힣",
}
"""Letters of each script, by Unicode range."""


class Filter(ABC):
    """Says whether a document is kept."""

    @abstractmethod
    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        """Whether to keep a document; `row` holds the fields it came with, empty for plain text."""


@dataclass(frozen=True)
class LanguageFilter(Filter):
    """Keeps text written mostly in one script, or with the letters of one alphabet.

    Counts letters only (digits, punctuation and white space say nothing). Languages that share a
    script are told apart as far as their alphabets differ, which is not far: a rough sieve by design.
    """

    script: str = "latin"
    """latin, greek, cyrillic, hebrew, arabic, devanagari, han, kana or hangul."""
    alphabet: str = ""
    """The letters that count, both cases, in place of a script: "abcdefghijklmnopqrstuvwxyzäöüß"."""
    min_share: float = 0.8
    """The least share of the letters that must belong to the script, 0 to 1."""

    def __post_init__(self) -> None:
        if self.script not in SCRIPTS:
            raise ConfigError(f"script {self.script!r} is not known{did_you_mean(self.script, SCRIPTS)}")
        if not 0 <= self.min_share <= 1:
            raise ConfigError(f"min_share is {self.min_share}; expected a share from 0 to 1")

    @cached_property
    def _wanted(self) -> re.Pattern[str]:
        both_cases = re.escape(self.alphabet.lower() + self.alphabet.upper())
        return re.compile(f"[{both_cases or SCRIPTS[self.script]}]")

    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        letters = len(_LETTER.findall(text))
        return letters > 0 and len(self._wanted.findall(text)) >= self.min_share * letters


_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class LengthFilter(Filter):
    """Keeps documents of a length within limits."""

    min_chars: int = 0
    """The fewest characters a document may have."""
    max_chars: int | None = None
    """The most characters a document may have; none means no limit."""

    def __post_init__(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")

    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        return self.min_chars <= len(text) and (self.max_chars is None or len(text) <= self.max_chars)


@dataclass(frozen=True)
class LicenseFilter(Filter):
    """Keeps rows whose license field names one of the allowed licenses (upper and lower case alike)."""

    field: str = "license"
    """The field of the row that names the license, or a list of them (then all must be allowed)."""
    allow: tuple[str, ...] = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
    """The licenses that are kept."""

    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        found = _value(row, self.field, "license")
        named = [str(name).lower() for name in (found if isinstance(found, list | tuple) else [found])]
        allowed = {name.lower() for name in self.allow}
        return bool(named) and all(name in allowed for name in named)


@dataclass(frozen=True)
class FieldFilter(Filter):
    """Keeps rows whose field has a value: one skill, one language, one source of a mixed file."""

    field: str = ""
    """The field of the row."""
    value: str = ""
    """The value that is kept; a number or a truth value is compared as it is written (3, True)."""

    def __post_init__(self) -> None:
        if not self.field:
            raise ConfigError("a field filter needs `field`, the name of a row's field, and `value`")

    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        return str(_value(row, self.field, "field")) == self.value


@dataclass(frozen=True)
class RegexFilter(Filter):
    """Keeps, or drops, documents in which a regular expression is found (Python syntax, line by line)."""

    keep_pattern: str | None = None
    """Only documents in which this is found are kept."""
    drop_pattern: str | None = None
    """Documents in which this is found are dropped."""

    def __post_init__(self) -> None:
        _ = self._wanted, self._unwanted  # a broken pattern is refused now, not at the first document

    @cached_property
    def _wanted(self) -> re.Pattern[str] | None:
        return _compile("keep_pattern", self.keep_pattern)

    @cached_property
    def _unwanted(self) -> re.Pattern[str] | None:
        return _compile("drop_pattern", self.drop_pattern)

    def keep(self, text: str, row: Mapping[str, Any]) -> bool:
        if self._wanted is not None and not self._wanted.search(text):
            return False
        return self._unwanted is None or not self._unwanted.search(text)


def _value(row: Mapping[str, Any], field: str, kind: str) -> Any:
    if field not in row:
        raise DataError(
            f"the {kind} filter found no field {field!r}; the row's fields are "
            f"{', '.join(row) or 'none: plain text has no fields'}: set the filter's `field`"
        )
    return row[field]


def _compile(name: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ConfigError(f"{name} {pattern!r} is not a regular expression: {error}") from None
