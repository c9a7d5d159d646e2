"""Generated text: small tasks of any size, the same on every machine for one seed.

Each line is one exercise. Lines are sorted into 200 bins by their content and a document holds lines
of one bin, whose number is its key: so an exercise never stands in two splits.

    >>> next(GeneratedSource(task="reverse").documents()).text.splitlines()[0]
    'reverse: pqcsd > dscqp'
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cambia.data.sources import Document, Source
from cambia.errors import ConfigError

_BINS = 200
_LINES_PER_DOCUMENT = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = ("()", "[]", "{}")


@dataclass(frozen=True)
class GeneratedSource(Source):
    """Exercises written by a seeded generator."""

    task: Literal["copy", "reverse", "modular_arithmetic", "brackets", "counting"] = "copy"
    """What an exercise asks: copy or reverse letters, compute modulo, judge brackets, count on."""
    seed: int = 0
    """Another seed gives other exercises."""
    difficulty: int = 1
    """1 (short), 2 or 3 (long)."""
    size_bytes: int = 500_000
    """How much text to write, in bytes."""
    step: int | None = None
    """Of counting: count on by this much, down where it is negative; left out, each line has its own step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.difficulty not in (1, 2, 3):
            raise ConfigError(f"difficulty is {self.difficulty}; expected 1, 2 or 3")
        if self.size_bytes < 1:
            raise ConfigError(f"size_bytes is {self.size_bytes}; expected at least 1")
        if self.step is not None and (self.task != "counting" or not self.step):
            raise ConfigError(
                f"step is {self.step} of the task {self.task!r}; only counting takes a step, and not 0"
            )

    def rows(self) -> Iterator[tuple[Document, Mapping[str, Any]]]:
        stepping = "" if self.step is None else f" {self.step}"
        rng = random.Random(f"{self.task} {self.difficulty} {self.seed}{stepping}")
        write = TASKS[self.task] if self.step is None else partial(_counting_by, step=self.step)
        bins: dict[int, list[str]] = defaultdict(list)
        size = 0
        while size < self.size_bytes:
            line = write(rng, self.difficulty)
            size += len(line) + 1
            number = zlib.crc32(line.encode("utf-8")) % _BINS
            bins[number].append(line)
            if len(bins[number]) == _LINES_PER_DOCUMENT:
                yield self._document(number, bins.pop(number)), {}
        for number in sorted(bins):
            yield self._document(number, bins[number]), {}

    def _document(self, number: int, lines: list[str]) -> Document:
        return Document("\n".join(lines) + "\n", key=f"generated {self.task} {number}")

    def contents(self) -> dict[str, Any]:
        return {"generator": 1}


# Lines keep under twenty characters besides digits and marks, or differ in letters: so that no two
# different exercises count as near-duplicates of each other.


def _copy(rng: random.Random, difficulty: int) -> str:
    letters = _word(rng, difficulty)
    return f"copy: {letters} > {letters}"


def _reverse(rng: random.Random, difficulty: int) -> str:
    letters = _word(rng, difficulty)
    return f"reverse: {letters} > {letters[::-1]}"


def _word(rng: random.Random, difficulty: int) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 3 + 4 * difficulty)))


def _modular_arithmetic(rng: random.Random, difficulty: int) -> str:
    modulus = rng.randint(3, (12, 40, 99)[difficulty - 1])
    terms = [str(rng.randrange(modulus))]
    for _ in range(1 if difficulty == 1 else difficulty):
        terms += [rng.choice("+-*"[: difficulty + 1]), str(rng.randrange(modulus))]
    value, number = int(terms[0]), 0
    for sign, text in zip(terms[1::2], terms[2::2], strict=True):
        number = int(text)
        value = {"+": value + number, "-": value - number, "*": value * number}[sign] % modulus
    # Read from left to right, so that no rule of precedence has to be learned.
    return f"{' '.join(terms)} = {value} mod {modulus}"


def _brackets(rng: random.Random, difficulty: int) -> str:
    waiting: list[str] = []
    text = ""
    for _ in range(rng.randint(4, 8 * difficulty)):
        if waiting and rng.random() < 0.5:
            text += waiting.pop()
        else:
            opening, closing = rng.choice(_PAIRS[:difficulty])
            text += opening
            waiting.append(closing)
    balanced = text + "".join(reversed(waiting))
    if rng.random() < 0.5:
        return f"{balanced} yes"
    place = rng.randrange(len(balanced))
    broken = balanced[:place] + balanced[place + 1 :]  # an odd number of brackets never balances
    return f"{broken} no"


def _counting(rng: random.Random, difficulty: int) -> str:
    first, step = rng.randrange(10**difficulty), rng.randint(1, 9 * difficulty)
    if difficulty == 3 and rng.random() < 0.5:
        step = -step
    return _counted(first, step)


def _counting_by(rng: random.Random, difficulty: int, step: int) -> str:
    # A fixed step leaves fewer different lines, so the first number is drawn from a hundred times as many.
    return _counted(rng.randrange(10 ** (difficulty + 2)), step)


def _counted(first: int, step: int) -> str:
    return " ".join(str(first + index * step) for index in range(8))


TASKS: dict[str, Callable[[random.Random, int], str]] = {
    "copy": _copy,
    "reverse": _reverse,
    "modular_arithmetic": _modular_arithmetic,
    "brackets": _brackets,
    "counting": _counting,
}
