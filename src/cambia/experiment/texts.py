"""Texts that a command is given by their paths, as tasks of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cambia.data.fields import fields_of
from cambia.data.textfiles import find_path
from cambia.errors import DataError


def tasks_of(
    data: Sequence[str | Path],
    known: Sequence[Mapping[str, Any]] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A task for each text, each once, and the names in the order in which they are read.

    Args:
        data: files or folders; one may come again.
        known: tasks that there are already.
        flags: dotted settings; where they name fields of a text's rows, these alone are read.

    Raises:
        DataError: a path is not there, or what its rows hold is not clear.
    """
    paths = [str(find_path(str(path)).resolve()) for path in data]
    old = {str(Path(task["source"]["path"]).resolve()): task["name"] for task in known}
    fresh = [path for path in dict.fromkeys(paths) if path not in old]
    names = old | dict(zip(fresh, _names(fresh, taken=list(old.values())), strict=True))
    new = [
        {"name": names[path], "source": {"type": "files", "path": path, **_fields(path, number, flags or {})}}
        for number, path in enumerate(fresh)
    ]
    return new, [names[path] for path in paths]


def _fields(path: str, number: int, flags: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a text's rows; where the user names some, these alone."""
    if any(name.startswith(f"data.tasks.{number}.source.") and name.endswith("field") for name in flags):
        return {}
    try:
        return fields_of(path)
    except DataError as error:
        told = str(error).replace("name them in the source (", f"name them (--data.tasks.{number}.source.")
        raise DataError(told) from None


def _names(paths: Sequence[str], taken: Sequence[str]) -> list[str]:
    """What texts are called: their file's name, with its folder's where two are alike."""
    short = [_stem(Path(path)) for path in paths]
    found: list[str] = []
    for path, name in zip(paths, short, strict=True):
        if short.count(name) > 1:
            name = f"{_stem(Path(path).parent)}-{name}"
        free, number = name, 1
        while free in found or free in taken:
            number += 1
            free = f"{name}-{number}"
        found.append(free)
    return found


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").partition(".")[0].replace("+", "_") or "text"
