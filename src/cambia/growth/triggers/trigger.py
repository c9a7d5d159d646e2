"""Triggers say when a model should grow.

A trigger reads `Signals` once per optimizer step and answers with a reason, or with None. It acts only
on fresh measurements and keeps a state that a checkpoint can hold.

    class Bored(Trigger):
        def update(self, signals):
            return "bored" if signals.step % 1000 == 0 else None

A trigger's dataclass fields are its configuration; fields with `init=False` are its state.

Here are those that look at the step, or at other triggers; beside this file those that watch measurements
(`watching`), and the one that weighs what a larger model would learn against what it costs (`efficiency`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from cambia.config import Member, Spelled
from cambia.errors import ConfigError
from cambia.records import Signals

TRIGGERS: dict[str, str] = {
    "schedule": "cambia.growth.triggers.trigger:ScheduleTrigger",
    "efficiency": "cambia.growth.triggers.efficiency:EfficiencyTrigger",
    "plateau": "cambia.growth.triggers.watching:PlateauTrigger",
    "perplexity": "cambia.growth.triggers.watching:PerplexityTrigger",
    "gradient_norm": "cambia.growth.triggers.watching:GradientNormTrigger",
    "loss_spike": "cambia.growth.triggers.watching:LossSpikeTrigger",
    "slice_spike": "cambia.growth.triggers.watching:SliceSpikeTrigger",
    "novelty": "cambia.growth.triggers.watching:NoveltyTrigger",
    "any": "cambia.growth.triggers.trigger:AnyOf",
    "all": "cambia.growth.triggers.trigger:AllOf",
    "majority": "cambia.growth.triggers.trigger:Majority",
}


@dataclass(frozen=True)
class Planned:
    """What a rule's growth would make of the model, for triggers that weigh it."""

    parameters_before: int
    """Of the layers, without embeddings and head."""
    parameters_after: int
    flops_per_token_before: float
    flops_per_token_after: float


class Trigger(Spelled, ABC):
    """Says when."""

    @abstractmethod
    def update(self, signals: Signals) -> str | None:
        """Take in what is known after a step; return a reason to grow, or None."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the measurements without which it can never fire; none unless overridden."""
        return frozenset()

    @property
    def reads(self) -> frozenset[str]:
        """Names of the fields of `Signals` that a loop of one's own has to tell; none unless overridden."""
        return frozenset()

    @property
    def needs_plan(self) -> bool:
        """Whether it weighs what the growth would come to, which `plan` tells it."""
        return False

    def plan(self, planned: Planned) -> None:
        """Learn what the growth that it decides on would come to.

        Asked only where `needs_plan`, before the first update and after every growth, also another rule's.
        """

    def reset(self) -> None:
        """Start afresh after it has fired. Does nothing unless overridden."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain values: the fields with `init=False`."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if not f.init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, copy.deepcopy(value))


@dataclass
class ScheduleTrigger(Trigger):
    """Fires once at each of the given marks, so that every machine grows at the same place.

    Exactly one kind of mark is given. For pretraining, marks inside the stable phase of a
    warm-up-stable-decay schedule are the best known choice (Bu 2025, arXiv:2511.04981; `cambia plan`).
    """

    at_steps: list[int] | None = None
    """Optimizer steps."""
    at_tokens: list[int] | None = None
    """Training tokens seen."""
    at_fractions: list[float] | None = None
    """Shares of the planned run, between 0 and 1."""
    passed: int = field(default=0, init=False)
    """How many marks lie behind."""

    def __post_init__(self) -> None:
        given = [marks for marks in (self.at_steps, self.at_tokens, self.at_fractions) if marks]
        if len(given) != 1:
            raise ConfigError("a schedule trigger takes exactly one of at_steps, at_tokens and at_fractions")
        if self.at_fractions and not all(0 < mark < 1 for mark in self.at_fractions):
            raise ConfigError(f"at_fractions={self.at_fractions} must lie between 0 and 1")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"tokens"} if self.at_tokens else {"progress"} if self.at_fractions else ())

    def update(self, signals: Signals) -> str | None:
        marks, now, unit = self._marks(signals)
        behind = sum(mark <= now for mark in marks)
        if behind <= self.passed:
            return None
        mark = sorted(marks)[behind - 1]
        self.passed = behind
        return f"schedule: {mark:g} {unit} reached"

    def steps(self, total: int, step_tokens: int) -> list[int]:
        """The steps after which it fires, ascending, in a run of `total` steps of so many tokens."""
        if self.at_steps:
            found = self.at_steps
        elif self.at_tokens:
            found = [-(-mark // step_tokens) for mark in self.at_tokens]
        else:
            found = [_first_step(mark, total) for mark in self.at_fractions or []]
        return sorted(step for step in found if step <= total)

    def _marks(self, signals: Signals) -> tuple[list[int] | list[float], float, str]:
        if self.at_steps:
            return self.at_steps, signals.step, "steps"
        if self.at_tokens:
            return self.at_tokens, signals.tokens, "tokens"
        return self.at_fractions or [], signals.progress, "of the run"


def _first_step(share: float, total: int) -> int:
    """The first step after which a run of so many has come so far; rounding up is a step off for some."""
    step = math.ceil(share * total)
    while step > 1 and (step - 1) / total >= share:
        step -= 1
    return step if step / total >= share else step + 1


# ---- several together ----------------------------------------------------------------------------


@dataclass
class Composite(Trigger):
    """Several triggers, of which enough must agree."""

    triggers: list[Annotated[Trigger, Member(TRIGGERS, "trigger")]]
    """The triggers; each has its own settings."""
    within_steps: Annotated[int, Ge(0)] = 100
    """For how many optimizer steps a trigger that fired counts as agreeing, since they seldom fire at one."""
    votes: dict[str, tuple[int, str]] = field(default_factory=dict, init=False)
    """Place of a trigger that fired -> when, and why."""

    def __post_init__(self) -> None:
        if not self.triggers:
            raise ConfigError(f"{type(self).__name__} takes at least one trigger in triggers=[...]")

    @property
    @abstractmethod
    def quorum(self) -> int:
        """How many must agree."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(trigger.needs for trigger in self.triggers))

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(trigger.reads for trigger in self.triggers))

    @property
    def needs_plan(self) -> bool:
        return any(trigger.needs_plan for trigger in self.triggers)

    def plan(self, planned: Planned) -> None:
        for trigger in self.triggers:
            if trigger.needs_plan:
                trigger.plan(planned)

    def update(self, signals: Signals) -> str | None:
        for place, trigger in enumerate(self.triggers):
            reason = trigger.update(signals)
            if reason is not None:
                self.votes[str(place)] = (signals.step, reason)
        self.votes = {
            place: vote for place, vote in self.votes.items() if signals.step - vote[0] <= self.within_steps
        }
        if len(self.votes) < self.quorum:
            return None
        reasons = "; ".join(reason for _, (_, reason) in sorted(self.votes.items()))
        self.votes = {}
        return f"{len(self.triggers)} asked: {reasons}" if self.quorum > 1 else reasons

    def reset(self) -> None:
        self.votes = {}
        for trigger in self.triggers:
            trigger.reset()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "triggers": [trigger.state_dict() for trigger in self.triggers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.votes = {place: (step, reason) for place, (step, reason) in state["votes"].items()}
        for trigger, inner in zip(self.triggers, state["triggers"], strict=True):
            trigger.load_state_dict(inner)


@dataclass
class AnyOf(Composite):
    """Fires when one of its triggers does."""

    @property
    def quorum(self) -> int:
        return 1


@dataclass
class AllOf(Composite):
    """Fires when all of its triggers have, within `within_steps` of each other."""

    @property
    def quorum(self) -> int:
        return len(self.triggers)


@dataclass
class Majority(Composite):
    """Fires when more than half of its triggers have, within `within_steps` of each other."""

    @property
    def quorum(self) -> int:
        return len(self.triggers) // 2 + 1
