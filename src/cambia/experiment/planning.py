"""From a target size and a budget to the run that we would make of them: `cambia plan`.

    >>> found = plan_run(read_experiment("fixed_size"), layers=8, tokens=8_000_000)
    >>> [(stage.step, stage.layers) for stage in found.stages]
    [(0, 2), (2393, 4), (4786, 8)]

The model begins with a quarter of its layers and doubles them twice, each time by copies of all layers on
top of them that fade in. It grows when it has seen so many tokens for each parameter of its layers, about
when the efficiency rule would have it grow, and at the latest late in the part of the run where the learning
rate is high (where Bu 2025, arXiv:2511.04981, grows). What that can save at most is the sum over its growths
of t (1 - x), with t the share of the run by which a growth is later than the one before, and x the cost of a
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
from cambia.errors import ConfigError, GrowthError
from cambia.experiment.build import open_stream, stage_steps
from cambia.experiment.starts import NativeModel, PretrainedModel
from cambia.experiment.tree import Experiment, experiment_from, plain_tree
from cambia.growth import AddLayers, EfficiencyTrigger, GrowthPlan, LossCurve, Signals, plan_growth
from cambia.growth.triggers import Planned
from cambia.models.bodies import on_meta
from cambia.rundir import RunReader

PER_PARAMETER = 13.0
"""Tokens that a model sees for each parameter of its layers before it grows (docs/log.md, 2026-11-23)."""
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

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def flops(self) -> float:
        """Of the whole run."""
        ends = [*(stage.step for stage in self.stages[1:]), self.steps]
        steps = [end - stage.step for stage, end in zip(self.stages, ends, strict=True)]
        costs = [stage.flops_per_token for stage in self.stages]
        return self.step_tokens * sum(n * cost for n, cost in zip(steps, costs, strict=True))

    @property
    def flops_large(self) -> float:
        """The same tokens at the target's size."""
        return self.tokens * self.stages[-1].flops_per_token

    @property
    def bound(self) -> float:
        """The share of operations saved, if it ends as good as a model that was always large."""
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
        ConfigError: the target is not larger than the start, the budget is below a step, or the growth lies
            where the rate falls already.
    """
    model = experiment.model
    target = layers or (model.num_hidden_layers if isinstance(model, NativeModel) else None)
    if target is None:
        raise ConfigError("a plan that grows a checkpoint needs the depth to come to: --layers 24")
    if isinstance(model, PretrainedModel) and start_layers:
        raise ConfigError("a checkpoint begins with the layers that it has: leave out --start-layers")
    if (tokens is None) == (flops is None):
        raise ConfigError("a plan takes one budget: --tokens 8e6, or --flops 5e13")
    is_checkpoint = isinstance(model, PretrainedModel)
    begin = model.config().num_hidden_layers if is_checkpoint else start_layers or -(-target // 4)
    if target <= begin:
        raise ConfigError(
            f"the target has {target} layers and the start {begin}; growth only adds: give more --layers"
            + ("" if is_checkpoint else ", or fewer --start-layers")
        )
    depths = [begin]
    while depths[-1] < target:
        depths.append(min(2 * depths[-1], target))
    settings: dict[str, Any] = {} if is_checkpoint else {"model.num_hidden_layers": begin}
    context = experiment.training.sequence_length
    tree = plain_tree(experiment)
    small = experiment_from(tree, source="the plan", flags=settings)
    tokenizer, stream = open_stream(small)
    start = small.model.build(tokenizer, sequence_length=context)
    growths = [_grown(start, depth, context) for depth in depths[1:]]
    decay = getattr(experiment.training.schedule, "decay_fraction", 0.0)
    if grow_at is not None and not 0 < grow_at < 1 - decay:
        raise ConfigError(
            f"--grow-at {grow_at:g}: expected a share of the run before its rate falls, which it does from "
            f"{1 - decay:g} on"
        )
    sizes = GrowingSizes.of(growths)
    step_tokens = experiment.training.batch_size * context
    wanted = tokens or sizes.tokens(flops or 0.0, grow_at, decay)
    shares = sizes.shares(grow_at or sizes.last(wanted, decay))
    steps = int(wanted / step_tokens)
    if steps < 1:
        least = f"{step_tokens:,} tokens" if tokens else f"{step_tokens * sizes.mean_cost(shares):.3g} FLOPs"
        raise ConfigError(
            f"the budget is below one step, which takes {least} (--training.batch_size times "
            "--training.sequence_length)"
        )
    flags = {
        **settings,
        "growth.enabled": True,
        "growth.rules": [_rule(share, depth) for share, depth in zip(shares, depths[1:], strict=True)],
        "training.epochs": None,
        "training.tokens": None,
        "training.steps": max(1, steps // len(stream.stages)),
    }
    planned = experiment_from(tree, source="the plan", flags=flags)
    steps = sum(stage_steps(planned, stream))
    counts = [growths[0].parameters_before, *(each.parameters_after for each in growths)]
    begins = [0, *(math.ceil(share * steps) for share in shares)]
    stages = tuple(Stage(*each) for each in zip(begins, depths, counts, sizes.costs, strict=True))
    return RunPlan(plain_tree(planned), stages, growths[0].planned, steps, step_tokens)


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
        return [round(last * size / self.in_layers[-1], 4) for size in self.in_layers]

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


def due_by_curve(run: RunReader, planned: RunPlan) -> tuple[LossCurve, float]:
    """When the efficiency rule would grow the model of a planned run, by the curve of a run of it.

    Args:
        run: of the small model, up to a first growth.

    Returns:
        The fitted curve, and the tokens after which growth is due.

    Raises:
        ConfigError: the curve is too short, or does not fall.
    """
    rows = [row for row in run.rows(rundir.METRICS) if row["loss"] is not None]
    trigger = EfficiencyTrigger(advantage=math.inf)
    for row in rows:
        if row["parameters"] == rows[0]["parameters"]:
            known = {name: row[name] for name in ("step", "tokens", "loss", "learning_rate")}
            trigger.update(Signals(**known))
    curve = trigger.fitted()
    marks = [float(rows[-1]["tokens"]) * 1.02**step for step in range(-400, 800)]
    due = next((n for n in marks if curve.advantage(n, planned.growth) >= 1), math.inf)
    return curve, min(due, trigger.latest * planned.tokens)
