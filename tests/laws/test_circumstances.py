"""The laws for models as people have them: tied, half frozen, in bfloat16, under gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth import Operator, WidenHeadDim, WidenHidden, grow, plan_growth
from cambia.models.architectures import ARCHITECTURES
from cambia.records import GrowthEvent
from tests.conftest import tiny
from tests.laws.examples import (
    EVERY,
    FAMILIES,
    TOLERANCE,
    everything,
    logits,
    loss_of,
    once,
    parameters,
    possible,
    relative_error,
    tokens,
    without_upcasts,
)

ONCE = parameters(once(EVERY))


def error_of(model: PreTrainedModel, *operators: Operator, **more: Any) -> float:
    """Relative error of the old tokens' logits."""
    batch = tokens(model)
    with without_upcasts(model):
        before = logits(model, batch)
        grow(model, *operators, **more)
        return relative_error(logits(model, batch)[..., : before.shape[-1]], before)


@pytest.mark.parametrize(("family", "operator"), ONCE)
def test_tied_weights_stay_tied_and_exact(family: str, operator: Operator) -> None:
    model = tiny(family, torch.float64, tie_word_embeddings=True, attention_bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    assert error_of(model, operator, optimizer=optimizer) <= TOLERANCE[torch.float64]
    for _ in range(2):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert len({id(p) for p in model.parameters()}) == len(optimizer.param_groups[0]["params"])
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_frozen_whole_grows_frozen(family: str) -> None:
    model = tiny(family, torch.float64).requires_grad_(False)
    assert error_of(model, *once(possible(family, EVERY))) <= TOLERANCE[torch.float64]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("family", "operator"), ONCE)
def test_what_is_frozen_grows_frozen(family: str, operator: Operator) -> None:
    """New entries of a frozen tensor are frozen with it, and a copied tensor is trained like its original."""
    model = tiny(family, torch.float64, attention_bias=True)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    was = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    plan = plan_growth(model, operator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert error_of(model, operator, optimizer=optimizer) <= TOLERANCE[torch.float64]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == was[plan.lineages[name].sibling], name
    members = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert members == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for name, value in frozen.items():
        assert model.get_parameter(name).grad is None
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize(("family", "operator"), ONCE)
def test_bfloat16_grows_within_its_rounding_or_not_at_all(family: str, operator: Operator) -> None:
    """Where growth multiplies old weights by a root, eight bits may not hold the product; then it says so."""
    model = tiny(family, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = everything(model, optimizer)
    try:
        event = grow(model, operator, optimizer=optimizer)
    except GrowthError as refusal:
        assert operator.contract.rescales, "nothing else has a reason"
        assert "changed the model's logits by" in str(refusal)
        assert everything(model, optimizer) == before
        return
    check_bfloat16(model, event, within=1e-1 if operator.contract.rescales else 3e-2)
    loss_of(model).backward()
    optimizer.step()
    assert torch.isfinite(loss_of(model))


def check_bfloat16(model: PreTrainedModel, event: GrowthEvent, within: float = 3e-2) -> None:
    assert event.logit_error is not None and event.logit_error <= within
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("operator", [WidenHidden(factor=4), WidenHeadDim(factor=4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_holds_a_root_that_is_a_power_of_two(family: str, operator: Operator) -> None:
    model = tiny(family, torch.bfloat16)
    for each in possible(family, [operator]):
        check_bfloat16(model, grow(model, each))


@pytest.mark.parametrize("family", [name for name in FAMILIES if ARCHITECTURES[name].head_dim_apart])
def test_a_table_of_positions_keeps_its_type(family: str) -> None:
    """`model.to(bfloat16)` rounds the speeds of positions too; larger heads must turn as fast as before."""
    model = tiny(family).to(torch.bfloat16)
    before = dict(model.named_buffers())
    grow(model, WidenHeadDim(factor=4))
    after = dict(model.named_buffers())
    assert {name: b.dtype for name, b in after.items()} == {name: b.dtype for name, b in before.items()}
    for name, buffer in before.items():
        assert torch.equal(after[name][::4], buffer), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_that_would_jump_is_refused(family: str) -> None:
    """The check is on, whatever the type."""
    model = tiny(family, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    before = everything(model, optimizer)
    with pytest.raises(GrowthError, match="rolled back"):
        grow(model, *once(possible(family, EVERY)), optimizer=optimizer)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("family", [name for name in FAMILIES if not ARCHITECTURES[name].uneven])
def test_eager_attention_grows_exactly(family: str) -> None:
    """The other way in which stock models compute attention; its softmax is in float32."""
    model = tiny(family, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert error_of(model, *once(possible(family, EVERY))) <= TOLERANCE[torch.float32]
