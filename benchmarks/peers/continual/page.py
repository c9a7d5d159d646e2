"""The page: that both sides do the same, what the methods come to, and EWC over its strength."""

# R[i][j]: bits per byte on task j after task i

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import table

from cambia.evaluation import transfer_metrics
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
    kinds = {
        kind: [Pair(Run(**one["run"]), one["ours"], one["theirs"]) for one in result[kind]]
        for kind in ("checks", "arms", "tuning")
    }
    parts = [
        _checks(kinds["checks"], kinds["arms"]),
        _arms(kinds["arms"]),
        _tuning(kinds["tuning"], result["taken"]),
        _about(result["avalanche"]),
    ]
    return "\n\n".join(parts)


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
        same_rows = Run("naive", run.stream, run.seed, run.optimizer, run.steps)
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


def _arms(arms: Sequence[Pair]) -> str:
    head = ["tasks", "optimizer", "method", "side", "final average", "forgetting", "learning"]
    rows = []
    for kind in dict.fromkeys((p.run.stream, p.run.optimizer, p.run.method) for p in arms):
        pairs = [p for p in arms if (p.run.stream, p.run.optimizer, p.run.method) == kind]
        ours, theirs = _columns(p.ours for p in pairs), _columns(p.theirs for p in pairs)
        both = zip(ours, theirs, strict=True)
        less = [[a - b for a, b in zip(*columns, strict=True)] for columns in both]
        stream, optimizer, method = kind
        named = [stream, OPTIMIZERS[optimizer], LABELS[method]]
        rows += [
            [*named, "Cambia", *map(_summary, ours)],
            [*named, "Avalanche", *map(_summary, theirs)],
            [*named, "Cambia less Avalanche", *map(interval, less)],
        ]
    return table(head, rows)


def _tuning(pairs: Sequence[Pair], taken: dict[str, dict[str, float]]) -> str:
    head = ["tasks", "side", "strength", "final average", "forgetting", "learning", "taken"]
    rows = []
    for stream in taken:
        mine = [p for p in pairs if p.run.stream == stream]
        for side, label, name in (("ours", "Cambia", "strength"), ("theirs", "Avalanche", "ewc_lambda")):
            for strength in dict.fromkeys(getattr(p.run, name) for p in mine):
                columns = _columns(getattr(p, side) for p in mine if getattr(p.run, name) == strength)
                means = (f"{mean(column):.3f}" for column in columns)
                mark = "✓" * (taken[stream][name] == strength)
                rows.append([stream, label, f"`{name}` {strength:.3g}", *means, mark])
    seeds = len({p.run.seed for p in pairs})
    return f"EWC over its strength, {plural(seeds, 'other seed')}:\n\n{table(head, rows)}"


def _about(versions: dict[str, Any]) -> str:
    said = (
        f"Avalanche {versions['avalanche']}, torch {versions['torch']}, torchvision {versions['torchvision']}"
    )
    return said + ("." if versions["torchvision_operators"] else ", whose compiled operators did not load.")


def _apart(one: Matrix, other: Matrix) -> float:
    return max(
        abs(a - b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


def _columns(matrices: Iterable[Matrix]) -> list[list[float]]:
    """A column of each measure."""
    found = [transfer_metrics(matrix, [str(j) for j in range(len(matrix[0]))]) for matrix in matrices]
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
