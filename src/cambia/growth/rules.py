"""Rules say what to do when a trigger fires, and the manager keeps them.

manager = GrowthManager(
    [GrowthRule(when=PlateauTrigger(patience=5), then=WidenFFN(factor=1.3), cooldown_steps=500)],
    model=model, optimizer=optimizer,
)
for batch in batches:
    ...                                   # forward, backward, optimizer.step()
    events = manager.step(signals)        # grows the model if a rule says so
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import PreTrainedModel

from cambia.config import Member
from cambia.errors import CheckpointError
from cambia.growth.barrier import grow
from cambia.growth.carry import Holder
from cambia.growth.operators import OPERATORS, Operator
from cambia.growth.rewarm import SliceWarmup
from cambia.growth.triggers import TRIGGERS, Trigger
from cambia.records import GrowthEvent, Signals


@dataclass
class GrowthRule:
    """When this, then that, within limits."""

    when: Annotated[Trigger, Member(TRIGGERS, "trigger")]
    """The trigger."""
    then: Annotated[Operator, Member(OPERATORS, "operator")]
    """The operator."""
    cooldown_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps after any growth of the model in which this rule does not act."""
    max_events: Annotated[int, Ge(0)] | None = None
    """How often this rule may grow the model; None: as often as it fires."""


class GrowthManager:
    """Asks the rules after every optimizer step and grows the model when one of them says so.

    Args:
        rules: asked in order; several may act at one step.
        model: the model to grow, in place.
        optimizer: grown along with it.
        holders: whatever else keeps state per parameter (see `cambia.growth.carry.Holder`).
        check_batch: (B, T) token ids on which each growth is verified; random ones by default.
        rewarm_steps: optimizer steps in which newborn entries come up to the full learning rate.
        seed: of new random weights.
        context: tokens per sequence, for the count of operations.
    """

    def __init__(
        self,
        rules: Sequence[GrowthRule] = (),
        *,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | None = None,
        holders: Sequence[Holder] = (),
        check_batch: Tensor | None = None,
        rewarm_steps: int = 100,
        seed: int = 0,
        context: int = 1024,
    ):
        self.rules = list(rules)
        self.model = model
        self.optimizer = optimizer
        self.check_batch = check_batch
        self.seed = seed
        self.context = context
        self.history: list[GrowthEvent] = []
        self.rewarm = SliceWarmup(optimizer, steps=rewarm_steps) if optimizer is not None else None
        self.holders = [*holders, *([self.rewarm] if self.rewarm is not None else [])]
        self._counts = [0] * len(self.rules)
        self._last_step: int | None = None

    def step(self, signals: Signals) -> list[GrowthEvent]:
        """Ask every rule once; returns the growth events of this step, mostly none.

        Raises:
            GrowthError: a rule's growth is illegal for the model or was rolled back.
        """
        events = []
        grown_before = self._last_step
        for i, rule in enumerate(self.rules):
            if rule.max_events is not None and self._counts[i] >= rule.max_events:
                continue
            if grown_before is not None and signals.step - grown_before <= rule.cooldown_steps:
                continue
            reason = rule.when.update(signals)
            if reason is not None:
                events.append(self._act(i, reason, signals))
        return events

    def _act(self, index: int, reason: str, signals: Signals) -> GrowthEvent:
        rule = self.rules[index]
        event = grow(
            self.model,
            rule.then,
            optimizer=self.optimizer,
            holders=self.holders,
            check_batch=self.check_batch,
            seed=self.seed + len(self.history),
            reason=reason,
            context=self.context,
        )
        event = dataclasses.replace(event, step=signals.step, tokens=signals.tokens)
        rule.when.reset()
        self._counts[index] += 1
        self._last_step = signals.step
        self.history.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Trigger states, counts and slices that are warming up; plain values and tensors."""
        return {
            "triggers": [rule.when.state_dict() for rule in self.rules],
            "counts": list(self._counts),
            "last_step": self._last_step,
            "num_events": len(self.history),
            "rewarm": self.rewarm.state_dict(self.model) if self.rewarm is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], history: Sequence[GrowthEvent] = ()) -> None:
        """Go on where `state_dict` was taken; the model must already have its grown shape.

        Args:
            history: the events so far, which the run's growth.jsonl holds.

        Raises:
            CheckpointError: the rules are not the ones that the state belongs to.
        """
        if len(state["triggers"]) != len(self.rules) or state["num_events"] != len(history):
            raise CheckpointError(
                f"the checkpoint holds {len(state['triggers'])} growth rules and {state['num_events']} "
                f"events, the run has {len(self.rules)} and {len(history)}: resume with the run's own "
                "config.yaml and growth.jsonl"
            )
        for rule, trigger_state in zip(self.rules, state["triggers"], strict=True):
            rule.when.load_state_dict(trigger_state)
        self._counts = list(state["counts"])
        self._last_step = state["last_step"]
        self.history = list(history)
        if self.rewarm is not None and state["rewarm"] is not None:
            self.rewarm.load_state_dict(state["rewarm"], self.model)
