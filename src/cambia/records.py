"""What crosses the floors: frozen records, and the one protocol that the loop asks.

Signals go up from the training loop to whoever decides (triggers, controllers); Knobs come down.
Nobody holds a reference to the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Measured:
    """One probe's value and the step at which it was measured, so that a reader can tell fresh from old."""

    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known after one optimizer step."""

    step: int
    """Optimizer steps done, 1 after the first."""
    tokens: int = 0
    """Training tokens seen so far."""
    flops: float = 0.0
    """Floating-point operations spent so far, by the shape that was current at each step."""
    progress: float = 0.0
    """The share of the planned run that is done, 0 to 1."""
    loss: float | None = None
    """Mean negative log-likelihood of this step's batch, nats per token, penalties excluded."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    """Global gradient norm before clipping."""
    values: Mapping[str, Measured] = field(default_factory=dict)
    """What probes said, by name: "validation_loss", a slice's loss, one's own."""

    def fresh(self, name: str) -> float | None:
        """The value of `name` if it was measured at this very step, else None.

        "loss", "grad_norm" and "learning_rate" are what the step itself said.
        """
        if name in ("loss", "grad_norm", "learning_rate"):
            return getattr(self, name)
        measured = self.values.get(name)
        return measured.value if measured is not None and measured.step == self.step else None


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a controller sets; the loop applies it at one line."""

    learning_rate_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a batch trains. The plain one: every row, every parameter."""

    train: bool = True
    rows: tuple[int, ...] | None = None
    """Which rows of the batch train; None: all."""
    parts: tuple[str, ...] = ()
    """Ids of the Parts that train; empty means the model's own parameters."""
    rate: float | None = None
    """The learning rate as a share of the highest one, by the phase of the Part; None: as scheduled."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What was measured while allocating; it joins Signals."""
    use: Mapping[str, int] | None = None
    """For each Part there is, how many rows of the batch are its own; None: it is not known, or the batch is
    not of the stream."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Something that was decided about a stream of text, or about a Part that learns from it."""

    what: str
    """novel · reopened · grew · turned down · released · consolidating · sealed · dropped."""
    part: str | None
    """Whom it concerns; None: nobody yet."""
    reason: str


@runtime_checkable
class Allocator(Protocol):
    """Decides what a batch trains. A state machine: it never trains."""

    def allocate(self, batch: Any, signals: Signals) -> Allocation: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class GrowthEvent:
    """One growth of a model: what was done, why, what it cost and whether it was exact."""

    operators: tuple[dict[str, Any], ...]
    """Each operator's name and fields, in the order in which they were applied."""
    reason: str
    parameters_before: int
    parameters_after: int
    flops_per_token_before: float
    flops_per_token_after: float
    exactness: str
    """What the operators declared: "tolerance" (equal up to rounding) or "none" (a jump was asked for)."""
    logit_error: float | None = None
    """max |after - before| / max |before| of the logits on the check batch; None if there was none."""
    loss_before: float | None = None
    """Loss on the check batch right before, nats per token."""
    loss_after: float | None = None
    check_flops: float = 0.0
    """Floating-point operations of verifying it: the check batch, before and after."""
    seconds: float = 0.0
    """Wall time of the whole event."""
    step: int = 0
    tokens: int = 0
    config_changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Config fields that changed: name -> (before, after)."""
    done: bool = True
    """False for a growth that was planned and left undone; the reason says why."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for growth.jsonl; the clock is left out, so that equal runs write equal lines."""
        values = asdict(self)
        del values["seconds"]
        return values

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> GrowthEvent:
        """The inverse of `as_dict`, from a line of growth.jsonl."""
        values: dict[str, Any] = dict(line)
        values["operators"] = tuple(values["operators"])
        return cls(**values)
