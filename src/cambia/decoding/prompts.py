"""Beginnings of documents, and how they really go on: what decoding is learned and judged on."""

# N prompts, P tokens of the longest prompt, H tokens of what follows

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cambia.data.corpus import TokenFile
from cambia.errors import DataError
from cambia.generation import left_padded


@dataclass(frozen=True)
class Prompts:
    """Beginnings of documents, and how they really go on."""

    rows: Sequence[Sequence[int]]
    """N prompts of up to P tokens."""
    human: Sequence[Sequence[int]]
    """What stands behind each, up to as many tokens as are written."""
    documents: Sequence[int]
    """The number of the document that each is from."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> Prompts:
        """Some of them."""
        documents = [self.documents[i] for i in places]
        return Prompts([self.rows[i] for i in places], [self.human[i] for i in places], documents)

    def at_most(self, count: int) -> Prompts:
        """So many, from all over them; all where there are no more."""
        count = min(count, len(self))
        return self.take([i * len(self) // count for i in range(count)])

    @classmethod
    def joined(cls, several: Sequence[Prompts]) -> Prompts:
        """All of several; no document is in two of them."""
        documents: list[int] = []
        for prompts in several:
            known = max(documents, default=-1) + 1
            documents += [known + number for number in prompts.documents]
        human = [row for prompts in several for row in prompts.human]
        return cls([row for prompts in several for row in prompts.rows], human, documents)

    def batch(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of some, (N, P) each, padded on the left."""
        return left_padded([list(self.rows[i]) for i in places], padding=0)

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_tokens: int,
        new_tokens: int,
        context: int | None = None,
    ) -> Prompts:
        """The beginning of each text that is long enough.

        Args:
            texts: documents.
            prompt_tokens: P.
            new_tokens: of each continuation.
            context: what a model can read at most.

        Raises:
            DataError: no text is long enough, or prompt and continuation are longer than the context.
        """
        needed = _needed(prompt_tokens, new_tokens, context)
        rows = {i: list(tokenizer(text)["input_ids"])[:needed] for i, text in enumerate(texts)}
        rows = {i: row for i, row in rows.items() if len(row) == needed}
        if not rows:
            raise _too_short(len(texts), prompt_tokens, new_tokens)
        human = [row[prompt_tokens:] for row in rows.values()]
        return cls([row[:prompt_tokens] for row in rows.values()], human, list(rows))

    @classmethod
    def of_documents(
        cls,
        file: TokenFile,
        *,
        prompt_tokens: int,
        new_tokens: int,
        context: int | None = None,
        most: int = 4096,
    ) -> Prompts:
        """Prompts from prepared text.

        Of a document that is trained on as a whole each stretch of P + H tokens is one; of one that has an
        instruction, the end of the instruction and the answer.

        Args:
            prompt_tokens: P.
            new_tokens: H.
            context: what a model can read at most.
            most: at most so many, from all over the text.

        Raises:
            DataError: no document is long enough, or prompt and continuation are longer than the context.
        """
        needed = _needed(prompt_tokens, new_tokens, context)
        found = [
            (*pair, number)
            for number, (ids, trained) in enumerate(_documents(file))
            for pair in _pairs(ids, trained, prompt_tokens, needed)
        ]
        if not found:
            raise _too_short(file.num_documents, prompt_tokens, new_tokens)
        return cls(*zip(*found, strict=True)).at_most(most)


def parted(documents: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Places in two parts that have no document in common, the first with about a share of them.

    What is calibrated on one part and measured on the other would find the words of the same documents again.
    Where one document is nearly all there is, it is cut.

    Args:
        documents: the number of the document at each place.
        share: of the first part, 0 to 1.

    Returns:
        The places of both parts, each in order.
    """
    wanted, chosen, held = share * len(documents), set[int](), 0
    for number, size in sorted(Counter(documents).items(), key=lambda item: -item[1]):  # large ones first
        if held + size / 2 <= wanted:
            chosen.add(number)
            held += size
    places = range(len(documents))
    if held < wanted / 2 or len(documents) - held < (len(documents) - wanted) / 2:
        return list(places[: int(wanted)]), list(places[int(wanted) :])
    return [i for i in places if documents[i] in chosen], [i for i in places if documents[i] not in chosen]


def _documents(file: TokenFile) -> Iterator[tuple[list[int], np.ndarray | None]]:
    """Tokens of each document, the one that ends it included, and which of them are trained on."""
    ends = [*(file.starts[1:] - 1).tolist(), file.num_tokens - 1]
    for first, end in zip(file.starts.tolist(), ends, strict=True):
        places = np.arange(first, min(end + 1, file.num_tokens))
        yield file.ids(places).tolist(), None if file.mask is None else file.mask[places]


def _pairs(
    ids: list[int], trained: np.ndarray | None, prompt_tokens: int, needed: int
) -> Iterator[tuple[list[int], list[int]]]:
    if trained is None or trained[0]:
        text = ids[:-1]  # a stretch in the middle is not followed by an end either
        for first in range(0, len(text) - needed + 1, needed):
            yield text[first : first + prompt_tokens], text[first + prompt_tokens : first + needed]
        return
    answers = np.flatnonzero(trained)
    if len(answers) > 1:
        first = int(answers[0])
        rest = np.flatnonzero(trained[first:] == 0)
        stop = first + (int(rest[0]) if len(rest) else len(ids) - first)
        new_tokens = needed - prompt_tokens
        yield ids[max(0, first - prompt_tokens) : first], ids[first : min(stop, first + new_tokens)]


def _needed(prompt_tokens: int, new_tokens: int, context: int | None) -> int:
    needed = prompt_tokens + new_tokens
    if context is not None and needed > context:
        raise DataError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the {context} "
            "that the model reads: lower prompt_tokens or new_tokens"
        )
    return needed


def _too_short(documents: int, prompt_tokens: int, new_tokens: int) -> DataError:
    return DataError(
        f"none of {documents} texts has {prompt_tokens + new_tokens} tokens, {prompt_tokens} of prompt and "
        f"{new_tokens} to compare with: give longer texts, or lower prompt_tokens or new_tokens"
    )
