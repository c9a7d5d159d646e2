"""What the rows of a file are, by the names of their fields: texts, instructions with answers, or chats.

>>> fields_of("questions.jsonl")
{'instruction_field': 'question', 'output_field': 'answer'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cambia.data.textfiles import ROW_SUFFIXES, list_files, read_rows
from cambia.errors import DataError

CHAT = "messages"
ASKED = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Fields with an instruction and its answer."""
TEXTS = ("text", "content")


def fields_of(path: str | list[str]) -> dict[str, str]:
    """The settings of a files source that name the fields of its rows; none for plain text.

    They are those of the first row: files of one source are alike.

    Raises:
        DataError: there is no such file, or its fields have names of their own.
    """
    for name, file in list_files(path):
        if not name.removesuffix(".gz").endswith(ROW_SUFFIXES):
            continue
        row, place = next(iter(read_rows(file)), (None, ""))
        if row is None:
            raise DataError(f"{file} holds no rows; expected text")
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is a {type(row).__name__}; expected an object with named fields")
        return _settings(row, str(file))
    return {}


def _settings(row: Mapping[str, Any], file: str) -> dict[str, str]:
    if isinstance(row.get(CHAT), list):
        return {"messages_field": CHAT}
    for asked, answer in ASKED:
        if isinstance(row.get(asked), str) and isinstance(row.get(answer), str):
            extra = {"input_field": "input"} if "input" in row else {}
            return {"instruction_field": asked, "output_field": answer, **extra}
    for field in TEXTS:
        if isinstance(row.get(field), str):
            return {"field": field}
    known = [CHAT, *(" and ".join(pair) for pair in ASKED), *TEXTS]
    raise DataError(
        f"{file} has rows with the fields {', '.join(map(str, row)) or 'none'}; expected {', '.join(known)}: "
        "name them in the source (field, or instruction_field and output_field, or messages_field)"
    )
