"""From a target size and a budget to the run that we would make of them: `cambia plan`.

    >>> found = plan_run(read_experiment("fixed_size"), layers=4, tokens=4_000_000)
    >>> found.grow_step, found.bound
    (488, 0.34)

One growth in depth, inside the stable phase of the learning rate, from few layers to all of them (Bu 2025,
arXiv:2511.04981). What it can save at most is t (1 - x), with t the share of the run before it and x the cost
of a small step as a share of a large one's; it saves that where the grown model ends as good as one that was
large from the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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

GROW_AT = 0.5
"""Share of the run after which it grows."""
START_LAYERS = 1
"""Layers that a model from scratch begins with."""


@dataclass(frozen=True)
class Sized:
    """A model's size."""

    layers: int
    parameters: int
    flops_per_token: float
    """Of a training step."""


@dataclass(frozen=True)
class RunPlan:
    """A run that grows once."""

    tree: Mapping[str, Any]
    """The whole experiment, which `cambia run` takes."""
    layers: tuple[int, int]
    """At the start and of the target."""
    growth: Planned
    """What the growth comes to."""
    steps: int
    step_tokens: int
    grow_step: int

    @property
    def start(self) -> Sized:
        return Sized(self.layers[0], self.growth.parameters_before, self.growth.flops_per_token_before)

    @property
    def target(self) -> Sized:
        return Sized(self.layers[1], self.growth.parameters_after, self.growth.flops_per_token_after)

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def share(self) -> float:
        """t: of the run, before it grows."""
        return self.grow_step / self.steps

    @property
    def ratio(self) -> float:
        """x: what a small step costs, as a share of a large one's."""
        return self.start.flops_per_token / self.target.flops_per_token

    @property
    def bound(self) -> float:
        """t (1 - x): the share of operations saved, if it ends as good as a model that was always large."""
        return self.share * (1 - self.ratio)

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_large * (1 - self.bound)

    @property
    def flops_large(self) -> float:
        """The same tokens at the target's size."""
        return self.tokens * self.target.flops_per_token


def plan_run(
    experiment: Experiment,
    *,
    layers: int | None = None,
    start_layers: int | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    grow_at: float = GROW_AT,
) -> RunPlan:
    """Plan a run that grows in depth.

    Args:
        experiment: data, optimizer and width; its model is the target, or where it is a checkpoint the start.
        layers: of the target; those of a model from scratch by default.
        start_layers: that a model from scratch begins with.
        tokens, flops: the budget, one of them.
        grow_at: the share of the run after which it grows.

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
    begin = model.config().num_hidden_layers if is_checkpoint else start_layers or START_LAYERS
    if target <= begin:
        raise ConfigError(
            f"the target has {target} layers and the start {begin}; growth only adds: give more --layers"
            + ("" if is_checkpoint else ", or fewer --start-layers")
        )
    settings: dict[str, Any] = {} if is_checkpoint else {"model.num_hidden_layers": begin}
    context = experiment.training.sequence_length
    tree = plain_tree(experiment)
    small = experiment_from(tree, source="the plan", flags=settings)
    tokenizer, stream = open_stream(small)
    growth = _grown(small.model.build(tokenizer, sequence_length=context), target, context).planned
    decay = getattr(experiment.training.schedule, "decay_fraction", 0.0)
    if not 0 < grow_at < 1 - decay:
        raise ConfigError(
            f"--grow-at {grow_at:g}: expected a share of the run before its rate falls, which it does from "
            f"{1 - decay:g} on"
        )
    step_tokens = experiment.training.batch_size * context
    mean_cost = grow_at * growth.flops_per_token_before + (1 - grow_at) * growth.flops_per_token_after
    steps = int((tokens or (flops or 0.0) / mean_cost) / step_tokens)
    if steps < 1:
        least = f"{step_tokens:,} tokens" if tokens else f"{step_tokens * mean_cost:.3g} FLOPs"
        raise ConfigError(
            f"the budget is below one step, which takes {least} (--training.batch_size times "
            "--training.sequence_length)"
        )
    when = {"type": "schedule", "at_fractions": [grow_at]}
    flags = {
        **settings,
        "growth.enabled": True,
        "growth.rules": [{"when": when, "then": {"type": "add_layers", "to": target}}],
        "training.epochs": None,
        "training.tokens": None,
        "training.steps": max(1, steps // len(stream.stages)),
    }
    planned = experiment_from(tree, source="the plan", flags=flags)
    steps = sum(stage_steps(planned, stream))
    grow_step = math.ceil(grow_at * steps)
    return RunPlan(plain_tree(planned), (begin, target), growth, steps, step_tokens, grow_step)


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
