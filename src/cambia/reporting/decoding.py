"""A policy that has learned, beside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_Table = tuple[str, list[str], list[list[str]]]


def judged_tables(decoding: Mapping[str, Any]) -> Iterator[_Table]:
    """What each policy is worth, and what its reward consists of: title, head, rows.

    Args:
        decoding: of summary.json.
    """
    rows = decoding["rows"]
    head = ["decoding", "parameters", "reward", "repeated", "distinct", "tokens", "nats/token", "to find it"]
    yield (
        "On prompts that none of them has seen, the higher the reward the better",
        head,
        [
            [
                row["name"],
                row["parameters"],
                f"{row['reward']:.3f} ± {row['spread']:.3f}" if row["spread"] else f"{row['reward']:.3f}",
                f"{row['repeated']:.3f}",
                f"{row['distinct']:.3f}",
                f"{row['length']:.1f}",
                "-" if row["nats_per_token"] is None else f"{row['nats_per_token']:.3f}",
                f"{row['tokens']:,}",
            ]
            for row in rows
        ],
    )
    parts = list(rows[0]["parts"])
    if len(parts) > 1:
        yield (
            "What the reward consists of",
            ["decoding", "parameters", *parts],
            [
                [row["name"], row["parameters"], *(f"{row['parts'][part]:.3f}" for part in parts)]
                for row in rows
            ],
        )
