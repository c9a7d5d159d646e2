"""Experience replay: rows of earlier tasks train beside the new ones."""

# B batch (rows), T time

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt

from cambia.continual.methods.drift import Drift
from cambia.continual.methods.method import AnyStream, Contract, Method, Situation
from cambia.data.batches import Batch
from cambia.data.replay import ReplayBuffer
from cambia.generation import written_rows


@dataclass
class Replay(Method):
    """Rows of earlier tasks in every batch: with a learning rate that re-warms and decays in each task, the
    simplest cure of forgetting and the one to beat (Ibrahim et al. 2024, https://arxiv.org/abs/2403.08763).

    Where the learner may not see where tasks end, rows of everything so far are replayed.
    """

    CONTRACT: ClassVar[Contract] = Contract(stores_text=True, chooses_rows=True)

    fraction: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Replayed rows as a share of the batch, once there are earlier ones; 0 switches replay off."""
    on_top: bool = False
    """Replayed rows come on top of a batch that keeps all of its new rows; else in the place of some."""
    capacity: Annotated[int, Gt(0)] | None = 2000
    """Sequences kept, a uniform sample of all that was seen."""
    budget_bytes: Annotated[int, Gt(0)] | None = None
    """Bytes that what is kept may take, as stored: tokens are compressed. In place of capacity, or beside
    it."""
    quota: bool = False
    """Keep as much of each task, instead of a sample in which long tasks weigh more."""
    text: Literal["kept", "written"] = "kept"
    """What is replayed: text that was seen, or rows that the model itself wrote at the end of each task; then
    no text is kept at all (Sun et al. 2020, https://arxiv.org/abs/1909.03329)."""
    drift: Drift | None = None
    """Let measured drift set the fraction, which is then only where it starts."""

    @property
    def contract(self) -> Contract:
        written = self.text == "written"
        return replace(
            self.CONTRACT, stores_text=not written, needs_boundaries=written or self.drift is not None
        )

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        self._buffer(seed=0).check(sequence_length, vocab_size)

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self.buffer = self._buffer(situation.seed)
        self._writing = torch.Generator().manual_seed(situation.seed)
        self._share = self.fraction
        if self.drift is not None:
            self.drift.begin()
        self._owed = Fraction(0)
        """Rows that are yet to be replayed; less than one."""

    def _buffer(self, seed: int) -> ReplayBuffer:
        return ReplayBuffer(self.capacity, seed=seed, budget_bytes=self.budget_bytes, quota=self.quota)

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        tag, present = (stage, stage) if stream.boundaries else (0, None)
        old: list[Batch] = []
        if self.buffer.holds_other_than(present):
            if self.drift is not None:
                self._share = self.drift.share(self.situation, self._share)
                self.extra_tokens += self.drift.spent()
            old = self._old_rows(self._rows_due(stream.batch_size), present)
        replaced = 0 if self.on_top else sum(len(batch.input_ids) for batch in old)
        new = stream.next_batch(stage, at=at, rows=stream.batch_size - replaced if replaced else None)
        if self.text == "kept" and self._replays:
            self._keep(new, tag)
        return together(new, *old)

    @property
    def _replays(self) -> bool:
        return self.fraction > 0 or self.drift is not None

    def _old_rows(self, count: int, present: int | None) -> list[Batch]:
        """What stands behind the new rows of a batch."""
        old = self.buffer.sample(count, exclude_tag=present)
        return [] if old is None else [old]

    def _keep(self, new: Batch, tag: int) -> None:
        """Offer new rows to the buffer."""
        self.buffer.add(new, tag)

    def _rows_due(self, batch_size: int) -> int:
        """Whole rows whose running total stays within one of the share; exact, without rounding error."""
        self._owed += Fraction(round(self._share * 1_000_000), 1_000_000) * batch_size
        rows = math.floor(self._owed)
        self._owed -= rows
        return rows

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        if self.text == "written" and self._replays:
            self._write(stream, stage)
        if self.drift is not None:
            probe = self.buffer.sample(self.drift.rows, only_tag=stage)
            if probe is not None:
                self.drift.keep(self.situation, probe)
                self.extra_tokens += self.drift.spent()

    def _write(self, stream: AnyStream, stage: int) -> None:
        """Fill this task's share of the buffer with what the model writes."""
        model = self.situation.model
        left = (self.capacity or 1000) // len(stream.stages)
        first = model.config.eos_token_id
        first = first[0] if isinstance(first, list) else first
        while left > 0:
            rows = min(left, 128)
            tokens = written_rows(
                model, rows, stream.sequence_length + 1, first=first or 0, generator=self._writing
            ).cpu()
            self.extra_tokens += tokens.numel() / 3
            self.buffer.add(Batch(tokens[:, :-1], tokens[:, 1:].clone(), 0, "written"), stage)
            left -= rows

    @property
    def replay_bytes(self) -> int:
        return self.buffer.num_bytes

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": self.buffer.state_dict(),
            "writing": self._writing.get_state(),
            "share": self._share,
            "owed": [self._owed.numerator, self._owed.denominator],
            "drift": self.drift.state_dict() if self.drift is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self._writing.set_state(state["writing"])
        self._share, self._owed = state["share"], Fraction(*state["owed"])
        if self.drift is not None:
            self.drift.load_state_dict(state["drift"])


def together(new: Batch, *old: Batch) -> Batch:
    """New rows, and old ones after them."""
    if not old:
        return new
    every = (new, *old)
    return Batch(
        torch.cat([batch.input_ids for batch in every]),
        torch.cat([batch.targets for batch in every]),
        sum(batch.num_bytes for batch in every),
        new.source,
    )
