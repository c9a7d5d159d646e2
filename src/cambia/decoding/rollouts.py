"""Writing behind the same prompts with many decoding parameters at once, and counting what that costs.

Candidates are rows of one batch. All that are written in one round continue the same prompts with the same
noise, so what differs between them is the parameters' doing (common random numbers).
"""

# N prompts, C candidates, D features

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia.decoding.drawing import Noise, seed_of
from cambia.decoding.odds import RowParameters
from cambia.decoding.parameters import DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards.reward import Samples
from cambia.generation import before_end, end_tokens
from cambia.nn.modes import evaluating

_ROWS = 512
"""Continuations in a batch."""


class Rollouts:
    """Continuations of prompts, as a policy writes them.

    Args:
        model: that writes; it is not changed.
        prompts: what is continued.
        new_tokens: at most so many are written behind each.
        policy: whose weights and head are used; its parameters are those where no others are given.
        writer: whose `generate` writes, as in `DecodingPolicy.generate`.
        seed: of the noise.
        is_frozen: whether the model stays what it is while it writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        *,
        new_tokens: int,
        policy: DecodingPolicy | None = None,
        writer: Any = None,
        seed: int = 0,
        is_frozen: bool = True,
    ):
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.new_tokens, self.policy, self.writer = new_tokens, policy or DecodingPolicy(), writer
        self.seed, self.is_frozen = seed, is_frozen
        self.tokens = 0
        """Written so far."""
        self._processed = 0
        self._ends = end_tokens(model, tokenizer)
        self._texts: dict[int, tuple[str, str]] = {}

    def with_policy(self, policy: DecodingPolicy) -> Rollouts:
        """The same behind the same prompts with another policy; what was decoded of them is shared."""
        other = copy.copy(self)
        other.policy, other.tokens = policy, 0
        return other

    def taken(self) -> int:
        """Tokens that have gone through the model, prompts included, since this was last asked."""
        taken, self._processed = self._processed, 0
        return taken

    def write(
        self, candidates: Sequence[DecodingParameters], places: Sequence[int], round_: int = 0
    ) -> list[Samples]:
        """What each of C candidates writes behind some of the prompts.

        Args:
            candidates: C of them.
            places: which of the prompts.
            round_: the noise of another round is another.
        """
        at_once = max(1, _ROWS // len(places))
        found: list[Samples] = []
        for first in range(0, len(candidates), at_once):
            some = candidates[first : first + at_once]
            rows = self._written(some, places, round_)
            for number in range(len(some)):
                mine = rows[number * len(places) : (number + 1) * len(places)]
                found.append(self._samples(mine, places))
        return found

    def read(self, rows: Sequence[list[int]], places: Sequence[int]) -> Samples:
        """What somebody else wrote behind prompts: tokens of each, up to the end of a text."""
        return self._samples([before_end(row, self._ends) for row in rows], places)

    def human(self, places: Sequence[int]) -> Samples:
        """The documents' own continuations, as if they had been written."""
        return self.read([list(self.prompts.human[i]) for i in places], places)

    def _written(
        self, candidates: Sequence[DecodingParameters], places: Sequence[int], round_: int
    ) -> list[list[int]]:
        input_ids, mask = self.prompts.batch(places)
        copies = len(candidates)
        shared = torch.arange(len(places)).repeat(copies)
        by_row = [candidate for candidate in candidates for _ in places]
        tokens = self.policy.written(
            self.model,
            input_ids.repeat(copies, 1).to(self.model.device),
            mask.repeat(copies, 1).to(self.model.device),
            Noise(seed_of(self.seed, round_), shared),
            given=RowParameters.by_row(by_row, self.model.device),
            writer=self.writer,
            max_new_tokens=self.new_tokens,
        )
        new: list[list[int]] = tokens[:, input_ids.shape[1] :].tolist()
        ended = [before_end(row, self._ends) for row in new]
        written = sum(min(len(row) + 1, self.new_tokens) for row in ended)
        self.tokens += written
        self._processed += written + copies * int(mask.sum())
        return ended

    def _samples(self, rows: Sequence[list[int]], places: Sequence[int]) -> Samples:
        known = [self._known(place) for place in places]
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        return Samples([prompt for prompt, _ in known], texts, rows, [human for _, human in known])

    def _known(self, place: int) -> tuple[str, str]:
        if place not in self._texts:
            pair = self.prompts.rows[place], self.prompts.human[place]
            prompt, human = (str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in pair)
            self._texts[place] = prompt, human
        return self._texts[place]


@torch.no_grad()
def text_features(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rows: int = 64
) -> Tensor:
    """What a frozen model makes of texts, (N, D): its last hidden state, averaged over a text's tokens."""
    body: Any = model.base_model
    found = []
    for first in range(0, len(texts), rows):
        ids = [list(tokenizer(text)["input_ids"]) or [0] for text in texts[first : first + rows]]
        input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
        with evaluating(model):
            states = body(  # padded on the right: every token keeps the position that it has alone
                input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).last_hidden_state
        weights = mask.to(states)[..., None]
        found.append(((states * weights).sum(1) / weights.sum(1)).float().cpu())
    return torch.cat(found)
