"""What a run with experts came to: each expert, and what it and the others make of each text.

It is written into summary.json when the run ends: `experts`, a line for each of them, and `texts`, a line for
each task. A text is scored by the model alone, as the experts are routed, and by the expert that learned it.
"""

# N rows

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cambia import rundir
from cambia.continual.methods.experts import Experts
from cambia.data.streams import Stream
from cambia.evaluation import Route, task_matrix
from cambia.models.routing.routes import Routes
from cambia.rundir import RunReader
from cambia.training import Trainer

_ROWS = 512
"""Passages of a text whose routes are counted, at most."""


def learned(trainer: Trainer, stream: Stream, run: RunReader) -> dict[str, Any]:
    """`experts` and `texts` of a run that is over; nothing where its method has no experts."""
    method = trainer.method
    if not isinstance(method, Experts):
        return {}
    return {"experts": _experts(method, stream), "texts": _texts(trainer, method, stream, run)}


def totals(found: Mapping[str, Any]) -> dict[str, float]:
    """What `learned` found, in a few numbers."""
    if not found:
        return {}
    texts, experts = found["texts"], found["experts"]
    return {
        "experts": float(len(experts)),
        "expert_parameters": float(sum(expert["parameters"] for expert in experts)),
        "expert_bytes": float(sum(expert["bytes"] for expert in experts)),
        "base_bits_per_byte": fmean(text["base"] for text in texts),
        "coverage": fmean(text["covered"] for text in texts),
        "routed_right": fmean(text["right"] for text in texts),
    }


def _experts(method: Experts, stream: Stream) -> list[dict[str, Any]]:
    taught = method.taught()
    found = []
    for name in method.experts.names:
        part = method.experts[name]
        rows = taught.get(name, {})
        found.append(
            {
                "name": name,
                "state": part.state,
                "learned_from": sorted(rows, key=lambda source: -rows[source]),
                "tokens": sum(rows.values()) * stream.sequence_length,
                "parameters": part.num_parameters,
                "bytes": sum(p.numel() * p.element_size() for p in part.parameters()),
                "sha256": part.sha256,
            }
        )
    return found


def _texts(trainer: Trainer, method: Experts, stream: Stream, run: RunReader) -> list[dict[str, Any]]:
    scored = run.rows(rundir.EVAL)
    own, told = _last(scored, "own"), _last(scored, "oracle")
    found = []
    for task, name in enumerate(stream.names):
        with method.experts.answered_by(None):
            base = trainer.scorer.task(stream, task, "test", "own")
        right = method.right(name)
        routes = _routes(trainer, stream, task)
        counts, rows = Counter(routes.names), len(routes.names)
        found.append(
            {
                "name": name,
                "base": base.bits_per_byte if base is not None else None,
                "own": own[name],
                "told": told[name],
                "expert": right,
                "passages": rows,
                "right": counts[right] / rows,
                "covered": 1 - counts[None] / rows,
                "confidence": float(routes.confidence.mean()),
                "entropy": float(routes.entropy.mean()),
            }
        )
    return found


def _last(scored: Sequence[Mapping[str, Any]], route: Route) -> dict[str, float]:
    """Bits per byte of each text after the last stage."""
    matrix = task_matrix(scored, split="test", route=route)
    return dict(zip(matrix.tasks, matrix.rows[-1], strict=True))


def _routes(trainer: Trainer, stream: Stream, task: int) -> Routes:
    """Who answers passages of a text."""
    found: list[Routes] = []
    for batch in trainer.scorer.texts(stream, task, "test"):
        found.append(trainer.method.answerer(trainer.model).decide(batch.input_ids))
        if sum(len(routes.names) for routes in found) >= _ROWS:
            break
    return Routes.joined(found)
