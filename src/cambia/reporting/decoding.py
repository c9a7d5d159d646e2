"""How decoding has learned: its course over a run, and what came of it beside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cambia.reporting.markup import Html, join, table, tag
from cambia.reporting.run import Run

_Table = tuple[str, list[str], list[list[str]]]


def judged_tables(decoding: Mapping[str, Any]) -> Iterator[_Table]:
    """What each policy is worth, and what its reward consists of: title, head, rows.

    Args:
        decoding: of summary.json.
    """
    rows = decoding["rows"]
    yield (
        "On prompts that none of them has seen; the higher the reward the better",
        ["decoding", "reward", "repeated", "distinct", "tokens", "nats/token", "to find it"],
        [
            [
                row["name"],
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
    yield (
        "Parameters, and what the reward consists of",
        ["decoding", "parameters", *parts],
        [[row["name"], row["parameters"], *(f"{row['parts'][part]:.3f}" for part in parts)] for row in rows],
    )


def verdict(decoding: Mapping[str, Any]) -> str:
    """What the comparison comes to: whether what was learned is better than what takes no search."""
    learned, *others = decoding["rows"]
    best = max((row for row in others if not row["tokens"]), key=lambda row: row["reward"])
    gain = learned["reward"] - best["reward"]
    noise = (learned["spread"] ** 2 + best["spread"] ** 2) ** 0.5
    if gain > noise:
        return f"What was learned earns {gain:.3f} more than {best['name']}, the best without a search."
    if gain < -noise:
        return (
            f"{best['name']} earns {-gain:.3f} more than what was learned: decode with its parameters "
            f"({best['parameters']}), or learn with more text and tokens."
        )
    return (
        f"What was learned and {best['name']}, the best without a search, differ by less than their spread."
    )


def side_by_side(decoding: Mapping[str, Any]) -> list[dict[str, str]]:
    """What some policies write behind prompts: the prompt and how it really goes on come first."""
    first = ("prompt", "people", "learned")
    return [
        {name: sample[name] for name in [*first, *(name for name in sample if name not in first)]}
        for sample in decoding["samples"]
    ]


def decoding_tables(run: Run) -> list[Html]:
    """What was learned beside others, as parts of the page; none before it was compared."""
    parts: list[Html] = []
    judged = run.summary.get("decoding")
    if judged:
        for title, head, rows in judged_tables(judged):
            words = 1 + (head[1] == "parameters")
            shown = table(head, rows, numbers=range(words, len(head)))
            parts.append(join([tag("h3", title), tag("div", shown, class_="wide")]))
        parts.append(tag("p", verdict(judged)))
        samples = side_by_side(judged)
        names = list(samples[0]) if samples else []
        shown = table(names, [list(sample.values()) for sample in samples])
        parts.append(join([tag("h3", "Side by side"), tag("div", shown, class_="wide")]))
    return parts
