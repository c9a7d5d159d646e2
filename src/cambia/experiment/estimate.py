"""What a run would cost, before it is started: `cambia run --dry-run`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.data.tokenizers import Tokenizer
from cambia.errors import ConfigError, OutOfMemoryError
from cambia.experiment.build import one_line_when_out_of_memory, open_stream, stage_steps
from cambia.experiment.machine import find_device, memory_bytes
from cambia.experiment.starts import NativeModel
from cambia.experiment.tree import Experiment
from cambia.growth import GrowthPlan, ScheduleTrigger, plan_growth
from cambia.growth.plan import describe
from cambia.models.architectures import architecture_of, per_layer
from cambia.models.bodies import count_parameters, flops_per_token, on_meta
from cambia.models.causal_lm import CambiaForCausalLM

_LONG = 1.0
"""Seconds; batches that take longer are not timed whole, so that a dry run stays quick."""


@dataclass
class Phase:
    """A stretch of the run at one size."""

    operators: tuple[dict[str, Any], ...]
    """The growth that begins it, as in `GrowthEvent`; empty for the start."""
    at_step: int | None
    """None where only the data can tell when."""
    parameters: int
    flops_per_token: float
    growth_bytes: int = 0
    """Memory held only while growing."""
    changes: dict[str, tuple] = field(default_factory=dict)
    """Config fields that change: name -> (before, after)."""


@dataclass
class Estimate:
    """Sizes, operations, memory and time of a run."""

    stage_steps: list[int]
    tokens: int
    phases: list[Phase]
    flops: float
    memory_bytes: int
    """Weights, gradients and optimizer state at the largest size, and a batch's activations, roughly."""
    seconds: float
    """Estimated from real steps here at the starting size; scoring and saving come on top."""


def estimate(experiment: Experiment) -> Estimate:
    """Plan the whole run: growth on a model without memory, speed by a few real steps.

    Rules whose trigger is not a schedule are planned once, at no known step.
    """
    device = find_device(experiment.device)
    tokenizer, stream = open_stream(experiment)
    steps = stage_steps(experiment, stream)
    training = experiment.training
    context, per_step = training.sequence_length, training.batch_size * training.sequence_length
    _refuse_huge(experiment, tokenizer)
    with one_line_when_out_of_memory(experiment):
        start = experiment.model.build(tokenizer, sequence_length=context).to(device)
    small = on_meta(type(start), start.config)
    phases = [Phase((), 0, count_parameters(small), flops_per_token(small, context))]
    model = small
    for at_step, rule_index in _growth_steps(experiment, steps, per_step):
        plan = plan_growth(model, experiment.growth.rules[rule_index].then, context=context)
        parameters, cost = plan.parameters_after, plan.flops_per_token_after
        if experiment.growth.budget.broken_by(parameters, cost, start.dtype.itemsize):
            continue
        model = plan.after
        phases.append(_phase(plan, at_step))
    flops = training.neural_steps_per_batch * _total_flops(phases, sum(steps), per_step)
    largest = phases[-1].parameters
    return Estimate(
        stage_steps=steps,
        tokens=sum(steps) * per_step,
        phases=phases,
        flops=flops,
        # Weights, gradients and two moments; about 16 values per unit of width and layer.
        memory_bytes=4 * start.dtype.itemsize * largest + _activation_bytes(experiment, model.config),
        seconds=_seconds(experiment, start, phases, sum(steps)),
    )


def _refuse_huge(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Refuse a model from scratch that cannot be here, before the system ends the process for it."""
    if not isinstance(experiment.model, NativeModel):
        return
    with torch.device("meta"):
        model = experiment.model.build(tokenizer, sequence_length=experiment.training.sequence_length)
    count = count_parameters(model)
    needed, there = 2 * model.dtype.itemsize * count, memory_bytes()
    if needed > there:
        raise OutOfMemoryError(
            f"the model has {count:,} parameters, with gradients {needed / 2**30:,.0f} GiB, and this machine "
            f"{there / 2**30:,.0f} GiB: lower --model.hidden_size or --model.num_hidden_layers"
        )


def _growth_steps(experiment: Experiment, steps: list[int], per_step: int) -> list[tuple[int | None, int]]:
    """(step, rule) of every growth that is known beforehand, in order; unknown steps last."""
    if not experiment.growth.enabled or experiment.growth.dry_run:
        return []
    known: list[tuple[int, int]] = []
    unknown: list[tuple[int | None, int]] = []
    total = sum(steps)
    for i, rule in enumerate(experiment.growth.rules):
        trigger = rule.when
        if not isinstance(trigger, ScheduleTrigger):
            unknown.append((None, i))
            continue
        known += [(step, i) for step in trigger.steps(total, per_step)[: rule.most_events]]
    return [*sorted(known), *unknown]


def _phase(plan: GrowthPlan, at_step: int | None) -> Phase:
    return Phase(
        operators=tuple(describe(operator) for operator in plan.operators),
        at_step=at_step,
        parameters=plan.parameters_after,
        flops_per_token=plan.flops_per_token_after,
        growth_bytes=plan.extra_bytes(),
        changes=dict(plan.config_changes),
    )


def _lengths(phases: Sequence[Phase], total_steps: int) -> list[tuple[Phase, int]]:
    """Every phase that has a place, with its steps."""
    known = [phase for phase in phases if phase.at_step is not None]
    ends = [phase.at_step or 0 for phase in known[1:]] + [total_steps]
    return [(phase, end - (phase.at_step or 0)) for phase, end in zip(known, ends, strict=True)]


def _total_flops(phases: Sequence[Phase], total_steps: int, per_step: int) -> float:
    return sum(steps * per_step * phase.flops_per_token for phase, steps in _lengths(phases, total_steps))


def _activation_bytes(experiment: Experiment, config: PreTrainedConfig) -> int:
    training = experiment.training
    rows = -(-training.batch_size // training.accumulation) * training.sequence_length
    depth = config.num_hidden_layers
    ffn = per_layer(architecture_of(config).size(config, "intermediate_size"), depth)
    width = 3 * sum(ffn) + 8 * config.hidden_size * depth
    return 4 * rows * (width // (4 if training.gradient_checkpointing else 1) + 2 * config.vocab_size)


def _seconds(experiment: Experiment, model: PreTrainedModel, phases: Sequence[Phase], steps: int) -> float:
    """From real steps: gradients cost by their operations, the optimizer's updates by the parameters."""
    gradients, update = _timed(experiment, model)
    updates = sum(
        length * phase.parameters / phases[0].parameters for phase, length in _lengths(phases, steps)
    )
    training = experiment.training
    tokens = training.batch_size * training.sequence_length
    once = _total_flops(phases, steps, tokens) * gradients + updates * update
    return training.neural_steps_per_batch * once


def _timed(experiment: Experiment, model: PreTrainedModel) -> tuple[float, float]:
    """Seconds for one operation of a gradient, and for one update of the starting model.

    Batches double until a gradient takes `_LONG` or the batch is a whole one.
    """
    training, device = experiment.training, model.device
    # A stock model computes its logits whole, and so it is timed.
    extra = {"skip_logits": True} if isinstance(model, CambiaForCausalLM) else {}
    optimizer = experiment.optimizer.build(model)
    most = max(1, training.batch_size // training.accumulation)
    rows, length = 1, min(32, training.sequence_length)

    def timed(action: Callable[[], object]) -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def gradient() -> float:
        ids = torch.randint(0, model.config.vocab_size, (rows, length), device=device)
        return timed(lambda: model(input_ids=ids, labels=ids, use_cache=False, **extra).loss.backward())

    try:
        gradient(), optimizer.step()  # the first ones warm up
        update = min(timed(optimizer.step), timed(optimizer.step))
        while (seconds := gradient()) < _LONG and (rows, length) != (most, training.sequence_length):
            if length < training.sequence_length:
                length = min(2 * length, training.sequence_length)
            else:
                rows = min(2 * rows, most)
        if seconds < _LONG:
            seconds = statistics.median([seconds, gradient(), gradient()])
    except (MemoryError, RuntimeError) as error:
        raise ConfigError(f"one batch does not run on {device}: {error}") from error
    return seconds / (rows * length * flops_per_token(model, length)), update
