"""Drawing tokens inside `model.generate`: a processor of logits that leaves the token it has drawn on top.

A token is drawn by adding Gumbel noise to the log-odds and taking the largest, which is an exact draw, so
`generate` is told to take the likeliest. The noise is the processor's own: rows that share it (several
decoding parameters behind the same prompt) differ by their parameters alone, not by luck.
"""

# B rows, T time, V vocabulary, N rows of noise

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor

from cambia.decoding.odds import History, RowParameters, warped


def seed_of(seed: int, number: int) -> int:
    """The seed of one of many draws: the same pair gives the same, so none of their states has to be kept."""
    return hash((seed, number)) % 2**62


class Noise:
    """Gumbel noise, one tensor for each token that is written.

    Args:
        seed: of all of it.
        rows: (B,) which row of noise each row of the batch takes; each its own by default.
    """

    def __init__(self, seed: int, rows: Tensor | None = None):
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = rows

    def next(self, like: Tensor) -> Tensor:
        """(B, V)."""
        count = len(like) if self._rows is None else int(self._rows.max()) + 1
        drawn = torch.empty(count, like.shape[1]).exponential_(generator=self._generator).log_().neg_()
        return (drawn if self._rows is None else drawn[self._rows]).to(like)


class Drawing(LogitsProcessor):
    """Draws each token as decoding parameters say, for a whole call of `generate`.

    Args:
        given: the parameters of all rows, or a function that gives them anew for each token.
        noise: None: the likeliest token is taken.
        attention_mask: (B, T) of the prompts, so that padding counts as no token.
        odds: logits, parameters and what stands there already -> log-odds, (B, V).
    """

    def __init__(
        self,
        given: RowParameters | Callable[[], RowParameters],
        noise: Noise | None,
        attention_mask: Tensor | None = None,
        odds: Callable[[Tensor, RowParameters, History | None], Tensor] = warped,
    ):
        self.given, self.noise, self.attention_mask, self.odds = given, noise, attention_mask, odds
        self._history: History | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-odds with noise, (B, V).

        Args:
            input_ids: (B, T) prompts and what was written so far.
            scores: (B, V) the model's logits.
        """
        given = self.given if isinstance(self.given, RowParameters) else self.given()
        history = self._read(input_ids, scores.shape[1]) if given.reads_history else None
        logits = self.odds(scores, given, history)
        return logits if self.noise is None else logits + self.noise.next(logits)

    def _read(self, input_ids: Tensor, vocabulary: int) -> History:
        if self._history is None:
            self._history = history_of(input_ids, self.attention_mask, vocabulary)
        else:
            last = input_ids[:, -1:].clamp(max=vocabulary - 1)
            self._history.seen.scatter_(1, last, True)
            self._history.written.scatter_add_(1, last, torch.ones_like(last, dtype=torch.float32))
        return self._history


def history_of(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> History:
    """What stands in prompts (B, T): all of it seen, none of it written."""
    ids = input_ids.clamp(max=vocabulary - 1)  # a table may be larger than the head
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    # One place more takes what is padding, and is dropped.
    seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    seen.scatter_(1, torch.where(real, ids, vocabulary), True)
    return History(seen[:, :vocabulary], torch.zeros(len(ids), vocabulary, device=ids.device))
