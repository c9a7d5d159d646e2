"""The page: two tables in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from harness import spread, table

from peers.arms import COMPUTED, DEPTH, FEED_FORWARD
from peers.sides import SIDES

_LABELS = {arm.name: arm.label for arm in [*FEED_FORWARD, *DEPTH]} | COMPUTED
_REFERENCE = {**{arm.name: "random" for arm in FEED_FORWARD}, **dict.fromkeys(COMPUTED, "random")} | {
    arm.name: "layers" for arm in DEPTH
}


def markdown(result: dict[str, Any]) -> str:
    """What every side made of the checkpoint, and how training went on."""
    return f"{_sides(result['facts'], result['costs'])}\n\n{_training(result['training'])}"


def _sides(facts: dict[str, Any], costs: dict[str, Any]) -> str:
    head = [
        "what grows",
        "with",
        "logit error",
        "new entries alive",
        "optimizer",
        "stock class",
        "seconds, from file to file",
        "of which growing",
        "a tiny model's",
        "peak MB",
        "what it cannot",
    ]
    rows = []
    for side in SIDES:
        fact = facts.get(side.name)
        if fact is None:
            continue
        if "failed" in fact:
            rows.append([side.operation, side.library, f"did not run: {fact['failed']}", *[""] * 8])
            continue
        cost = costs.get(side.name, {})
        growing = cost.get("grow_seconds")
        rows.append(
            [
                side.operation,
                side.library,
                _error(fact["logit_error"]),
                f"{fact['alive']:.0%}" if "alive" in fact else "",
                fact.get("optimizer", "not there"),
                "yes" if fact["stock"] else "no",
                f"{cost['seconds'][0]:.1f}" if cost else "",
                f"{growing:.2f}" if growing is not None else "",
                f"{cost['start_up_seconds']:.1f}" if cost else "",
                f"{cost['anonymous_bytes'] / 1e6:.0f}" if cost else "",
                side.cannot,
            ]
        )
    return table(head, rows)


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"**{value:.2f}**"


def _training(rows: Sequence[dict[str, Any]]) -> str:
    head = [
        "arm",
        "parameters",
        "loss when grown",
        "loss at the end",
        "above the first of Cambia's",
        "clones",
    ]
    lines = []
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    at_end = {(row["arm"], row["seed"]): row["loss_trained"] for row in rows}
    for arm in arms:
        of = [row for row in rows if row["arm"] == arm]
        reference = _REFERENCE[arm]
        above = [row["loss_trained"] - at_end[reference, row["seed"]] for row in of]
        clones = [row["clone_cosine"] for row in of if "clone_cosine" in row]
        lines.append(
            [
                _LABELS[arm],
                f"{of[0]['parameters']:,}",
                f"{statistics.fmean(row['loss_grown'] for row in of):.3f}",
                f"{statistics.fmean(row['loss_trained'] for row in of):.4f}",
                "" if arm == reference else spread(above, 4),
                f"{statistics.fmean(clones):.4f}" if clones else "",
            ]
        )
    return table(head, lines)
