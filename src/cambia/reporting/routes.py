"""Who answers the passages that were kept when a task had just been learned: then, and now.

What experts lose is never lost by their weights, which do not change, but by texts that go astray once there
are more experts. `KeptRoutes` says how many do, and what it costs; and how many passages any expert answers
at all, since an expert that answers nothing forgets nothing.
"""

# N passages, T their tokens

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from safetensors import SafetensorError

from cambia.experiment.reopen import Reopened
from cambia.rundir import RunReader
from cambia.training.audit import passage_losses, read_probes


@dataclass(frozen=True)
class KeptRoutes:
    """The passages of one task that were kept at the end of one stage."""

    stage: str
    """At whose end: its number, from 1, and its name."""
    task: str
    passages: int
    astray: int
    """Those that somebody else answers now."""
    covered: int
    """Those that an expert answers now, and not the model alone."""
    loss_then: float
    """By the routes of then, nats per token."""
    loss_now: float
    final: bool
    """Whether the expert that was asked then was sealed already; another one went on learning."""


def routes_of(run: RunReader, opened: Reopened) -> tuple[KeptRoutes, ...]:
    """Route the passages again that a run has kept; nothing where its method does not route."""
    lines = {line["stage"]: line for line in run.promises()}
    probes = {int(path.stem.removeprefix("stage")): path for path in run.probes()}
    found = []
    for stage in range(opened.progress.stage):
        routes = lines.get(stage, {}).get("routes", {})
        try:
            kept = read_probes(probes[stage]) if routes else []
        except (KeyError, OSError, SafetensorError):
            continue  # `answers_of` says so
        for probe in kept:
            if probe.passages is None or probe.losses is None:
                continue
            then = routes[str(probe.task)]
            now = opened.method.routes(probe.passages)
            losses = passage_losses(opened.method.answerer(opened.model), probe.passages)
            found.append(
                KeptRoutes(
                    stage=f"{stage + 1} {opened.stream.stages[stage].name}",
                    task=opened.stream.names[probe.task],
                    passages=len(now),
                    astray=sum(a != b for a, b in zip(then, now, strict=True)),
                    covered=sum(name is not None for name in now),
                    loss_then=float(probe.losses.mean()),
                    loss_now=float(losses.mean()),
                    final=lines[stage].get("answerers", {}).get(str(probe.task)) is not None,
                )
            )
    return tuple(found)


def lost_by_routes(routes: Iterable[KeptRoutes]) -> float | None:
    """F_route: the mean rise of the loss of passages whose experts were sealed then, nats per token."""
    final = [one for one in routes if one.final]
    return fmean(one.loss_now - one.loss_then for one in final) if final else None


def coverage(routes: Sequence[KeptRoutes]) -> float | None:
    """The share of passages that an expert answers now."""
    passages = sum(one.passages for one in routes)
    return sum(one.covered for one in routes) / passages if passages else None
