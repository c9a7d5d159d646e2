"""Whether words are words: what a model that writes bytes gets wrong, and no count of short runs sees."""

from __future__ import annotations

import functools
import gzip
import os
import re
from collections import Counter
from pathlib import Path

_WORD = re.compile(r"[^\W\d_]+")


@functools.cache
def known() -> frozenset[str]:
    """The words that come at least twice in the text that the WikiText model was trained on."""
    path = Path(os.environ["CAMBIA_DATA"]) / "wikitext-2/wiki.train.tokens.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        counts = Counter(word for line in file for word in _WORD.findall(line.lower()))
    return frozenset(word for word, count in counts.items() if count > 1)


def spelled(prompt: str, text: str) -> float:
    """The share of a text's words that are known, 0 to 1; the first and the last may be cut off."""
    words = _WORD.findall(text.lower())[1:-1]
    return sum(word in known() for word in words) / max(1, len(words))
