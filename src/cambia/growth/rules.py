"""Rules say what to do when a trigger fires, and the manager keeps them.

In anybody's loop, after the optimizer's step:

    manager = GrowthManager(
        [GrowthRule(when=PlateauTrigger(patience=5), then=WidenFFN(factor=1.3), cooldown_steps=500)],
        model=model, optimizer=optimizer,
    )
    for batch in batches:
        ...                                                    # forward, backward, optimizer.step()
        manager.step(loss=loss.item(), validation_loss=score)  # grows the model if a rule says so
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from transformers import PreTrainedModel

from cambia.config import Member
from cambia.errors import CheckpointError, ConfigError, GrowthError
from cambia.growth.barrier import grow
from cambia.growth.carry import Holder, Moments
from cambia.growth.operators import OPERATORS, Operator, PartOperator
from cambia.growth.plan import GrowthPlan, plan_growth
from cambia.growth.rewarm import SliceWarmup, refuse_unwarmed
from cambia.growth.triggers import TRIGGERS, Trigger
from cambia.models.bodies import count_parameters, flops_per_token
from cambia.records import GrowthEvent, Measured, Signals

Approval = Callable[[GrowthPlan, str], bool]
"""(what would be done, why) -> whether it may be done."""


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
    """How often this rule may grow the model; None: as often as it fires, or once where the operator says
    `to=`, which is then reached."""
    rearm_steps: Annotated[int, Ge(0)] = 0
    """Once it has acted, it acts again only after its trigger was silent for this many optimizer steps."""
    enabled: bool = True
    """False leaves the rule out."""

    def __post_init__(self) -> None:
        if self._reaches_once and (self.max_events or 0) > 1:
            raise ConfigError(
                f"max_events={self.max_events} contradicts to= of {type(self.then).__name__}, which the "
                "first event reaches: leave max_events out, or grow by factor= or add="
            )

    @property
    def _reaches_once(self) -> bool:
        return getattr(self.then, "to", None) is not None

    @property
    def most_events(self) -> int | None:
        """How often this rule can grow the model; None: there is no limit."""
        return 1 if self.max_events is None and self._reaches_once else self.max_events


@dataclass(frozen=True)
class Budget:
    """How large a model may become; a growth beyond it is not done."""

    parameters: Annotated[int, Gt(0)] | None = None
    """All parameters."""
    flops_per_token: Annotated[float, Gt(0)] | None = None
    """Floating-point operations of one training step, per token."""
    memory_mib: Annotated[float, Gt(0)] | None = None
    """Weights, gradients and two moments of the optimizer in the weights' own precision, MiB."""

    def broken_by(self, parameters: int, flops_per_token: float, bytes_per_value: int = 4) -> str | None:
        """Which limit a model of this size is beyond, in words; None where there is room."""
        memory = 4 * parameters * bytes_per_value / 2**20
        if self.parameters is not None and parameters > self.parameters:
            return f"{parameters:,} parameters, the budget is {self.parameters:,}"
        if self.flops_per_token is not None and flops_per_token > self.flops_per_token:
            return f"{flops_per_token:.3g} FLOPs per token, the budget is {self.flops_per_token:.3g}"
        if self.memory_mib is not None and memory > self.memory_mib:
            return f"{memory:,.0f} MiB, the budget is {self.memory_mib:,.0f} MiB"
        return None


_SIGNALS_TOLD = {"tokens": "all that were trained on so far", "progress": "the share of the run that is over"}
_SIGNAL_FIELDS = {f.name for f in dataclasses.fields(Signals)} - {"values"}


class GrowthManager:
    """Asks the rules after every optimizer step and grows the model when one of them says so.

    Args:
        rules: asked in order; several may act at one step.
        model: the model to grow, in place; left out, `attach` names it, as `Trainer` does.
        optimizer: grown along with it.
        holders: whatever else keeps state per parameter (see `cambia.growth.carry.Holder`).
        check_batch: (B, T) token ids on which each growth is verified; random ones by default.
        rewarm_steps: optimizer steps in which newborn entries come up to their full learning rate.
        newborn_rate: their full rate, as a multiple of that of the entries beside them.
        moments: what becomes of the optimizer's state (see `cambia.growth.carry.OptimizerHolder`).
        seed: of new random weights.
        context: tokens per sequence, for the count of operations; left out, those of the batches that
            `Trainer` reads, elsewhere 1024.
        budget: how large the model may become.
        approve: asked before each growth with its plan and its reason; False leaves the model as it is.
        dry_run: record what would be done and do none of it.
    """

    def __init__(
        self,
        rules: Sequence[GrowthRule] = (),
        *,
        model: PreTrainedModel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        holders: Sequence[Holder] = (),
        check_batch: Tensor | None = None,
        rewarm_steps: int = 100,
        newborn_rate: float = 1.0,
        moments: Moments = "mean",
        seed: int = 0,
        context: int | None = None,
        budget: Budget | None = None,
        approve: Approval | None = None,
        dry_run: bool = False,
    ):
        self.rules = list(rules)
        self.model: PreTrainedModel | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.check_batch = check_batch
        self.moments: Moments = moments
        self.seed = seed
        self.context = context
        self.budget = budget or Budget()
        self.approve = approve
        self.dry_run = dry_run
        self.history: list[GrowthEvent] = []
        self.rewarm: SliceWarmup | None = None
        self.rewarm_steps, self.newborn_rate = rewarm_steps, newborn_rate
        self.holders = list(holders)
        self._counts = [0] * len(self.rules)
        self._spent = [rule.max_events == 0 for rule in self.rules]
        self._last_fired: list[int | None] = [None] * len(self.rules)
        self._last_growth: int | None = None
        self._planned: list[int | None] = [None] * len(self.rules)  # after how many growths
        self._steps = 0
        self._checked = False
        if model is not None:
            self.attach(model, optimizer)

    def attach(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> None:
        """Name the model to grow and its optimizer."""
        self.model, self.optimizer = model, optimizer
        if optimizer is not None:
            self.rewarm = SliceWarmup(optimizer, steps=self.rewarm_steps, factor=self.newborn_rate)
            self.holders.append(self.rewarm)

    def join(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Be used by a loop that trains this model by this optimizer.

        Raises:
            ConfigError: it was made for others.
        """
        if self.model is None or (self.model is model and self.optimizer is None):
            self.attach(model, optimizer)
        elif self.model is not model or self.optimizer is not optimizer:
            raise ConfigError(
                "the growth manager was made for another model or optimizer than what is trained: leave out "
                "its model= and optimizer=, and the trainer names them"
            )

    @property
    def _context(self) -> int:
        return self.context or 1024

    def _grown_model(self) -> PreTrainedModel:
        if self.model is None:
            raise ConfigError("this growth manager has no model yet: GrowthManager(rules, model=...)")
        return self.model

    def check(self, measured: Collection[str] | None = None) -> None:
        """Refuse, before training, what could not work later. The first `step` does it where nobody did.

        Args:
            measured: the names of all that will be measured; None where that is not known.

        Raises:
            ConfigError: the model is beyond the budget already, or a trigger reads what nobody measures.
            GrowthError: a rule's growth is illegal for the model, also when the other rules have acted
                once; or the optimizer trains nothing of the model.
        """
        self._checked = True
        model = self._grown_model()
        over = self.budget.broken_by(
            count_parameters(model), flops_per_token(model, self._context), model.dtype.itemsize
        )
        if over:
            raise ConfigError(f"the model is beyond the budget before it has grown: {over}")
        in_place = [rule for rule in self.rules if not isinstance(rule.then, PartOperator)]
        if self.optimizer is not None and in_place:
            owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if not any(id(p) in owned for p in model.parameters()):
                raise GrowthError(
                    "the optimizer trains no parameter of this model: build it with model.parameters()"
                )
        rules = [rule for rule in self.rules if rule.enabled and rule.max_events != 0]
        for rule in rules if measured is not None else []:
            missing = sorted(rule.when.needs - set(measured or ()))
            if missing:
                raise ConfigError(
                    f"{type(rule.when).__name__} reads {missing[0]!r}, which nothing measures here; measured "
                    f"are {', '.join(sorted(measured or ()))} (--evaluation.every_steps and "
                    "--evaluation.slices switch measurements on)"
                )
        self._plan_all([rule.then for rule in rules])

    def _plan_all(self, operators: list[Operator]) -> None:
        """Each operator must be legal for the model as it is, or once the others have acted."""
        start = latest = self._grown_model()
        while operators:
            problems: dict[int, GrowthError] = {}
            for i, operator in enumerate(operators):
                try:
                    latest = self._legal(latest, operator).after
                except GrowthError as error:
                    try:
                        self._legal(start, operator)
                    except GrowthError:
                        problems[i] = error
            if len(problems) == len(operators):
                raise problems[0]
            operators = [operators[i] for i in problems]

    def _legal(self, model: PreTrainedModel, operator: Operator) -> GrowthPlan:
        plan = plan_growth(model, operator, context=self._context)
        refuse_unwarmed(plan, self.holders)
        return plan

    def step(self, signals: Signals | None = None, **measured: float | None) -> list[GrowthEvent]:
        """Ask every rule once; returns the growth events of this step, mostly none.

        Args:
            signals: what is known. Left out, they are made from the named values: `step` (counted by
                the manager where it is not given), `tokens`, `flops`, `progress`, `loss`, `grad_norm`
                and `learning_rate` are what they are in `Signals`, every other name is a measurement
                taken at this step. None means not measured.

        Raises:
            GrowthError: a rule's growth is illegal for the model or was rolled back.
        """
        if signals is None:
            signals = self._signals(measured)
        elif measured:
            raise ConfigError(f"give signals or named values, not both: {', '.join(measured)}")
        if not self._checked:
            self.check()
        self._steps = signals.step
        events = []
        grown_before = self._last_growth
        for i, rule in enumerate(self.rules):
            if not rule.enabled or self._spent[i]:
                continue
            if grown_before is not None and signals.step - grown_before <= rule.cooldown_steps:
                continue
            if rule.when.needs_plan and self._planned[i] != (growths := self._growths()):
                try:
                    plan = plan_growth(self._grown_model(), rule.then, context=self._context)
                except GrowthError:  # another rule has done it: there is nothing left to weigh
                    self._spent[i] = True
                    continue
                rule.when.plan(plan.planned)
                self._planned[i] = growths
            reason = rule.when.update(signals)
            if reason is not None and self._armed(i, signals.step):
                events.append(self._act(i, reason, signals))
        return events

    def _signals(self, measured: Mapping[str, float | None]) -> Signals:
        for rule in self.rules:
            untold = sorted(name for name in rule.when.reads if measured.get(name) is None)
            if rule.enabled and untold:
                raise ConfigError(
                    f"{type(rule.when).__name__} reads {untold[0]}, which nobody has told: "
                    f"manager.step({untold[0]}=...), {_SIGNALS_TOLD[untold[0]]}"
                )
        given: dict[str, Any] = {"step": self._steps + 1}
        values = {}
        for name, value in measured.items():
            if value is None:
                continue
            if name in _SIGNAL_FIELDS:
                given[name] = value
            else:
                values[name] = value
        if self.optimizer is not None:
            given.setdefault("learning_rate", float(self.optimizer.param_groups[0]["lr"]))
        step = int(given["step"])
        return Signals(**given, values={name: Measured(value, step) for name, value in values.items()})

    def _growths(self) -> int:
        return sum(event.done for event in self.history)

    def _armed(self, index: int, step: int) -> bool:
        """Whether a rule whose trigger has just fired may act."""
        before, self._last_fired[index] = self._last_fired[index], step
        return self._counts[index] == 0 or before is None or step - before > self.rules[index].rearm_steps

    def _act(self, index: int, reason: str, signals: Signals) -> GrowthEvent:
        rule = self.rules[index]
        event = self._grown(index, reason)
        event = dataclasses.replace(event, step=signals.step, tokens=signals.tokens)
        rule.when.reset()
        if event.done or self.dry_run:
            self._counts[index] += 1
            self._last_growth = signals.step
            self._spent[index] |= rule.most_events is not None and self._counts[index] >= rule.most_events
        self.history.append(event)
        return event

    def _grown(self, index: int, reason: str) -> GrowthEvent:
        model, operator = self._grown_model(), self.rules[index].then
        if self.budget != Budget() or self.approve is not None or self.dry_run:
            plan = plan_growth(
                model,
                operator,
                context=self._context,
                seed=self.seed + len(self.history),
                check_batch=self.check_batch,
            )
            over = self.budget.broken_by(
                plan.parameters_after, plan.flops_per_token_after, model.dtype.itemsize
            )
            if over:
                self._spent[index] = True  # a budget does not come back
                return plan.event(f"{reason}; not done: {over}", done=False)
            if self.dry_run:
                return plan.event(f"{reason}; not done: dry run", done=False)
            if self.approve is not None and not self.approve(plan, reason):
                return plan.event(f"{reason}; not done: not approved", done=False)
        return grow(
            model,
            operator,
            optimizer=self.optimizer,
            holders=self.holders,
            check_batch=self.check_batch,
            seed=self.seed + len(self.history),
            moments=self.moments,
            reason=reason,
            context=self._context,
        )

    def state_dict(self) -> dict[str, Any]:
        """Trigger states, counts and slices that are warming up; plain values and tensors."""
        return {
            "triggers": [rule.when.state_dict() for rule in self.rules],
            "counts": list(self._counts),
            "spent": list(self._spent),
            "last_fired": list(self._last_fired),
            "last_growth": self._last_growth,
            "steps": self._steps,
            "num_events": len(self.history),
            "rewarm": self.rewarm.state_dict(self._grown_model()) if self.rewarm is not None else None,
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
        self._spent = list(state["spent"])
        self._last_fired = list(state["last_fired"])
        self._last_growth = state["last_growth"]
        self._steps = state["steps"]
        self._checked = True  # a growth that was legal may have been done since
        self.history = list(history)
        if self.rewarm is not None and state["rewarm"] is not None:
            self.rewarm.load_state_dict(state["rewarm"], self._grown_model())
