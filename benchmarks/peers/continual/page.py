"""The page: that both sides do the same, what the methods come to, and EWC over its strength."""

# R[i][j]: bits per byte on task j after task i

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import table

from cambia.evaluation import TransferMetrics, transfer_metrics
from cambia.reporting.sweeps.statistics import mean, spread, t_tail
from cambia.reporting.units import plural
from peers.continual.course import Matrix, Run

COLUMNS = ("final_mean", "forgetting", "learning_loss")
LABELS = {"naive": "naive", "ewc": "EWC", "replay": "replay", "agem": "A-GEM"}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
DRAWN = {
    "naive": "nothing is",
    "ewc": "Cambia takes Avalanche's Fisher information",
    "replay": "the first task is one row",
    "agem": "the first task is one row",
}


@dataclass(frozen=True)
class Pair:
    """A run on both sides."""

    run: Run
    ours: Matrix
    theirs: Matrix

    @property
    def difference(self) -> float:
        """The largest of one score."""
        return _apart(self.ours, self.theirs)


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    tasks = result["tasks"]
    kinds = {
        kind: [Pair(Run(**one["run"]), one["ours"], one["theirs"]) for one in result[kind]]
        for kind in ("checks", "arms", "tuning")
    }
    return "\n\n".join(
        [
            _checks(kinds["checks"], kinds["arms"]),
            _arms(kinds["arms"], tasks),
            _tuning(kinds["tuning"], tasks, result["taken"]),
            _about(result["avalanche"]),
        ]
    )


def _checks(checks: Sequence[Pair], arms: Sequence[Pair]) -> str:
    head = ["method", "optimizer", "what is drawn", "largest difference", "largest change against naive"]
    rows = []
    plain = [p for p in arms if p.run.method == "naive"]
    for optimizer in dict.fromkeys(p.run.optimizer for p in plain):
        apart = max(p.difference for p in plain if p.run.optimizer == optimizer)
        rows.append(["naive", OPTIMIZERS[optimizer], DRAWN["naive"], f"{apart:.0e}", ""])
    for pair in checks:
        run = pair.run
        if run.method == "naive":
            continue
        same_rows = Run("naive", run.seed, run.optimizer, run.steps, stream=run.stream)
        naive = next(p for p in checks if p.run == same_rows)
        rows.append(
            [
                LABELS[run.method],
                OPTIMIZERS[run.optimizer],
                DRAWN[run.method],
                f"{pair.difference:.0e}",
                f"{_apart(pair.ours, naive.ours):.2f}",
            ]
        )
    return table(head, rows)


def _arms(arms: Sequence[Pair], tasks: Sequence[str]) -> str:
    head = ["optimizer", "method", "side", "final average", "forgetting", "learning"]
    rows = []
    for optimizer, method in dict.fromkeys((p.run.optimizer, p.run.method) for p in arms):
        pairs = [p for p in arms if (p.run.optimizer, p.run.method) == (optimizer, method)]
        ours, theirs = (_columns([getattr(p, side) for p in pairs], tasks) for side in ("ours", "theirs"))
        less = [
            [a - b for a, b in zip(mine, other, strict=True)]
            for mine, other in zip(ours, theirs, strict=True)
        ]
        named = [OPTIMIZERS[optimizer], LABELS[method]]
        rows += [
            [*named, "Cambia", *map(_summary, ours)],
            [*named, "Avalanche", *map(_summary, theirs)],
            [*named, "Cambia less Avalanche", *map(interval, less)],
        ]
    return table(head, rows)


def _tuning(pairs: Sequence[Pair], tasks: Sequence[str], taken: dict[str, float]) -> str:
    head = ["side", "strength", "final average", "forgetting", "learning", "taken"]
    rows = []
    for side, label, name in (("ours", "Cambia", "strength"), ("theirs", "Avalanche", "ewc_lambda")):
        for strength in dict.fromkeys(getattr(p.run, name) for p in pairs):
            of = [getattr(p, side) for p in pairs if getattr(p.run, name) == strength]
            means = (f"{mean(column):.3f}" for column in _columns(of, tasks))
            rows.append([label, f"`{name}` {strength:.3g}", *means, "✓" * (taken[name] == strength)])
    seeds = len({p.run.seed for p in pairs})
    return f"EWC over its strength, {plural(seeds, 'seed')} of their own:\n\n{table(head, rows)}"


def _about(versions: dict[str, Any]) -> str:
    said = (
        f"Avalanche {versions['avalanche']}, torch {versions['torch']}, torchvision {versions['torchvision']}"
    )
    return said + ("." if versions["torchvision_operators"] else ", whose compiled operators did not load.")


def _apart(one: Matrix, other: Matrix) -> float:
    return max(
        abs(a - b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


def _columns(matrices: Iterable[Matrix], tasks: Sequence[str]) -> list[list[float]]:
    found: list[TransferMetrics] = [transfer_metrics(matrix, tasks) for matrix in matrices]
    return [[getattr(one, name) for one in found] for name in COLUMNS]


def _summary(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {spread(values):.3f}" if len(values) > 1 else f"{mean(values):.3f}"


def interval(values: Sequence[float]) -> str:
    """Mean of paired differences with Student's 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):+.3f}"
    half = _t_quantile(len(values) - 1) * spread(values) / math.sqrt(len(values))
    low, middle, high = (f"{mean(values) + step:+.3f}" for step in (-half, 0.0, half))
    return f"{middle} ({low} to {high})"


def _t_quantile(degrees: int) -> float:
    """What |T| exceeds in 5 % of cases, by bisection."""
    low, high = 0.0, 20.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 0.05 else (low, middle)
    return high
