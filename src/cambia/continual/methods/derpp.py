"""Dark experience replay: rows of earlier tasks, and what the model said of them when it met them."""

# B batch (rows), T time, V vocabulary, k logits kept of a position

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from cambia.continual.methods.method import AnyStream, Contract, Situation
from cambia.continual.methods.replay import Replay
from cambia.data.batches import IGNORED, Batch
from cambia.data.replay import Offer, ReplayBuffer, Replayed
from cambia.errors import ConfigError


@dataclass
class DERPlusPlus(Replay):
    """DER++ (Buzzega et al. 2020, https://arxiv.org/abs/2004.07211).

    Beside the new rows two draws from the buffer train: one on its text, as in replay, and one whose logits
    are held to those that were stored with it. They share `fraction` evenly.
    """

    CONTRACT: ClassVar[Contract] = Contract(stores_text=True, chooses_rows=True)

    alpha: Annotated[float, Ge(0)] = 0.5
    """Weight of the squared distance to the stored logits, the mean over positions and kept tokens."""
    beta: Annotated[float, Ge(0)] = 1.0
    """Weight of a replayed row's text, where a new row's is 1; the paper weighs the mean over the draw."""
    logits: Annotated[int, Gt(0)] = 256
    """Logits kept of each position: the largest, or all of a vocabulary that is not larger."""

    def __post_init__(self) -> None:
        if self.text == "written":
            raise ConfigError(
                "derpp keeps what the model said of text it met: leave text at kept, or take replay"
            )

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._offer: Offer | None = None
        """The new rows that are to be kept, with their logits."""
        self._said: dict[int, Tensor] = {}
        """Their logits so far, (T, V) by row of the batch."""
        self._held: Replayed | None = None
        """The last rows of the batch, which are held to their stored logits."""
        self._weighted: Batch | None = None
        """The rows before these, where their text has a weight of its own."""

    def _buffer(self, seed: int) -> ReplayBuffer:
        return ReplayBuffer(
            self.capacity,
            seed=seed,
            budget_bytes=self.budget_bytes,
            quota=self.quota,
            logits=self.logits if self.alpha else None,
        )

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        self._offer, self._said, self._held, self._weighted = None, {}, None, None
        return super().batch(stream, stage, at)

    def _old_rows(self, count: int, present: int | None) -> list[Batch]:
        held = 0 if not self.alpha else count // 2 if self.beta else count
        read = self.buffer.sample(count - held, exclude_tag=present) if self.beta else None
        self._held = self.buffer.draw(held, present)
        if self.alpha or self.beta != 1:
            self._weighted = read
        # The model's own loss is to count the new rows; and old ones where nothing is weighed against them.
        rows = [] if read is None else [read if self._weighted is None else _unscored(read)]
        return rows if self._held is None else [*rows, _unscored(self._held.batch)]

    def _keep(self, new: Batch, tag: int) -> None:
        if self.alpha:
            self._offer = self.buffer.offer(new, tag)
        elif self.beta:
            self.buffer.add(new, tag)

    @property
    def needs_logits(self) -> bool:
        return any(what is not None for what in (self._offer, self._held, self._weighted))

    def penalty(self, batch: Batch, rows: slice, logits: Tensor) -> Tensor | None:
        self._take_in(rows, logits.detach(), last=rows.stop >= len(batch.input_ids))
        found = []
        end = len(batch.input_ids)
        if self._held is not None and self.alpha:
            end -= len(self._held.batch.input_ids)
            inside, theirs = _overlap(rows, end, len(batch.input_ids))
            if inside.start < inside.stop:
                found.append(self.alpha * self._distance(logits[inside], theirs))
        if self._weighted is not None:
            begin = end - len(self._weighted.input_ids)
            inside, theirs = _overlap(rows, begin, end)
            if inside.start < inside.stop:
                targets = self._weighted.targets[theirs].to(logits.device)
                nats = nn.functional.cross_entropy(
                    logits[inside].flatten(0, 1).float(),
                    targets.flatten(),
                    reduction="sum",
                    ignore_index=IGNORED,
                )
                found.append(self.beta * nats / int((batch.targets != IGNORED).sum()))
        return torch.stack(found).sum() if found else None

    def _distance(self, logits: Tensor, rows: slice) -> Tensor:
        """Squared distance to the stored logits of some of the held rows; of all rows it is the mean."""
        assert self._held is not None and self._held.logits is not None
        stored = self._held.logits
        values = stored.values[rows].to(logits.device)  # (rows, T, k)
        said = logits if stored.ids is None else logits.gather(-1, stored.ids[rows].to(logits.device))
        known = values.isfinite()  # a token that is never predicted has a logit of minus infinity
        return (said.float() - values).masked_fill(~known, 0.0).square().sum() / stored.values.numel()

    def _take_in(self, rows: slice, logits: Tensor, *, last: bool) -> None:
        """Remember the logits of the rows that are to be kept, and store them when all are there."""
        if self._offer is None:
            return
        for row in self._offer.rows.tolist():
            if rows.start <= row < rows.stop:
                self._said[row] = logits[row - rows.start].clone()  # a view would hold all of them
        if last:
            self.buffer.keep(self._offer, torch.stack([self._said[row] for row in self._offer.rows.tolist()]))
            self._said = {}


def _unscored(batch: Batch) -> Batch:
    """The same rows without a target."""
    return Batch(batch.input_ids, torch.full_like(batch.targets, IGNORED), 0, batch.source)


def _overlap(rows: slice, begin: int, end: int) -> tuple[slice, slice]:
    """Which of `rows` of a batch lie between begin and end: counted from rows.start, and from begin."""
    first, stop = max(rows.start, begin), max(min(rows.stop, end), begin)
    return slice(first - rows.start, stop - rows.start), slice(first - begin, stop - begin)
