"""What is seen of a stream while Parts learn from it: whose its rows are, and how certain that is.

It costs no pass of a model. Who answers a text is decided by the router, which reads beginnings and may ask
Parts; what stands here is by how strange each row is to each known domain, which the allocator has measured
anyway. How certain the router itself is stands beside each text at the end of a run.
"""

# N rows, K known domains

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cambia.continual.novelty.detector import Verdict
from cambia.models.routing.routes import entropy

MEASURES = (
    "novelty",
    "novel_rows",
    "known_rows",
    "held_out_loss",
    "maturity",
    "parts",
    "active_parts",
    "top_share",
    "routing_confidence",
    "routing_entropy",
)
"""What a stream's allocator measures, by name: see docs/experts.md."""


def use_of(owners: Sequence[str | None], parts: Sequence[str]) -> dict[str, int]:
    """For each Part, how many rows are its own.

    Args:
        owners: (N,), whose each row is; None: nobody's, or the base's.
        parts: all there are.
    """
    return {part: sum(owner == part for owner in owners) for part in parts}


def shares_of(use: dict[str, int], rows: int) -> dict[str, float]:
    """How many Parts there are, how many of them are at work, and how much of it the busiest one has."""
    return {
        "parts": float(len(use)),
        "active_parts": float(sum(count > 0 for count in use.values())),
        "top_share": max(use.values(), default=0) / max(1, rows),
    }


def certainty(verdict: Verdict, owners: Sequence[str | None]) -> dict[str, float]:
    """How certain it is whose the rows are that a known domain accepts, mean; nothing where there are none.

    Confidence is the probability of the one that a row was taken for, entropy (nats) that of all. They are
    probabilities as if strangeness to its own domain were normal, and no row too ordinary.

    Args:
        owners: (K,) whose each domain is; domains of one owner count as one.
    """
    known = (~verdict.novel).nonzero()[:, 0]
    if not len(known) or not owners:
        return {}
    names = list(dict.fromkeys(owners))
    places = torch.tensor([names.index(owner) for owner in owners])
    strangeness = verdict.strangeness[known]
    by_domain = torch.softmax(-strangeness.clamp_min(0).square() / 2, 1)  # (N, K)
    shares = by_domain.new_zeros(len(known), len(names)).index_add(1, places, by_domain)
    chosen = places[strangeness.argmin(1)]
    return {
        "routing_confidence": float(shares.gather(1, chosen[:, None]).mean()),
        "routing_entropy": float(entropy(shares, 1).mean()),
    }


# ---- who was taught what -------------------------------------------------------------------------


def count_taught(taught: dict[str, dict[str, int]], name: str, sources: Sequence[str]) -> None:
    """Note that a Part was taught rows of some sources."""
    counts = taught.setdefault(name, {})
    for source in sources:
        counts[source] = counts.get(source, 0) + 1


def taught_most(taught: Mapping[str, Mapping[str, int]], source: str) -> str | None:
    """The Part that was taught most of a source; None: nobody was taught any."""
    counts = {name: sources[source] for name, sources in taught.items() if source in sources}
    return max(counts, key=counts.__getitem__, default=None)
