"""The trained router: dense for the young, sparse for the mature, and a newcomer changes no old row."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.errors import ConfigError
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.hybrid import DynamicHybridRouter, Maturity

D = 6


def text(number: int, rows: int, *, seed: int = 0) -> Tensor:
    """Features of one domain, far from zero as those of language models are."""
    generator = torch.Generator().manual_seed(100 * number + seed)
    center = torch.randn(D, generator=torch.Generator().manual_seed(number)) * 2 + 20
    return center + torch.randn(rows, D, generator=generator)


def gaussian(number: int) -> FeatureGaussian:
    found = FeatureGaussian(D)
    found.observe(text(number, 200))
    found.seal()
    return found


def router(parts: int, *, mature: int = 0, **settings: float | int) -> DynamicHybridRouter:
    made = DynamicHybridRouter(D, maturity=Maturity(window=2, slope=0.01), **settings)
    for number in range(parts):
        made.add_expert(f"part-{number}", gaussian(number))
        for _ in range(2 if number < mature else 0):
            made.observe_loss(f"part-{number}", 1.0)
    return made


def accuracy(made: DynamicHybridRouter, parts: int) -> list[float]:
    return [(made.logits(text(n, 200, seed=9)).argmax(-1) == n).float().mean().item() for n in range(parts)]


def test_it_learns_whose_a_text_is_and_rehearsal_keeps_the_old() -> None:
    made = router(2)
    made.fit(150)
    assert min(accuracy(made, 2)) > 0.95
    made.add_expert("part-2", gaussian(2))
    for _ in range(150):
        made.step(text(2, 16), ["part-2"] * 16)
    assert min(accuracy(made, 3)) > 0.9


def test_without_rehearsal_the_old_is_lost() -> None:
    """So the test above can fail."""
    made = router(2)
    made.fit(150)
    made.add_expert("part-2", gaussian(2))
    for _ in range(150):
        made.step(text(2, 16), ["part-2"] * 16, rehearsed=0)
    assert min(accuracy(made, 3)[:2]) < 0.5 and accuracy(made, 3)[2] > 0.9


def test_a_newcomer_leaves_old_rows_and_moments_alone() -> None:
    made = router(2)
    made.fit(5)
    x = text(0, 4)
    gate, logits = made.gate.detach().clone(), made.logits(x).detach()
    moments = copy.deepcopy(made.state_dict()["optimizer"]["state"][0])
    made.add_expert("part-2", gaussian(2))
    after = made.state_dict()["optimizer"]["state"][0]
    assert made.gate[:2].equal(gate) and made.gate[2].eq(0).all()
    assert made.logits(x)[:, :2].equal(logits)
    assert after["step"] == moments["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        assert after[name][:2].equal(moments[name]) and after[name][2].eq(0).all()
    made.step()
    assert not made.gate[2].eq(0).all()


@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 5), st.floats(0.3, 3))
def test_rows_of_young_parts_are_dense_and_rows_of_mature_ones_sparse(
    parts: int, mature: int, top_k: int, temperature: float
) -> None:
    made = router(parts, mature=mature, top_k=top_k, temperature=temperature)
    made.fit(20)
    x = torch.stack([text(number, 5) for number in range(parts)])  # (E, T, D)
    weights, logits = made.weights(x), made.logits(x)
    assert weights.shape == (parts, 5, parts)
    torch.testing.assert_close(weights.sum(-1), torch.ones(parts, 5))
    dense = torch.softmax(logits / temperature, -1)
    for row, kept, full in zip(logits.flatten(0, 1), weights.flatten(0, 1), dense.flatten(0, 1), strict=True):
        if row.argmax() < mature:
            assert (kept > 0).sum() == min(top_k, parts)
            best = row.topk(min(top_k, parts)).indices
            torch.testing.assert_close(kept[best], full[best] / full[best].sum())
        else:
            torch.testing.assert_close(kept, full)


def test_the_gate_learns_even_where_one_part_alone_answers() -> None:
    """With one of the mature Parts its weight is 1 whatever the gate says: a gate trained through the answers
    would have no gradient."""
    made = router(2, mature=2, top_k=1)
    before = made.gate.detach().clone()
    first = made.step()
    assert not made.gate.equal(before)
    assert made.fit(100) < first / 2


def test_balance_evens_out_how_much_each_part_is_used() -> None:
    """Of two Parts with the same text, one is ahead by its bias."""
    shares = {}
    for balance in (0.0, 50.0):
        made = DynamicHybridRouter(D, balance=balance, learning_rate=0.02)
        made.add_expert("a", gaussian(0))
        made.add_expert("b", gaussian(0))
        with torch.no_grad():
            made.gate[0, -1] = 6.0
        made.fit(40)
        shares[balance] = torch.softmax(made.logits(text(0, 400)), -1).mean(0)[0].item()
    assert shares[50.0] < shares[0.0] - 0.01


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([3.0, 2.0, 1.5], False),  # too few
        ([3.0, 2.0, 1.5, 1.2], False),
        ([9.0, 2.0, 1.999, 1.998, 1.998], True),  # what was long ago does not count
        ([2.0, 2.1, 2.2, 2.3], True),  # it gets worse
        ([2.0, 1.98, 1.96, 1.94], False),  # 1 % each time
        ([2.0, 1.996, 1.992, 1.988], True),
    ],
)
def test_maturity_is_the_end_of_the_fall(losses: list[float], reached: bool) -> None:
    maturity = Maturity(window=4, slope=0.005)
    assert maturity.reached(losses) is reached
    assert (maturity.progress(losses) == 1) is reached
    made = router(1)
    made.maturity = Maturity(window=4, slope=0.005)
    told = [made.observe_loss("part-0", loss) for loss in losses]
    assert told[-1] is made.is_mature("part-0") is reached


def test_what_is_mature_stays_so() -> None:
    made = router(1, mature=1)
    assert made.observe_loss("part-0", 0.1) and made.is_mature("part-0")


def test_a_restored_router_goes_on_to_the_bit() -> None:
    ours = router(3, mature=1)
    ours.fit(4)
    theirs = DynamicHybridRouter(D, maturity=ours.maturity, seed=5)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    x = text(1, 8)
    for _ in range(3):
        assert ours.weights(x).equal(theirs.weights(x))
        assert ours.step() == theirs.step()
    for made in (ours, theirs):
        made.add_expert("part-3", gaussian(3))
    assert ours.step() == theirs.step() and ours.names == theirs.names
    assert ours.is_mature("part-0") and theirs.is_mature("part-0") and not theirs.is_mature("part-1")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="no Parts yet"):
        DynamicHybridRouter(D).weights(torch.ones(1, D))
    made = router(1)
    with pytest.raises(ConfigError, match="'part-0' already"):
        made.add_expert("part-0", gaussian(0))
    with pytest.raises(ConfigError, match="no Part 'x'; it has part-0"):
        made.observe_loss("x", 1.0)
    with pytest.raises(ConfigError, match="no Part 'x'"):
        made.step(text(0, 1), ["x"])
    with pytest.raises(ConfigError, match="needs text"):
        made.step(rehearsed=0)
    with pytest.raises(ConfigError, match="temperature 0"):
        DynamicHybridRouter(D, temperature=0)
