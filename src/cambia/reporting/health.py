"""Is a run well? Questions, each answered green, amber or red with a sentence that says what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cambia.records import GrowthEvent
from cambia.reporting import units
from cambia.reporting.run import Run, Stretch

Level = Literal["green", "amber", "red"]

_EXACT = 1e-5
"""Relative logit error that rounding in float32 explains."""
_COARSE = 3e-2
"""The same for bfloat16 and float16 weights."""
_LITTLE, _MUCH = 0.05, 0.3
"""Shares of what was learned on a task whose loss is little or much."""
_FEWEST = 8
"""Logged steps of a task below which its trend is not judged."""


@dataclass(frozen=True)
class Check:
    """One question about a run and its answer."""

    question: str
    level: Level
    sentence: str


def check_health(run: Run) -> list[Check]:
    """Every question, answered from what the run recorded so far."""
    decoding = [_rising(run), _moved(run)] if run.decoding else []
    if not run.teaches_weights:
        return decoding
    weights = [_falling(run), _holds(run), _kept(run), _exact(run), _covered(run), _skipped(run)]
    return [weights[0], *decoding, *weights[1:]]


def _falling(run: Run) -> Check:
    question = "Is the loss falling?"
    judged = [
        (stretch, *_trend(run, stretch))
        for stretch in run.stretches()
        if _losses(run, stretch).size >= _FEWEST
    ]
    if not judged:
        return Check(
            question,
            "amber",
            f"Too few steps are logged to tell (a task needs {_FEWEST}): train longer, or log more often "
            "with --training.log_every_steps.",
        )
    rising = [(s.task, first, last) for s, first, last, noise in judged if last - first > noise]
    if rising:
        task, first, last = rising[0]
        return Check(
            question,
            "red",
            f"No: in {task!r} the training loss rose from {first:.3f} to {last:.3f} nats per token. Lower "
            "--optimizer.learning_rate, and look at the gradient norm below.",
        )
    flat = [(s.task, first, last) for s, first, last, noise in judged if first - last <= noise]
    if flat:
        task, first, last = flat[0]
        return Check(
            question,
            "amber",
            f"Hardly: in {task!r} the training loss went from {first:.3f} to {last:.3f} nats per token, "
            "which is within its noise. Train longer, or try another --optimizer.learning_rate.",
        )
    stretch, first, last, _ = judged[-1]
    every = "both" if len(judged) == 2 else f"all {len(judged)}"
    noun = "tasks" if len({s.task for s, *_ in judged}) == len(judged) else "stages"
    where = f"in {every} {noun}; in {stretch.task!r} it went" if len(judged) > 1 else "it went"
    return Check(
        question, "green", f"Yes, {where} from {first:.3f} to {last:.3f} nats per token. Nothing to do."
    )


def _losses(run: Run, stretch: Stretch) -> np.ndarray:
    losses = run.metrics["loss"][stretch.rows]
    return losses[np.isfinite(losses)]


def _trend(run: Run, stretch: Stretch) -> tuple[float, float, float]:
    """Mean loss of a task's first and last quarter, and twice the standard error of their difference."""
    return _quarters(_losses(run, stretch))


def _quarters(values: np.ndarray) -> tuple[float, float, float]:
    quarter = max(2, len(values) // 4)
    first, last = values[:quarter], values[-quarter:]
    # The first quarter falls steeply, so its spread is no noise: the last one's stands for both.
    noise = 2 * math.sqrt(2 * float(np.var(last)) / quarter)
    return float(first.mean()), float(last.mean()), noise


def _rising(run: Run) -> Check:
    question = "Is the reward of decoding rising?"
    rewards = np.array([entry["reward"] for entry in run.decoding])
    if len(rewards) < _FEWEST:
        return Check(
            question,
            "amber",
            f"Too few steps to tell ({len(rewards)} of at least {_FEWEST}): raise --decoding.fit.tokens, or "
            "lower --decoding.engine_update_freq.",
        )
    first, last, noise = _quarters(rewards)
    if last - first > noise:
        return Check(question, "green", f"Yes, from {first:.3f} to {last:.3f}. Nothing to do.")
    if first - last > noise:
        return Check(
            question,
            "red",
            f"No: it fell from {first:.3f} to {last:.3f}. Lower --decoding.fit.gradient.rate, or anchor it "
            "with --decoding.fit.gradient.divergence.",
        )
    return Check(
        question,
        "amber",
        f"Hardly: it went from {first:.3f} to {last:.3f}, which is within its noise. It may have begun near "
        "its best; more --decoding.fit.prompts tell more.",
    )


def _moved(run: Run) -> Check:
    question = "Have the decoding parameters moved?"
    drift = {name: by for name, by in run.decoding[-1]["drift"].items() if by}
    if not drift:
        return Check(
            question, "amber", "No: they are where they began. Look at the reward, and at what is learned."
        )
    moved = ", ".join(f"{name.replace('_', ' ')} by {by:+.3g}" for name, by in drift.items())
    return Check(question, "green", f"Yes: {moved}. Nothing to do.")


def _holds(run: Run) -> Check:
    question = "Does it hold on unseen text?"
    worst: tuple[float, str, float, float] | None = None
    for stretch in run.stretches():
        values = run.metrics["validation_loss"][stretch.rows]
        values = values[np.isfinite(values)]
        if not values.size:
            continue
        # The better of the last two: a single noisy measurement is no trend.
        best, last = float(values.min()), float(values[-2:].min())
        if worst is None or last / best > worst[0]:
            worst = (last / best, stretch.task, best, last)
    if worst is None:
        return Check(
            question,
            "amber",
            "No validation loss was measured during training, so memorizing would not show: set "
            "--evaluation.every_steps.",
        )
    ratio, task, best, last = worst
    if ratio <= 1.03:
        return Check(
            question,
            "green",
            "Yes: in every task the validation loss ended at its best or within 3 % of it. Nothing to do.",
        )
    return Check(
        question,
        "amber" if ratio <= 1.1 else "red",
        f"Not to the end: in {task!r} the validation loss rose again from {best:.3f} to {last:.3f} nats per "
        "token. The model memorizes: train fewer steps, or on more text.",
    )


def _kept(run: Run) -> Check:
    question = "Was anything forgotten?"
    if len(run.tasks) == 1:
        return Check(question, "green", "There is one task, so nothing can be forgotten.")
    metrics = run.transfer_metrics(run.split)
    if metrics is not None and not metrics.earlier:
        return Check(question, "green", "Every task was trained in the last stage: nothing came after.")
    if metrics is None:
        return Check(question, "amber", "Not known before every task was trained: nothing to do yet.")
    shares = [
        lost / max(learned, 1e-9) for lost, learned in zip(metrics.forgotten, metrics.learned, strict=True)
    ]
    worst = max(range(len(shares)), key=shares.__getitem__)
    lost, learned = metrics.forgotten[worst], metrics.learned[worst]
    if shares[worst] <= _LITTLE:
        return Check(
            question,
            "green",
            f"Hardly: of no task more than {_LITTLE:.0%} of what was learned is lost again. Nothing to do.",
        )
    return Check(
        question,
        "amber" if shares[worst] <= _MUCH else "red",
        f"Yes: of the {learned:.2f} bits per byte learned on {metrics.tasks[worst]!r}, {lost:.2f} are lost "
        "again. Show earlier tasks' text again, or more of it: --methods '[{type: replay, fraction: 0.25}]'.",
    )


def _exact(run: Run) -> Check:
    question = "Was each growth exact?"
    if not run.growth:
        return Check(question, "green", "The model did not grow, so there is nothing to check.")
    kept = [event for event in run.growth if event.exactness != "none"]
    errors = [event.logit_error for event in kept if event.logit_error is not None]
    worst = max(errors, default=0.0, key=lambda error: math.inf if math.isnan(error) else error)
    jumps = [event for event in run.growth if event.exactness == "none"]
    if not worst <= _COARSE:
        return Check(
            question,
            "red",
            f"No: a growth that promised to keep the logits changed them by {units.error(worst)} (relative). "
            "Do not trust this run, and report it as a bug.",
        )
    if len(errors) < len(kept):
        return Check(
            question,
            "amber",
            f"{_events(len(kept) - len(errors))} not checked: grow with a check batch to know.",
        )
    if worst > _EXACT:
        return Check(
            question,
            "amber",
            f"As far as bfloat16 and float16 can: the largest relative logit error is {units.error(worst)}. "
            "Keep the weights in float32 where it must be exact.",
        )
    return Check(question, "green", _as_declared(kept, jumps, worst))


def _events(number: int) -> str:
    return "1 growth event was" if number == 1 else f"{number} growth events were"


def _as_declared(kept: list[GrowthEvent], jumps: list[GrowthEvent], worst: float) -> str:
    words = []
    if kept:
        every = {1: "", 2: ", both"}.get(len(kept), f", all {len(kept)}")
        words.append(
            f"Yes{every}, as promised: the largest relative logit error is {units.error(worst)}, "
            f"at most {units.error(_EXACT)} is rounding"
        )
    if jumps:
        largest = max(jumps, key=lambda event: abs((event.loss_after or 0.0) - (event.loss_before or 0.0)))
        moved = units.jump(largest.loss_before, largest.loss_after)
        words.append(
            f"{_events(len(jumps))} asked to change the model (preserve=False) and moved the loss by up to "
            f"{moved} nats per token"
        )
    return "; ".join(words) + ". Nothing to do."


def _covered(run: Run) -> Check:
    question = "Is everything in the optimizer?"
    covered = run.summary.get("optimizer_covers_all_parameters")
    if covered is None:
        when = "The summary does not say" if run.status == "finished" else "Not known before the run ends"
        return Check(question, "amber", f"{when}: nothing to do unless the loss stands still after a growth.")
    if covered:
        return Check(question, "green", "Yes, every parameter that is to be trained. Nothing to do.")
    return Check(
        question,
        "red",
        "No: some parameters never train. Give grow() the optimizer (optimizer=...), and build the optimizer "
        "from all of the model's parameters.",
    )


def _skipped(run: Run) -> Check:
    question = "Were any steps skipped?"
    if not run.skipped_steps:
        return Check(question, "green", "No step was skipped. Nothing to do.")
    share = run.skipped_steps / max(1, run.steps)
    return Check(
        question,
        "amber" if share < 0.01 else "red",
        f"{run.skipped_steps:,} of {run.steps:,} ({share:.1%}) were left out because the loss or gradient "
        "was not finite: lower --optimizer.learning_rate or --training.clip_norm.",
    )
