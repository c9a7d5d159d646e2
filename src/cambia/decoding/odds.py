"""The distribution that a next token is drawn from: a model's logits, penalised, divided and cut.

`warped` does what the processors of `transformers` do one after the other, in their order, for rows of
different parameters at once, and so that gradients reach the parameters. What is cut off has no gradient: it
jumps. `soft_nucleus` is the same with a threshold that is itself drawn, for learning it.
"""

# B rows, V vocabulary; "..." any leading axes, such as (B,) or (B, T)

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from cambia.decoding.parameters import DecodingParameters

Number = float | Tensor
"""One for all rows, or (...,)."""


@dataclass(frozen=True, eq=False)
class RowParameters:
    """Decoding parameters of rows: each one number for all of them, or a tensor (...,)."""

    temperature: Number = 1.0
    top_p: Number = 1.0
    min_p: Number = 0.0
    top_k: Number = 0
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0

    @classmethod
    def of(cls, parameters: DecodingParameters) -> Self:
        """The same for all rows."""
        return cls(**{field.name: getattr(parameters, field.name) for field in fields(cls)})

    @classmethod
    def by_row(cls, rows: Sequence[DecodingParameters], device: torch.device | str = "cpu") -> Self:
        """Each row its own."""
        if all(row == rows[0] for row in rows):
            return cls.of(rows[0])
        names = [field.name for field in fields(cls)]
        return cls(
            **{name: torch.tensor([getattr(row, name) for row in rows], device=device) for name in names}
        )

    @property
    def reads_history(self) -> bool:
        """Whether it matters what stands in a row already."""
        return not (
            is_neutral(self.repetition_penalty, 1.0)
            and is_neutral(self.presence_penalty, 0.0)
            and is_neutral(self.frequency_penalty, 0.0)
        )


def is_neutral(value: Number, neutral: float) -> bool:
    """Whether a parameter does nothing; one with a gradient does something."""
    if isinstance(value, Tensor):
        return not value.requires_grad and bool((value == neutral).all())
    return value == neutral


@dataclass(frozen=True, eq=False)
class History:
    """What stands in each row already."""

    seen: Tensor
    """(..., V) bool: in the prompt, or written."""
    written: Tensor
    """(..., V): how often it was written."""


def penalised(logits: Tensor, given: RowParameters, history: History | None) -> Tensor:
    """Logits with the penalties for what stands there already.

    Args:
        logits: (..., V).
        history: needed where a penalty is not neutral.
    """
    if history is None or not given.reads_history:
        return logits
    if not is_neutral(given.repetition_penalty, 1.0):
        # Few of the tokens have been seen: only these are touched.
        places = history.seen.expand_as(logits).nonzero(as_tuple=True)
        seen, factor = logits[places], given.repetition_penalty
        if isinstance(factor, Tensor):
            factor = factor.expand(logits.shape[:-1])[places[:-1]]
        logits = logits.index_put(places, torch.where(seen < 0, seen * factor, seen / factor))
    if not is_neutral(given.presence_penalty, 0.0):
        logits = logits - _column(given.presence_penalty) * (history.written > 0)
    if not is_neutral(given.frequency_penalty, 0.0):
        logits = logits - _column(given.frequency_penalty) * history.written
    return logits


def warped(logits: Tensor, given: RowParameters, history: History | None = None) -> Tensor:
    """Logits of the distribution that is drawn from: -inf where a token is cut off.

    Args:
        logits: (..., V) of the model.

    Returns:
        (..., V). Rows of temperature 0 have one token left, the likeliest.
    """
    logits = cooled(penalised(logits, given, history), given.temperature)
    cuts = not is_neutral(given.top_p, 1.0) or not is_neutral(given.min_p, 0.0)
    if not cuts and is_neutral(given.top_k, 0):
        return logits
    return logits.masked_fill(~kept(logits.detach(), given), -math.inf)


def cooled(logits: Tensor, temperature: Number) -> Tensor:
    """Logits over the temperature; where that is 0, all but the likeliest at -inf."""
    if is_neutral(temperature, 1.0):
        return logits
    if not isinstance(temperature, Tensor):
        return logits / temperature if temperature else _likeliest(logits)
    column = temperature[..., None]
    greedy = column == 0
    if temperature.requires_grad or not bool(greedy.any()):  # one that is learned is never 0
        return logits / column
    return torch.where(greedy, _likeliest(logits), logits / torch.where(greedy, 1.0, column))


def _likeliest(logits: Tensor) -> Tensor:
    """0 at the first of the largest, -inf elsewhere."""
    chosen = torch.full_like(logits, -math.inf)
    return chosen.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)


def kept(logits: Tensor, given: RowParameters) -> Tensor:
    """(..., V) bool: the tokens that top-k, then top-p of those, then min-p leave."""
    ordered, order = logits.sort(dim=-1, descending=True)
    left: list[Tensor] = []
    if not is_neutral(given.top_k, 0):
        left.append(_first(ordered, given.top_k))
        ordered = ordered.masked_fill(~left[0], -math.inf)
    odds = ordered.softmax(-1)
    if not is_neutral(given.top_p, 1.0):
        # The least likely are dropped while what is dropped stays within 1 - p.
        dropped = odds.flip(-1).cumsum(-1).flip(-1)
        within = dropped > 1 - _column(given.top_p)
        within[..., 0] = True
        left.append(within | _all(given.top_p, 1.0, within))
    if not is_neutral(given.min_p, 0.0):
        left.append(odds >= _column(given.min_p) * odds[..., :1])
    inside = functools.reduce(torch.logical_and, left)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def _first(ordered: Tensor, count: Number) -> Tensor:
    """The first `count` of descending logits, and any that equal the last of them; 0: all."""
    size = ordered.shape[-1]
    if not isinstance(count, Tensor):
        return ordered >= ordered[..., min(int(count), size) - 1, None]
    place = count.long().clamp(1, size) - 1
    return (ordered >= ordered.gather(-1, place[..., None])) | (count == 0)[..., None]


def _all(value: Number, neutral: float, like: Tensor) -> Tensor:
    """Rows whose parameter is neutral lose nothing, not even to rounding."""
    if isinstance(value, Tensor):
        return (value == neutral)[..., None].expand_as(like)
    return torch.zeros_like(like)


def soft_nucleus(logits: Tensor, top_p: Tensor, width: float) -> Tensor:
    """Log-probabilities where the threshold of the nucleus is drawn anew for each token.

    The threshold u has a logistic distribution of `width` around the logit of `top_p`. A nucleus of the k
    likeliest tokens is what all u between their sums c(k-1) and c(k) give, so that

        P(token of rank r) = sum over k >= r of (F(c(k)) - F(c(k-1))) p(r) / c(k)

    with F the distribution of u: this has a gradient, to temperature and threshold, and for a small width is
    the distribution of top-p.

    Args:
        logits: (..., V), already over the temperature.
        top_p: (...,).

    Returns:
        (..., V) log-probabilities, none of them -inf.
    """
    odds = logits.softmax(-1)
    ordered, order = odds.sort(dim=-1, descending=True)
    total = ordered.cumsum(-1).clamp(max=1 - 1e-6)  # c(k)
    below = torch.sigmoid((torch.logit(total, 1e-6) - torch.logit(top_p, 1e-6)[..., None]) / width)
    below = torch.cat([below[..., :-1], torch.ones_like(below[..., :1])], -1)  # the last holds the rest
    share = below - torch.cat([torch.zeros_like(below[..., :1]), below[..., :-1]], -1)
    larger = (share / total).flip(-1).cumsum(-1).flip(-1)  # sum over k >= r
    drawn = (ordered * larger).clamp_min(torch.finfo(logits.dtype).tiny)
    logs = torch.zeros_like(drawn).scatter(-1, order, drawn.log())
    return logs - logs.logsumexp(-1, keepdim=True)


def _column(value: Number) -> Number:
    return value[..., None] if isinstance(value, Tensor) else value
