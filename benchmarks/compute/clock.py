"""How long the arms take: short runs of each, in turns, so that all see the same machine.

The runs that are scored take hours, beside each other and beside whatever else the machine does, so their own
clocks compare nothing. A short run of the same arm grows at even distances; its steps at each size, and its
growth, are what a long run is made of. A size takes the same time in whichever arm it comes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cambia import rundir
from cambia.experiment.build import train_in
from cambia.experiment.tree import experiment_from
from cambia.rundir import RunReader
from compute.curves import Ran

STEPS = 40
"""Of a short run at each of its sizes."""
WARMUP = 5
"""Steps at each size that do not count."""
ROUNDS = 5


@dataclass(frozen=True)
class Pace:
    """What an arm takes."""

    steps: tuple[float, ...]
    """Seconds of a step at each of its sizes, medians."""
    growths: tuple[float, ...]
    """Seconds of growing to the second size, and so on, checking it included."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Pace:
        return cls(tuple(found["steps"]), tuple(found["growths"]))

    def seconds(self, run: Ran, step_tokens: int) -> float:
        """Of a run that grew where this one did, without scoring."""
        grown = [0.0, *dict.fromkeys(run.grown_at), 1.0]
        parts = [after - before for before, after in pairwise(grown)]
        taken = sum(share * each for share, each in zip(parts, self.steps, strict=False))
        return run.tokens / step_tokens * taken + sum(self.growths[: len(parts) - 1])


def short(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm, over as many steps at each of its sizes, scored on next to nothing."""
    rules = [dict(rule) for rule in tree.get("growth.rules", ())]
    planned = [rule["when"].get("at_fractions") or rule["when"].get("at_steps") or () for rule in rules]
    every = sorted(set().union(*planned))  # rules of one share grow together
    times = len(every) or max((rule["max_events"] for rule in rules), default=0)
    for rule, own in zip(rules, planned, strict=True):
        places = [every.index(each) for each in own] or range(times)
        shares = [(place + 1) / (times + 1) for place in places]
        rule["when"] = {"type": "schedule", "at_fractions": shares}
    return {
        **tree,
        **({"growth.rules": rules} if rules else {}),
        "training.steps": STEPS * (times + 1),
        "growth.rewarm_steps": WARMUP,  # a small part of a long run
        "evaluation.decayed_at": [],
        "evaluation.max_bytes": 4096,
        "checkpoint.every_steps": None,
    }


def paces(base: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Pace]:
    """The pace of every arm."""
    steps: dict[int, list[float]] = {}
    growths: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    sizes: dict[str, list[int]] = {}
    for i in range(ROUNDS):
        for arm in list(arms)[:: -1 if i % 2 else 1]:
            experiment = experiment_from(base, source="the benchmark", flags=short(arms[arm]))
            with tempfile.TemporaryDirectory() as folder:
                train_in(Path(folder), experiment)
                run = RunReader(folder)
                clock = [*run.rows(rundir.TIMING)]
                parameters = [row["parameters"] for row in run.rows(rundir.METRICS)]
            sizes[arm] = parameters[STEPS // 2 :: STEPS]
            growths[arm].append([row["growth_seconds"] for row in clock[STEPS - 1 : -1 : STEPS]])
            for place, row in enumerate(clock):
                if WARMUP <= place % STEPS < STEPS - 1:
                    steps.setdefault(parameters[place], []).append(row["seconds"])
    return {
        arm: Pace(
            tuple(statistics.median(steps[size]) for size in sizes[arm]),
            tuple(statistics.median(each) for each in zip(*growths[arm], strict=True)),
        )
        for arm in arms
    }
