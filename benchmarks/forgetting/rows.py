"""The rows of the continual benchmark: each method with the settings that are tried for it.

Every method gets as many trials: those with a knob of their own share them between it and the learning rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

RATE = "optimizer.learning_rate"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the tables."""

    label: str
    trials: Sequence[Settings]
    """Settings of the experiment, one of which is chosen by its final average loss on other domains."""
    needs: str = ""
    """What somebody must give: boundaries, the task at test time, stored text."""
    matters: bool = False
    """Whether the preset `full` has it, which has few methods and many cells."""


def tried(kind: str, rates: Iterable[float], **knobs: Sequence[Any]) -> list[Settings]:
    """Every combination of rates and knobs of one method."""
    combinations = itertools.product(rates, *knobs.values())
    return [
        {RATE: rate, "methods": [{"type": kind, **dict(zip(knobs, values, strict=True))}]}
        for rate, *values in combinations
    ]


WIDE = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.008)
TWO, LORA = (0.001, 0.003), (0.003, 0.008)
DARK = {"type": "derpp", "on_top": True, "logits": 16}

ROWS: dict[str, Row] = {
    "naive": Row("naive fine-tuning", tried("naive", WIDE), matters=True),
    "joint": Row("joint, all tasks at once", tried("joint", WIDE), "all text", matters=True),
    "cumulative": Row("cumulative", tried("cumulative", WIDE), "all text so far, boundaries"),
    "replay_on_top": Row(
        "replay, rows on top",
        tried("replay", TWO, fraction=[0.1, 0.25, 0.5], on_top=[True]),
        "text, boundaries",
        matters=True,
    ),
    "replay": Row(
        "replay, equal total text",
        tried("replay", TWO, fraction=[0.1, 0.25, 0.5]),
        "text, boundaries",
        matters=True,
    ),
    "replay_written": Row(
        "replay of own writing, on top",
        tried("replay", TWO, fraction=[0.1, 0.25, 0.5], on_top=[True], text=["written"]),
        "boundaries",
    ),
    "derpp": Row(
        "DER++, rows on top",
        [
            {RATE: rate, "methods": [{**DARK, "fraction": fraction, "alpha": alpha}]}
            for rate in TWO
            for fraction, alpha in ((0.25, 0.1), (0.5, 0.1), (0.5, 0.02))
        ],
        "text, boundaries",
    ),
    "agem": Row("A-GEM", tried("agem", TWO, rows=[4, 8, 16]), "text, boundaries"),
    "ewc": Row("EWC, online", tried("ewc", TWO, strength=[10.0, 1e3, 1e5]), "boundaries"),
    "lwf": Row("LwF", tried("lwf", TWO, strength=[0.1, 0.5, 2.0]), "boundaries"),
    "lora": Row(
        "LoRA, one for all tasks",
        [
            {RATE: rate, "methods": [{"type": "lora", "rank": rank, "whole": whole}]}
            for rate in LORA
            for rank, whole in ((16, True), (16, False), (32, False))
        ],
    ),
    "olora": Row(
        "O-LoRA",
        [
            {RATE: rate, "methods": [{"type": "olora", "strength": strength, "whole": whole}]}
            for rate in LORA
            for strength, whole in ((1.0, False), (10.0, False), (1.0, True))
        ],
        "boundaries",
    ),
    "osf": Row("orthogonal subspaces (OSF)", tried("osf", TWO, keep=[None, 0.25, 0.75]), "boundaries"),
    "masks": Row("element masks", tried("masks", TWO, share=[0.2, 0.4, 0.6]), "boundaries"),
    "freeze": Row("embeddings and lowest layer frozen", tried("freeze", WIDE, after=[0])),
    "lora_per_task": Row(
        "LoRA per task, told which",
        tried("lora_per_task", LORA, rank=[8, 16, 32]),
        "boundaries, task at test time",
        matters=True,
    ),
    "full_per_task": Row(
        "specialists, told which",
        tried("full_per_task", WIDE),
        "boundaries, task at test time",
        matters=True,
    ),
}
REFERENCE = "full_per_task"
"""The row that intransigence is measured against."""
