"""What a model says of the probes now, against what it said when it had just learned their tasks."""

# B rows of a probe, T its tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cambia.experiment.reopen import Reopened
from cambia.rundir import RunReader
from cambia.training.audit import Probe, read_probes

TOLERANCE = 1e-5
"""Of the largest logit: how far kept answers may be off where nobody can ask for the same bits."""


@dataclass(frozen=True)
class Answer:
    """What the model says of a probe now, against what it said then."""

    stage: str
    """At whose end the probe was taken: its number, from 1, and its name."""
    task: str
    """Whose text it is."""
    promised: bool
    """Whether the method keeps its answers, and the task was not trained again; or a Part gave them that will
    never change."""
    again: bool
    """Whether the task was trained again since."""
    difference: float
    """The largest change of a logit; 0 where every bit is the same."""
    relative: float
    """The same as a share of the largest logit."""
    loss_then: float
    """Of the probe's own next tokens, nats per token."""
    loss_now: float
    held: bool
    """Whether it is as it was, as far as that can be asked here."""


@dataclass(frozen=True)
class Heard:
    """The answers of a checkpoint."""

    answers: tuple[Answer, ...] = ()
    unchecked: tuple[str, ...] = ()
    """Promised answers that cannot be checked, and why."""
    notes: tuple[str, ...] = ()
    """Other answers that nothing is known of, and why."""


def answers_of(run: RunReader, opened: Reopened, *, exact: bool) -> Heard:
    """Ask a checkpoint for its answers to all probes that were taken before it.

    Args:
        exact: whether kept answers must have the same bits. They do on the same machine, with the same
            software and number of threads, for the same rows in the same arrangement.
    """
    kept = {int(path.stem.removeprefix("stage")): path for path in run.probes()}
    lines = {line["stage"]: line for line in run.promises()}
    answers, unchecked, notes = list[Answer](), list[str](), list[str]()
    for stage in range(opened.progress.stage):
        label = f"{stage + 1} {opened.stream.stages[stage].name}"
        try:
            probes = read_probes(kept[stage])
        except (KeyError, OSError, SafetensorError):
            why = "is gone" if stage not in kept else "cannot be read"
            gone = f"the probe that was taken after {label} {why}: nothing is known of its answers"
            known = _promised(opened, stage) or bool(lines.get(stage, {}).get("answerers"))
            (unchecked if known else notes).append(gone)
            continue
        for_good = lines.get(stage, {}).get("answerers", {})
        answers += [_answer(probe, opened, stage, label, for_good, exact) for probe in probes]
    return Heard(tuple(answers), tuple(unchecked), tuple(notes))


def _promised(opened: Reopened, stage: int) -> bool:
    """Whether the answers of a stage, or some of them, are promised."""
    weights = opened.stream.stages[stage].weights
    tasks = [task for task, weight in enumerate(weights) if weight > 0]
    return opened.method.contract.keeps_answers and not all(_again(opened, stage, task) for task in tasks)


def _again(opened: Reopened, stage: int, task: int) -> bool:
    """Whether a task was trained again after a stage."""
    progress = opened.progress
    begun = progress.stage + (progress.stage_step > 0)
    return any(later.weights[task] > 0 for later in opened.stream.stages[stage + 1 : begun])


def _answer(
    probe: Probe,
    opened: Reopened,
    stage: int,
    label: str,
    for_good: Mapping[str, str | None],
    exact: bool,
) -> Answer:
    key, then = str(probe.task), probe.logits
    if key in for_good:  # (B, T, V)
        now = probe.by(for_good[key], opened.model, opened.method)
    else:
        now = probe.again(opened.model, opened.method)
    losses = [_loss(logits, probe.input_ids) for logits in (then, now)]
    known = min(then.shape[-1], now.shape[-1])  # a vocabulary that grew says more than it did
    then, now = then[..., :known].double(), now[..., :known].double()
    difference = float((now - then).abs().max())
    relative = difference / float(then.abs().max()) if difference else 0.0
    again = _again(opened, stage, probe.task)
    # A dtype of few bits has no 1e-5.
    allowed = 0.0 if exact else max(TOLERANCE, 4 * torch.finfo(probe.logits.dtype).eps)
    return Answer(
        stage=label,
        task=opened.stream.names[probe.task],
        promised=key in for_good or (opened.method.contract.keeps_answers and not again),
        again=again,
        difference=difference,
        relative=relative,
        loss_then=losses[0],
        loss_now=losses[1],
        held=relative <= allowed,
    )


def _loss(logits: Tensor, input_ids: Tensor) -> float:
    """Mean loss of the next tokens in a probe's own rows, nats per token."""
    said = logits[:, :-1].flatten(0, 1).double()  # (B (T - 1), V)
    return float(nn.functional.cross_entropy(said, input_ids[:, 1:].flatten()))
