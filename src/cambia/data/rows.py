"""Rows to documents: what jsonl, JSON, parquet and Hub sets have in common.

A row is one text field; or an instruction with an answer, and only the answer is trained on; or a chat, a
list of messages, and what the assistant says is trained on.

    >>> FilesSource("gsm8k.jsonl", instruction_field="question", output_field="answer")
    >>> FilesSource("chats.jsonl", messages_field="messages")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cambia.data.sources import ASSISTANT, Document, Source, key_of, without_surrogates
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

    messages_field: str | None = None
    """The field with a chat: a list of messages with `role` and `content`. The assistant's are trained on. It
    is written by the tokenizer's chat template, or as lines "role: content" where it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages_field is not None and self.output_field is not None:
            raise ConfigError(
                f"messages_field is {self.messages_field!r} and output_field is {self.output_field!r}: a row "
                "is a chat or an instruction with an answer, leave one out"
            )
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
        if self.messages_field is not None:
            return self._chat(row, self.messages_field, place)
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

    def _chat(self, row: Mapping[str, Any], field: str, place: str) -> Document:
        messages = row.get(field)
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(f"{place}: field {field!r} holds no list of messages with role and content")
        turns = tuple(
            (self._text(message, "role", place), self._text(message, "content", place))
            for message in messages
        )
        answers = [i for i, (role, _) in enumerate(turns) if role == ASSISTANT]
        asked = "".join(f"{content}\n" for _, content in turns[: answers[0] if answers else None])
        text = "".join(f"{content}\n" for _, content in turns)
        return Document(text, key_of(asked or text), loss_from=len(asked), turns=turns)

    def _text(self, row: Mapping[str, Any], field: str, place: str) -> str:
        if field not in row:
            raise DataError(
                f"{place} has no field {field!r}; its fields are {', '.join(map(str, row)) or 'none'}: set "
                "the source's `field`, or `instruction_field` and `output_field`, or `messages_field`"
            )
        value = row[field]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{place}: field {field!r} holds a {type(value).__name__}; expected text")
        return without_surrogates(value)
