"""Rows to documents: what jsonl, JSON, parquet and Hub sets have in common.

A row is either one text field, or an instruction with an answer; then only the answer is trained on.

    >>> FilesSource("gsm8k.jsonl", instruction_field="question", output_field="answer")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cambia.data.sources import Document, Source, key_of, without_surrogates
from cambia.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class RowSource(Source):
    """A source whose text may come in rows with named fields."""

    field: str = "text"
    """The field of a row that holds its text."""
    instruction_field: str | None = None
    """The field with the instruction, shown and not trained on; set it together with output_field."""
    input_field: str | None = None
    """The field with the instruction's input, where there is one; shown and not trained on."""
    output_field: str | None = None
    """The field with the answer, which is trained on."""
    template: str = "{instruction}\n{input}\n"
    """How instruction and input are written before the answer; an empty input takes its line with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.instruction_field is None) != (self.output_field is None):
            raise ConfigError(
                f"instruction_field is {self.instruction_field!r} and output_field is "
                f"{self.output_field!r}; set both, or neither and use `field`"
            )
        try:
            self.template.format(instruction="", input="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"template {self.template!r} may name {{instruction}} and {{input}} only ({error})"
            ) from None

    def document(self, row: Any, place: str) -> Document:
        """The document of a row; `place` names the row in errors.

        Raises:
            DataError: the row is no mapping, or a field is missing or no text.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is a {type(row).__name__}; expected an object with named fields")
        if self.instruction_field is None or self.output_field is None:
            text = self._text(row, self.field, place)
            return Document(text, key_of(text))
        instruction = self._text(row, self.instruction_field, place)
        extra = "" if self.input_field is None else self._text(row, self.input_field, place)
        template = self.template if extra else self.template.replace("{input}\n", "").replace("{input}", "")
        prompt = template.format(instruction=instruction, input=extra)
        answer = self._text(row, self.output_field, place)
        # Keyed by the prompt: one question with two answers must not stand on both sides.
        return Document(prompt + answer, key_of(prompt), loss_from=len(prompt))

    def _text(self, row: Mapping[str, Any], field: str, place: str) -> str:
        if field not in row:
            raise DataError(
                f"{place} has no field {field!r}; its fields are {', '.join(map(str, row)) or 'none'}: set "
                "the source's `field`, or `instruction_field` and `output_field`"
            )
        value = row[field]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{place}: field {field!r} holds a {type(value).__name__}; expected text")
        return without_surrogates(value)
