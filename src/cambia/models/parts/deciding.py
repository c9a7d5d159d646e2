"""The ways to choose who answers, all told by name: ``experts.routing = "compete"``.

* ``compete``, ``first_claim``: the closed-form router (`cambia.models.routing.router`). Experts of which it
  has no statistics (adapters made elsewhere) answer what they foretell better than whom it names, under
  ``compete``; `LoraExperts.calibrate` lets it know them.
* ``likelihood``: whoever foretells the prefix best. Every expert reads it.
* ``hybrid``: a router that is trained, by the router's distributions of features; texts of experts that are
  still taught are answered by a mixture of all.
* ``arrow``: every token, at every layer, by the directions of the experts' own weights.

Where it is known who should answer, `LoraExperts.routed` and `answered_by` say so.
"""

# B prefixes

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cambia.config import did_you_mean
from cambia.errors import ConfigError
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.routing.arrow import ArrowRouter
from cambia.models.routing.hybrid import DynamicHybridRouter
from cambia.models.routing.likelihood import likeliest
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.routes import Routes, entropy
from cambia.nn.deltas import LowRank

if TYPE_CHECKING:
    from cambia.models.parts.lora_experts import LoraExperts

ROUTINGS = ("compete", "first_claim", "likelihood", "hybrid", "arrow")


def check_routing(name: str) -> str:
    """A name of `ROUTINGS`.

    Raises:
        ConfigError: it is none.
    """
    if name not in ROUTINGS:
        raise ConfigError(f"there is no routing {name!r}{did_you_mean(name, ROUTINGS)}")
    return name


@dataclass(frozen=True, eq=False)
class Answer:
    """Who answers some sequences."""

    block: Callable[[], AbstractContextManager[Any]]
    """Inside of it they do."""
    by_experts: tuple[bool, ...]
    """For each whether experts have a part in it; the others are answered by the model alone."""


def answer_to(experts: LoraExperts, prefixes: Prefixes) -> Answer:
    """Who answers sequences that begin so."""
    if experts.routing == "hybrid" and (router := hybrid_of(experts)) is not None:
        weights = router.weights(prefixes.features()).to(experts.device)
        return Answer(lambda: experts.mixed(router.names, weights), (True,) * len(prefixes))
    names = decided(experts, prefixes).names
    return Answer(lambda: experts.routed(names), tuple(name is not None for name in names))


def decided(experts: LoraExperts, prefixes: Prefixes, before: Sequence[str | None] | None = None) -> Routes:
    """Which expert answers each prefix, or answers most of it.

    Raises:
        ConfigError: nothing is decided by prefixes; or a sealed expert cannot claim anything.
    """
    if experts.routing == "arrow":
        raise ConfigError(
            'routing="arrow" decides token by token and layer by layer: no sequence has one expert'
        )
    for name in {name for name in before or () if name is not None}:
        experts[name]
    if experts.routing == "hybrid":
        return _by_weight(experts, prefixes)
    if experts.routing == "likelihood":
        return likeliest(prefixes, [None, *experts.names])
    unknown = [name for name in experts.names if not experts.router.knows(name)]
    if experts.routing == "first_claim":
        for name in unknown:
            if experts[name].state == "sealed":
                raise ConfigError(
                    f"the router has no statistics of LoRA expert {name!r}, so it can claim nothing: "
                    f'calibrate({name!r}, rows of its text), or routing="likelihood"'
                )
    experts.router.routing = experts.routing
    found = experts.router.route(prefixes, before)
    return likeliest(prefixes, unknown, found) if unknown and experts.routing == "compete" else found


# ---- the routers beside the closed-form one --------------------------------------------------------


def hybrid_of(experts: LoraExperts) -> DynamicHybridRouter | None:
    """A router trained on the distributions that the closed-form one keeps; None while there is none."""
    known = [d for d in experts.router.domains.values() if d.answers == d.name]
    if not known:
        return None
    key = ("hybrid", *((d.name, id(d.gaussian), d.is_sealed) for d in known))
    if experts.made_router is None or experts.made_router[0] != key:
        router = DynamicHybridRouter(len(known[0].gaussian.mean), seed=experts.seed)
        for domain in known:
            router.add_expert(domain.name, domain.gaussian)
            if domain.is_sealed:
                router.settle(domain.name)
        router.fit()
        experts.made_router = key, router
    return experts.made_router[1]


def _by_weight(experts: LoraExperts, prefixes: Prefixes) -> Routes:
    router = hybrid_of(experts)
    if router is None:
        return Routes.base(len(prefixes))
    shares = torch.softmax(router.logits(prefixes.features()).detach().double(), -1)  # (B, E)
    certain, best = shares.max(1)
    return Routes(tuple(router.names[i] for i in best.tolist()), certain, entropy(shares, 1))


def by_arrow(experts: LoraExperts) -> AbstractContextManager[Any]:
    """Inside the block every token goes through the expert whose weights it is nearest to.

    Raises:
        ConfigError: an expert has deltas that have no direction.
    """
    key = ("arrow", *((name, experts[name].state) for name in experts.names))
    if experts.made_router is None or experts.made_router[0] != key or experts.sealed != experts.names:
        arrow = ArrowRouter()
        for name in experts.names:
            arrow.add(name, _low_rank(experts[name]))
        experts.made_router = key, arrow
    arrow = experts.made_router[1]
    places = {name: i for i, name in enumerate(experts.names)}

    def weights(module: str, x: Tensor) -> Tensor:
        found = arrow.weights(module, x)
        spread = found.new_zeros(*found.shape[:-1], len(places))
        spread[..., [places[name] for name in arrow.names(module)]] = found
        return spread

    return experts.mixed(experts.names, weights)


def _low_rank(part: LoraExpert) -> dict[str, tuple[Tensor, Tensor]]:
    layers: dict[str, tuple[Tensor, Tensor]] = {
        path: (d.A, d.B) for path, d in part.by_module.items() if isinstance(d, LowRank)
    }
    others = sorted(part.by_module.keys() - layers.keys())
    if others:
        raise ConfigError(
            f'routing="arrow" reads directions of low-rank deltas, and LoRA expert {part.name!r} has others '
            f'too, at {others[0]}: make experts with LoraShape(tables="none", gains=False)'
        )
    return layers
