"""The closed-form router: each text finds its Part, and what was claimed once stays so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.errors import ConfigError
from cambia.models.routing.pooling import pooled_weights
from cambia.models.routing.router import Router
from cambia.models.routing.routes import Routes
from cambia.models.routing.strangeness import Strangeness
from tests.models.routing.worlds import KINDS, VOCAB, World


def share(routes: Routes, name: str | None) -> float:
    return routes.names.count(name) / len(routes.names)


@pytest.mark.parametrize("routing", ["compete", "first_claim"])
def test_each_text_finds_its_part_and_strange_ones_the_base(routing: str) -> None:
    world = World()
    router = world.router(0, 1, 2, routing=routing)
    for kind in range(3):
        routes = router.route(world.read(world.text(kind, 100)))
        assert share(routes, str(kind)) >= 0.95
        assert ((routes.confidence >= 0.5 - 1e-9) & (routes.confidence <= 1)).all()
    # Under compete a Part may answer what it happens to foretell better than the base does.
    strange = share(router.route(world.read(world.text(4, 100))), None)
    assert strange >= (0.7 if routing == "compete" else 0.9)


def test_what_is_strange_to_all_goes_to_whom_foretells_it_far_better_than_the_base() -> None:
    world = World()
    router = world.router(0, 1)
    for domain in router.domains.values():  # what was ordinary for it lies far from what comes
        for known in (domain.cheap, domain.full):
            known.average[:, 0] -= 1000
    assert share(router.route(world.read(world.text(0, 100, 32))), "0") >= 0.95
    assert share(router.route(world.read(world.text(0, 100, 2))), None) >= 0.9, "two tokens prove little"


def test_what_is_strange_to_its_part_goes_to_it_though_the_base_claims_all() -> None:
    world = World()
    router = world.router(0, 1)
    router.domains["1"].answers = None
    for name, room in (("0", -1000), ("1", 1000)):
        for known in (router.domains[name].cheap, router.domains[name].full):
            known.average[:, 0] += room
    assert share(router.route(world.read(world.text(0, 100, 32))), "0") >= 0.95


def test_the_base_takes_what_is_ordinary_for_a_part_only_where_it_is_clearly_likelier() -> None:
    world = World()
    prefixes = world.read(torch.cat([world.text(kind, 300, 6) for kind in (0, 4)]))
    behind = (prefixes.losses("0") - prefixes.losses(None)) * 5  # nats
    names = {r: world.router(0, routing=r).route(prefixes).names for r in ("compete", "first_claim")}
    little = ((behind > 0) & (behind < math.log(1000))).nonzero()[:, 0].tolist()
    assert sum(names["compete"][i] == "0" for i in little) >= len(little) / 4 > 5
    assert not any(names["first_claim"][i] == "0" for i in little), "which leaves it to later Parts"
    assert not any(names["compete"][i] == "0" for i in (behind > math.log(1000)).nonzero()[:, 0].tolist())


def test_cheap_evidence_spares_most_passes() -> None:
    world = World()
    router = world.router(*range(KINDS))
    passes = sum(router.route(world.read(world.text(kind, 50))).passes for kind in range(KINDS))
    assert passes < 1.2 * 50 * KINDS, "every Part reading every row would be KINDS times as many"


@given(st.integers(0, 10_000), st.permutations(range(KINDS)), st.integers(1, 3), st.integers(2, 16))
def test_what_is_claimed_once_never_changes_its_owner(
    seed: int, order: list[int], first: int, width: int
) -> None:
    world = World(seed)
    router = world.router(*order[:first], routing="first_claim")
    text = torch.cat([world.text(kind, 6, width) for kind in range(KINDS)])
    before = router.route(world.read(text))
    for kind in order[first:]:
        world.teach(router, kind)
    after = router.route(world.read(text))
    claimed = torch.tensor([name is not None for name in before.names])
    assert claimed.any()
    assert [n for n in before.names if n] == [a for a, b in zip(after.names, before.names, strict=True) if b]
    assert torch.equal(after.confidence[claimed], before.confidence[claimed])


def test_a_text_stays_with_its_part_unless_another_is_clearly_likelier() -> None:
    world = World()
    router = world.router(0, 1)
    text = torch.cat([world.text(0, 60, 4), world.text(1, 60, 4)])  # so short that much is doubtful
    free = router.route(world.read(text))
    for name in ("0", "1"):
        kept = router.route(world.read(text), before=[name] * 120)
        assert share(kept, name) > share(free, name)
        assert all(k == name for k, f in zip(kept.names, free.names, strict=True) if f == name)
    long = world.text(1, 40)
    assert share(router.route(world.read(long), before=["0"] * 40), "1") >= 0.95


def test_what_the_base_answers_claims_nothing() -> None:
    world = World()
    router = world.router(0, 1, routing="first_claim")
    router.domains["0"].answers = None
    for known in (router.domains["0"].cheap, router.domains["0"].full):
        known.average[:, 0] += 1000  # nothing is strange to it
    assert share(router.route(world.read(world.text(1, 100, 32))), "1") >= 0.95


def test_first_claim_lets_go_of_a_text_only_by_a_margin() -> None:
    world = World()
    router = world.router(0, 1, routing="first_claim", bound=1.0)
    text = world.text(0, 200)
    free, kept = router.route(world.read(text)), router.route(world.read(text), before=["0"] * 200)
    assert share(kept, "0") > share(free, "0")
    assert all(k == "0" for k, f in zip(kept.names, free.names, strict=True) if f == "0")


def test_the_open_part_is_measured_again_and_a_sealed_one_is_not() -> None:
    world = World()
    router = world.router(0)
    world.teach(router, 1, sealed=False)
    world.teach(router, 1, sealed=False)
    world.teach(router, 1)
    with pytest.raises(ConfigError, match="what it knows of it is sealed"):
        world.teach(router, 1)
    with pytest.raises(ConfigError, match="sealed, so it stays"):
        router.forget("0")


def test_a_router_goes_on_where_it_was() -> None:
    world = World()
    router = world.router(0, 1, 2)
    again = Router(VOCAB)
    again.load_state_dict(router.state_dict())
    text = torch.cat([world.text(kind, 20, 6) for kind in range(4)])
    one, other = router.route(world.read(text)), again.route(world.read(text))
    assert one.names == other.names
    assert torch.equal(one.confidence, other.confidence) and torch.equal(one.entropy, other.entropy)
    world.teach(again, 3)


def test_a_domain_may_be_answered_by_another_part_or_by_the_base() -> None:
    world = World()
    router = world.router(0)
    router.domains["0"].answers = None
    assert share(router.route(world.read(world.text(0, 40))), None) == 1


def test_too_short_to_say() -> None:
    world = World()
    router = world.router(0)
    assert router.route(world.read(world.text(0, 3), torch.tensor([0, 1, 16]))).names == (None, None, "0")
    assert Router(VOCAB).route(world.read(world.text(0, 2))).names == (None, None)


@pytest.mark.parametrize(
    ("settings", "rows", "width", "said"),
    [
        ({"bound": 0.0}, 40, 16, "bound 0"),
        ({}, 3, 16, "3 held-out rows"),
        ({}, 40, 1, "the shortest of 1 tokens"),
    ],
)
def test_what_a_router_refuses(settings: dict[str, Any], rows: int, width: int, said: str) -> None:
    world = World()
    known = world.router(0).domains["0"]
    with pytest.raises(ConfigError, match=said):
        Router(VOCAB, **settings).add(
            "x", known.grams, known.gaussian, world.read(world.text(0, rows, width))
        )


def test_other_tokens_are_refused() -> None:
    world = World()
    router = world.router(0)
    known = router.domains["0"]
    with pytest.raises(ConfigError, match="n-grams of 'x' are of 24 tokens, the router's of 99"):
        Router(99).add("x", known.grams, known.gaussian, world.read(world.text(0, 40)))
    with pytest.raises(ConfigError, match=f"a prefix holds token {VOCAB}"):
        router.route(world.read(torch.full((1, 4), VOCAB)))
    with pytest.raises(ConfigError, match="1 texts, and 2 came"):
        router.route(world.read(world.text(0, 2)), before=["0"])
    with pytest.raises(ConfigError, match="does not know 'x'; it knows 0"):
        router.seal("x")


# ---- what it is made of ----------------------------------------------------------------------------


def test_weights_make_log_odds_of_what_speaks_for_a_part() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    # Normal log odds of mean m and variance v are calibrated by 2 m / v; noise and lies count nothing.
    margins = torch.stack([1 + 2 * noise[:, 0], 3 * noise[:, 1], -0.5 + noise[:, 2]], 1)
    found = pooled_weights(margins)
    assert found[0].item() == pytest.approx(2 * 1 / 4, rel=0.15)
    assert 0 <= found[1] < 0.03 and found[2] == 0
    assert pooled_weights(torch.ones(50, 2).double()).isfinite().all(), "nothing speaks against"


@pytest.mark.parametrize("tail", ["normal", "exponential"])
def test_three_deviations_hold_nearly_all_of_a_domain_of_which_few_rows_are_known(tail: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = []
    for _ in range(60):
        drawn = torch.randn(2, 424, 2, generator=generator, dtype=torch.float64)
        drawn = drawn + 3 if tail == "normal" else drawn.square()
        known = Strangeness.of([4, 16], drawn[:, :24])
        inside.append((known.units(drawn[0, 24:], torch.full((400,), 4)) <= 3).double().mean())
    assert torch.stack(inside).mean() >= 1 - 4 / 90 - 0.01
