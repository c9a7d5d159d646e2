"""What a comparison of decoding comes to."""

from __future__ import annotations

from typing import Any

import pytest

from cambia.reporting.decoding import verdict


def row(name: str, reward: float, tokens: int = 0) -> dict[str, Any]:
    return {"name": name, "reward": reward, "spread": 0.03, "tokens": tokens, "parameters": f"as {name}"}


@pytest.mark.parametrize(
    ("learned", "said"),
    [
        (0.9, "What was learned earns 0.400 more than T 1, the best without a search."),
        (0.52, "What was learned and T 1, the best without a search, differ by less than their spread."),
        (0.1, "T 1 earns 0.400 more than what was learned: decode with its parameters (as T 1)"),
    ],
)
def test_what_was_learned_is_compared_with_the_best_without_a_search(learned: float, said: str) -> None:
    rows = [row("learned", learned, 100), row("T 1", 0.5), row("greedy", -3.0), row("grid of 27", 2.0, 900)]
    assert verdict({"rows": rows}).startswith(said)
