"""From a target size and a budget to the run that we would make of them: `cambia plan`.

    >>> found = plan_run(read_experiment("fixed_size"), layers=8, tokens=8_000_000)
    >>> [(stage.step, stage.layers) for stage in found.stages]
    [(0, 2), (2393, 4), (4786, 8)]

The model begins with a quarter of its layers, or as a checkpoint with those it has, and doubles them until
it is there, each time by copies of all layers on top of them that fade in. It grows when it has seen so many
tokens for each parameter of its layers, about when the efficiency rule would have it grow. In a run that is
too short for that it grows for the last time late in the part where the learning rate is high (where Bu 2025,
arXiv:2511.04981, grows), and before in proportion. What it does not compute is the sum over its growths of
t (1 - x), with t the share of the run by which a growth is later than the one before, and x the cost of a
step until then as a share of a step of the target. It saves that where the grown model ends as good as one
that was large from the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

from cambia import rundir
from cambia.data import Stream
from cambia.errors import ConfigError, GrowthError
from cambia.experiment.build import open_stream, stage_steps
from cambia.experiment.starts import NativeModel, PretrainedModel
from cambia.experiment.tree import Experiment, experiment_from, plain_tree
from cambia.growth import (
    AddLayers,
    EfficiencyTrigger,
    GrowthPlan,
    LossCurve,
    ScheduleTrigger,
    Signals,
    plan_growth,
)
from cambia.growth.triggers import Planned
from cambia.models.bodies import on_meta
from cambia.rundir import RunReader
from cambia.training.schedules import WSD

PER_PARAMETER = 13.0
"""Tokens that a model sees for each parameter of its layers before it grows (docs/log.md, 2026-11-23)."""
ENOUGH = 10.0
"""Tokens for each parameter of the target from which growth was better than a smaller model that never grows:
between 7 and 9, where it was not, and 14, where it was (docs/results.md, docs/log.md)."""
MOST = 1e30
"""Tokens or operations of a plan."""
MOST_STEPS = 10**15
MOST_LAYERS = 1000
LATEST = 0.875
"""Share of what comes before the rate falls, after which it has its final size in any run."""


@dataclass(frozen=True)
class Stage:
    """A part of the run, in which the model has one size."""

    step: int
    """At which it begins."""
    layers: int
    parameters: int
    flops_per_token: float
    """Of a training step."""


@dataclass(frozen=True)
class RunPlan:
    """A run that grows."""

    tree: Mapping[str, Any]
    """The whole experiment, which `cambia run` takes."""
    stages: tuple[Stage, ...]
    growth: Planned
    """What the first growth comes to."""
    steps: int
    step_tokens: int
    updates: int = 1
    """Optimizer steps of each batch."""
    is_short: bool = False
    """Whether it grows before its layers have seen `PER_PARAMETER` tokens a parameter."""
    is_checkpoint: bool = False
    """Whether it starts from a model that has learned already."""

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def flops(self) -> float:
        """Of the whole run; what a method computes beside it comes on top."""
        ends = [*(stage.step for stage in self.stages[1:]), self.steps]
        steps = [end - stage.step for stage, end in zip(self.stages, ends, strict=True)]
        costs = [stage.flops_per_token for stage in self.stages]
        done = sum(n * cost for n, cost in zip(steps, costs, strict=True))
        return self.updates * self.step_tokens * done

    @property
    def flops_large(self) -> float:
        """The same tokens at the target's size."""
        return self.updates * self.tokens * self.stages[-1].flops_per_token

    @property
    def bound(self) -> float:
        """The share of operations that it does not compute: what it saves, if it ends as good."""
        return 1 - self.flops / self.flops_large


def plan_run(
    experiment: Experiment,
    *,
    layers: int | None = None,
    start_layers: int | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    grow_at: float | None = None,
) -> RunPlan:
    """Plan a run that grows in depth, by doubling.

    Args:
        experiment: data, optimizer and width; its model is the target, or where it is a checkpoint the start.
        layers: of the target; those of a model from scratch by default.
        start_layers: that a model from scratch begins with; by default a quarter of the target's.
        tokens, flops: the budget, one of them.
        grow_at: the share of the run after which it has the target's size. Growths before that are as much
            earlier as the model is smaller.

    Raises:
        ConfigError: the target is not larger than the start, or beyond the budget of growth; the budget is no
            number above 0, below a step, or too short to grow in; tasks say themselves how long they are
            trained; or growth would lie where the learning rate rises, or falls already.
    """
    depths = _depths(experiment, layers, start_layers)
    decay = _decay(experiment, grow_at)
    _check_budget(tokens, flops)
    training, tree = experiment.training, plain_tree(experiment)
    is_checkpoint = isinstance(experiment.model, PretrainedModel)
    settings: dict[str, Any] = {} if is_checkpoint else {"model.num_hidden_layers": depths[0]}
    small = experiment_from(tree, source="the plan", flags=settings)
    tokenizer, stream = open_stream(small)
    context = training.sequence_length
    start = small.model.build(tokenizer, sequence_length=context)
    growths = [_grown(start, depth, context) for depth in depths[1:]]
    _check_size(experiment, growths[-1], start.dtype.itemsize)
    sizes, updates = GrowingSizes.of(growths), max(1, training.neural_steps_per_batch)
    step_tokens, parts = training.batch_size * context, len(stream.stages)
    wanted = sizes.tokens(flops / updates, grow_at, decay) if flops is not None else tokens or 0.0
    part_steps = int(wanted / step_tokens / parts)
    if part_steps < 1:
        least = parts * step_tokens
        told = f"{least:,} tokens" if tokens else f"{least * updates * sizes.costs[0]:.3g} FLOPs"
        raise ConfigError(
            f"the budget is below one step{' of each task' if parts > 1 else ''}, which takes {told} "
            "(--training.batch_size times --training.sequence_length)"
        )
    if part_steps > MOST_STEPS:
        raise ConfigError(f"the budget is {wanted:.3g} tokens or {part_steps:.3g} steps: give a smaller one")
    shares = sizes.shares(grow_at or sizes.last(wanted, decay))
    rules = [_rule(share, depth) for share, depth in zip(shares, depths[1:], strict=True)]
    planned = experiment_from(tree, source="the plan", flags=settings | decided(part_steps, rules))
    begins, steps = _begins(planned, stream, part_steps)
    counts = [growths[0].parameters_before, *(each.parameters_after for each in growths)]
    stages = tuple(Stage(*each) for each in zip(begins, depths, counts, sizes.costs, strict=True))
    is_short = grow_at is None and sizes.due > sizes.last(wanted, decay) * wanted
    return RunPlan(
        plain_tree(planned), stages, growths[0].planned, steps, step_tokens, updates, is_short, is_checkpoint
    )


def decided(steps: int, rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that a plan makes itself, beside the depth.

    Args:
        steps: of each stage.
        rules: by which the model grows.
    """
    return {
        "growth.enabled": True,
        "growth.dry_run": False,
        "growth.rules": list(rules),
        "training.epochs": None,
        "training.tokens": None,
        "training.steps": steps,
        "training.schedule.over": "run",  # growth takes place before the one fall of the rate
    }


def _depths(experiment: Experiment, layers: int | None, start_layers: int | None) -> list[int]:
    """Layers that the run begins with, and after each growth."""
    model = experiment.model
    target = model.num_hidden_layers if layers is None and isinstance(model, NativeModel) else layers
    if target is None:
        raise ConfigError("a plan that grows a checkpoint needs the depth to come to: --layers 24")
    is_checkpoint = isinstance(model, PretrainedModel)
    if is_checkpoint and start_layers is not None:
        raise ConfigError("a checkpoint begins with the layers that it has: leave out --start-layers")
    if start_layers is not None and start_layers < 1:
        raise ConfigError(f"--start-layers {start_layers}: expected 1 at least")
    if not 2 <= target <= MOST_LAYERS:
        raise ConfigError(f"--layers {target}: expected 2 to {MOST_LAYERS:,}")
    begin = model.config().num_hidden_layers if is_checkpoint else start_layers or max(1, -(-target // 4))
    if begin < 1:
        raise ConfigError("--model.path: that model has no layers to copy")
    if target <= begin:
        raise ConfigError(
            f"the target has {target} layers and the start {begin}; growth only adds: give more --layers"
            + ("" if is_checkpoint else ", or fewer --start-layers")
        )
    depths = [begin]
    while depths[-1] < target:
        depths.append(min(2 * depths[-1], target))
    return depths


def _decay(experiment: Experiment, grow_at: float | None) -> float:
    """The share of the run in which the rate falls."""
    decay = getattr(experiment.training.schedule, "decay_fraction", 0.0)
    if decay == 1:
        raise ConfigError(
            "--training.schedule.decay_fraction 1: the rate would fall from the first step on, and a plan "
            "grows before it does"
        )
    if grow_at is not None and not 0 < grow_at < 1 - decay:
        raise ConfigError(
            f"--grow-at {grow_at:g}: expected a share of the run before its rate falls, which it does from "
            f"{1 - decay:g} on"
        )
    return decay


def _check_budget(tokens: float | None, flops: float | None) -> None:
    if tokens is None and flops is None:
        raise ConfigError("a plan needs a budget: --tokens 8e6, or --flops 5e13")
    if tokens is not None and flops is not None:
        raise ConfigError("a plan takes one budget: leave out --tokens or --flops")
    for flag, budget in (("--tokens", tokens), ("--flops", flops)):
        if budget is not None and not 0 < budget < MOST:
            raise ConfigError(f"{flag} {budget:g}: expected a number above 0 and below {MOST:g}")


def _check_size(experiment: Experiment, last: GrowthPlan, bytes_per_value: int) -> None:
    over = experiment.growth.budget.broken_by(
        last.parameters_after, last.flops_per_token_after, bytes_per_value
    )
    if over:
        raise ConfigError(f"the target is beyond --growth.budget: {over}")


def _begins(planned: Experiment, stream: Stream, part_steps: int) -> tuple[list[int], int]:
    """The steps at which the run has each size for the first time, and the steps of the run.

    Args:
        part_steps: that each stage should have.

    Raises:
        ConfigError: the run is too long or too short, or would grow where its rate rises or falls.
    """
    lengths, schedule, begins = stage_steps(planned, stream), planned.training.schedule, [0]
    steps, expected = sum(lengths), part_steps * len(lengths)
    if abs(steps - expected) > len(lengths):  # shares are rounded to steps
        raise ConfigError(
            f"the tasks say themselves how long they are trained, {steps:,} steps in all, which is not the "
            f"budget ({expected:,}): leave out steps of --data.tasks, or let their shares be 1 on average"
        )
    for rule in planned.growth.rules:
        assert isinstance(rule.when, ScheduleTrigger)
        begins += rule.when.steps(steps, stream.tokens_per_batch)
    if sorted({*begins, steps}) != [*begins, steps]:
        raise ConfigError(
            f"a run of {steps:,} steps is too short to grow {len(begins) - 1} times: give a larger budget, "
            "or a later --grow-at"
        )
    rises = schedule.warmup_steps(steps)
    if begins[1] < rises:
        raise ConfigError(
            f"the run would grow after step {begins[1]:,} of {steps:,}, and its learning rate rises until "
            f"step {rises:,}: give a smaller --training.schedule.warmup_fraction, or a later --grow-at"
        )
    falling = [step for step in begins[1:] if schedule.falls(step, steps)]
    if falling:
        repair = (
            "give a larger budget, or an earlier --grow-at"
            if isinstance(schedule, WSD)
            else "choose a rate that falls at the end, --training.schedule.type wsd"
        )
        raise ConfigError(
            f"the run would grow after step {falling[0]:,} of {steps:,}, where its learning rate falls "
            f"already: {repair}"
        )
    return begins, steps


@dataclass(frozen=True)
class GrowingSizes:
    """The sizes that a run goes through, and when it grows."""

    in_layers: tuple[int, ...]
    """Parameters of the layers of each that grows."""
    costs: tuple[float, ...]
    """Operations of a training step per token, of the last as well."""

    @classmethod
    def of(cls, growths: Sequence[GrowthPlan]) -> GrowingSizes:
        """Of growths of one model to one depth after the other."""
        first, *_ = planned = [each.planned for each in growths]
        return cls(
            (first.parameters_before, *(each.parameters_after for each in planned[:-1])),
            (first.flops_per_token_before, *(each.flops_per_token_after for each in planned)),
        )

    def shares(self, last: float) -> list[float]:
        """Shares of the run after which each grows, from that of the last growth."""
        return [float(f"{last * size / self.in_layers[-1]:.4g}") for size in self.in_layers]

    @property
    def due(self) -> float:
        """Tokens after which a run has its final size, where it is long enough."""
        return PER_PARAMETER * self.in_layers[-1]

    def last(self, tokens: float, decay: float) -> float:
        """Share of a run of so many tokens after which it has its final size.

        Args:
            decay: share of the run in which the rate falls.
        """
        return min(LATEST * (1 - decay), self.due / tokens)

    def mean_cost(self, shares: Sequence[float]) -> float:
        """Operations per token, over a run that grows after these shares."""
        parts = [end - begun for begun, end in pairwise((0.0, *shares, 1.0))]
        return sum(part * cost for part, cost in zip(parts, self.costs, strict=True))

    def tokens(self, flops: float, grow_at: float | None, decay: float) -> float:
        """Of a run that takes so many operations."""
        last = grow_at or LATEST * (1 - decay)
        tokens = flops / self.mean_cost(self.shares(last))
        if grow_at is not None or self.due >= last * tokens:
            return tokens
        return self.due + (flops - self.due * self.mean_cost(self.shares(1.0))) / self.costs[-1]


def _rule(share: float, depth: int) -> dict[str, Any]:
    """What did best in the pilots of benchmarks/compute_to_loss.py (docs/log.md)."""
    then = {"type": "add_layers", "to": depth, "where": "stack", "fade_in": 1.0}
    return {"when": {"type": "schedule", "at_fractions": [share]}, "then": then}


def _grown(model: PreTrainedModel, layers: int, context: int) -> GrowthPlan:
    try:
        return plan_growth(on_meta(type(model), model.config), AddLayers(to=layers), context=context)
    except GrowthError as error:
        raise ConfigError(str(error)) from None


def due_by_curve(run: RunReader, planned: RunPlan) -> tuple[LossCurve, float | None]:
    """When the efficiency rule would grow the model of a planned run, by the curve of a run of it.

    Args:
        run: of the small model, up to a first growth.

    Returns:
        The fitted curve, and the tokens after which growth is due; None where the rule would still wait at
        its `latest`, and grow then.

    Raises:
        ConfigError: the run is of another model, or its curve is too short or does not fall.
    """
    rows = [row for row in run.rows(rundir.METRICS) if row["loss"] is not None]
    small = planned.stages[0].parameters
    if rows and rows[0]["parameters"] != small:
        raise ConfigError(
            f"--curve {run.folder.name}: that model has {rows[0]['parameters']:,} parameters and the plan "
            f"begins with {small:,}: name a run of the small model"
        )
    trigger = EfficiencyTrigger(advantage=math.inf)
    for row in rows:
        if row["parameters"] == rows[0]["parameters"]:
            known = {name: row[name] for name in ("step", "tokens", "loss", "learning_rate")}
            trigger.update(Signals(**known))
    curve = trigger.fitted()
    marks = [float(rows[-1]["tokens"]) * 1.02**step for step in range(-400, 800)]
    due = next((n for n in marks if curve.advantage(n, planned.growth) >= 1), math.inf)
    return curve, due if due < trigger.latest * planned.tokens else None
