"""Pruning: the least worthy units go, the others stay as they are, and so does what is known of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cambia.errors import ConfigError, GrowthError
from cambia.growth import WidenFFN, grow, prune
from cambia.growth.prune import unit_scores
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import tiny
from tests.laws.examples import logits, loss_of, relative_error, tokens

FAMILIES = sorted(ARCHITECTURES)


@pytest.mark.parametrize("score", ["norm", "taylor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_nobody_hears_go_first_and_change_nothing(family: str, score: Any) -> None:
    """Widening adds such units; pruning as many gives back the model that was."""
    model = tiny(family, attention_bias=True, mlp_bias=True)
    before = logits(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    grow(model, WidenFFN(add=5))
    event = prune(model, remove=5, score=score, batch=tokens(model))
    assert relative_error(logits(model), before) < 1e-5
    assert event.loss_before == pytest.approx(event.loss_after, rel=1e-5)
    assert event.exactness == "none" and event.reason == f"pruned by {score}"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("amount", "left"), [({"factor": 0.5}, 10), ({"remove": 3}, 17), ({"to": 4}, 4)])
def test_amounts(amount: dict[str, Any], left: int) -> None:
    model = tiny("llama")
    event = prune(model, **amount)
    assert model.config.intermediate_size == left
    assert event.parameters_before - event.parameters_after == 2 * 3 * 24 * (20 - left)
    assert event.loss_after != event.loss_before
    assert torch.isfinite(loss_of(model))


def test_the_best_units_stay_in_their_order() -> None:
    model = tiny("cambia")
    worth = unit_scores(model, "norm", tokens(model))
    old = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    prune(model, to=7, layers=[1])
    best = sorted(torch.argsort(worth[1], descending=True)[:7].tolist())
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, old[best])
    assert model.config.intermediate_size == [20, 7]


def test_the_optimizer_keeps_what_it_knows_of_those_that_stay() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    before = optimizer.state[model.model.layers[0].mlp.down_proj.weight]["exp_avg"].clone()
    worth = unit_scores(model, "norm", tokens(model))[0]
    prune(model, to=8, optimizer=optimizer)
    kept = sorted(torch.argsort(worth, descending=True)[:8].tolist())
    after = optimizer.state[model.model.layers[0].mlp.down_proj.weight]["exp_avg"]
    assert torch.equal(after, before[:, kept])
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("settings", "error", "problem"),
    [
        ({}, ConfigError, "exactly one of factor=, remove= and to=, got none"),
        ({"to": 3, "remove": 1}, ConfigError, "got \\['remove', 'to'\\]"),
        ({"factor": 1.5}, ConfigError, "between 0 and 1"),
        ({"remove": 20}, GrowthError, "20 units cannot be left with 0"),
        ({"to": 21}, GrowthError, "20 units cannot be left with 21"),
        ({"to": 3, "layers": [4]}, GrowthError, "the model has layers 0 to 1"),
        ({"to": 3, "score": "luck"}, ConfigError, "expected norm or taylor"),
    ],
)
def test_what_cannot_be_pruned_is_refused(settings: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        prune(tiny("cambia"), **settings)
    with pytest.raises(GrowthError, match="one FFN width for all layers"):
        prune(tiny("llama"), to=3, layers=[0])
    with pytest.raises(ConfigError, match=r"cambia\.growth\.prune makes"):
        WidenFFN(factor=0.5)
