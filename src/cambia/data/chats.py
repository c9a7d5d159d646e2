"""Chats as tokens: what a tokenizer's chat template writes, and which part of it the assistant says.

A template writes a whole conversation. What is trained on of it is what the assistant has to write itself:
from where its turn begins (the template's generation prompt) to the special token that ends the turn. Each
stretch is encoded by itself, so that no token spans a border.

    >>> ids, trained = ChatEncoder(tokenizer)([("user", "What grows?"), ("assistant", "A tree.")])
    >>> tokenizer.hf.decode(ids[trained])
    'A tree.<|im_end|>'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers as rust
from jinja2 import TemplateError

from cambia.data.sources import ASSISTANT
from cambia.data.tokenizers import Tokenizer
from cambia.errors import DataError

Turns = Sequence[tuple[str, str]]
"""Role and content of each message."""


class ChatEncoder:
    """Writes chats by a tokenizer's chat template; without one, as lines "role: content".

    Args:
        tokenizer: its special tokens are read in what the template writes, and nowhere else.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._backend = rust.Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        added = tokenizer.hf.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]

    def __call__(self, turns: Turns) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, (N,) int64, and which of them are trained on, (N,) bool.

        Raises:
            DataError: a message contains a special token's text, which would pass for the real one, or the
                template does not write what the assistant says.
        """
        if self.tokenizer.hf.chat_template is None:
            lines = [((f"{role}: ", False), (f"{said}\n", role == ASSISTANT)) for role, said in turns]
            return _joined([(self.tokenizer.encode(text), counts) for line in lines for text, counts in line])
        for _, said in turns:
            fake = next((token for token in self._special if token in said), None)
            if fake is not None:
                raise DataError(
                    f"a message contains {fake!r}, which is a special token of the chat template: leave such "
                    "rows out, {type: regex} in the source's `filters`"
                )
        pieces = [(self._encode(text), counts) for text, counts in self._pieces(turns)]
        ids, trained = _joined(pieces)
        # The token that ends every document stands behind this one anyway.
        ended = len(ids) > 0 and ids[-1] == self.tokenizer.eos_id
        return (ids[:-1], trained[:-1]) if ended else (ids, trained)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _pieces(self, turns: Turns) -> Iterator[tuple[str, bool]]:
        """The text that the template writes, in stretches that are trained on and that are not."""
        messages = [{"role": role, "content": said} for role, said in turns]
        whole = self._written(messages)
        done = 0
        for i, (role, said) in enumerate(turns):
            if role != ASSISTANT:
                continue
            before = self._written(messages[:i], add_generation_prompt=True) if i else ""
            # Some templates write earlier turns otherwise once others follow: then the content tells alone.
            asked = len(before) > done and whole.startswith(before)
            found = whole.find(said.strip(), len(before) if asked else done)
            if found < 0:
                raise DataError(
                    f"the chat template does not write the message {said[:40]!r} as it is, so its place is "
                    "unknown: give such rows with instruction_field and output_field"
                )
            begin = len(before) if asked else found
            end = self._end(whole, found + len(said.strip()))
            yield whole[done:begin], False
            yield whole[begin:end], True
            done = end
        yield whole[done:], False

    def _written(self, messages: list[dict[str, str]], **settings: Any) -> str:
        try:
            return str(self.tokenizer.hf.apply_chat_template(messages, tokenize=False, **settings))
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses a chat of {', '.join(one['role'] for one in messages)}: {error}"
            ) from None

    def _end(self, text: str, place: int) -> int:
        """Where a turn ends: behind the special token that follows, if there is one."""
        marks = "|".join(re.escape(token) for token in self._special)
        mark = re.compile(rf"\s*(?:{marks})").match(text, place) if marks else None
        return mark.end() if mark else place


def _joined(pieces: Sequence[tuple[np.ndarray, bool]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([part for part, _ in pieces])
    return ids, np.concatenate([np.full(len(part), counts) for part, counts in pieces])
