"""What the tests of README and docs share: the blocks of a page, the command line in this process."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    note: str
    """What the HTML comment right above it says."""


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, named from the root of the project."""
    found = _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["note"] or "") for match in found]


def run_python(page: str) -> Iterator[tuple[Block, str, Block | None]]:
    """Run the Python blocks of a page in one module; each, what it printed, and the block after it."""
    shown = blocks(page)
    names: dict[str, object] = {}
    for block, after in zip(shown, [*shown[1:], None], strict=True):
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(block.text, page, "exec"), names)
            yield block, printed.getvalue(), after


def commands(text: str) -> list[str]:
    """The lines of a console block that are typed."""
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


def cambia(command: str, *more: str) -> Said:
    """Run a line that begins with `cambia`, with further arguments, in this process."""
    from cambia.cli import main

    out, err = io.StringIO(), io.StringIO()
    arguments = [*shlex.split(command), *more]
    assert arguments[0] == "cambia", command
    with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            return Said(int(leaving.code or 0), out.getvalue(), err.getvalue())
