"""The plainest router: whoever foretells a prefix best answers it. Everybody has to read it."""

# B prefixes, K who may answer

from __future__ import annotations

from collections.abc import Sequence

import torch

from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.routes import Routes, entropy


def likeliest(prefixes: Prefixes, names: Sequence[str | None], chosen: Routes | None = None) -> Routes:
    """Who of some Parts foretells each prefix best; of equals the first.

    Args:
        names: Parts, or None for the base.
        chosen: who was found before by other means, and stays where none of these is better.
    """
    rows, columns = len(prefixes), [prefixes.losses(name) for name in names]
    others: list[tuple[str | None, ...]] = [tuple(name for _ in range(rows)) for name in names]
    if chosen is not None:
        found = torch.zeros(rows, dtype=torch.float64)
        for name in dict.fromkeys(chosen.names):
            mine = torch.tensor([i for i, other in enumerate(chosen.names) if other == name])
            found[mine] = prefixes.losses(name, mine)
        columns, others = [found, *columns], [chosen.names, *others]
    losses = torch.stack(columns)  # (K, B)
    shares = torch.softmax(-losses * (prefixes.lengths - 1).clamp_min(1), 0)
    best = losses.argmin(0)
    return Routes(
        tuple(others[k][row] for row, k in enumerate(best.tolist())),
        shares.gather(0, best[None])[0],
        entropy(shares),
        rows * sum(name is not None for name in names) + (0 if chosen is None else chosen.passes),
    )
