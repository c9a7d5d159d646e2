"""A model without an architecture table: growth acts on the ExpandableFFN modules that it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth import (
    AddHeads,
    AddKVHeads,
    AddLayers,
    AddTokens,
    GrowthManager,
    GrowthRule,
    Operator,
    PlateauTrigger,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    grow,
    plan_growth,
    prune,
)
from cambia.models.architectures import per_layer
from cambia.nn import ExpandableFFN
from tests.conftest import tiny
from tests.laws.examples import TOLERANCE, layers_of, logits, loss_of, relative_error, tokens

WIDTHS = {0: 20, 2: 12}


def neox(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A stock GPT-NeoX of three blocks; two of them have a feed-forward part that can grow."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(plain(num_hidden_layers=3, tie_word_embeddings=True))
    for place, width in WIDTHS.items():
        model.gpt_neox.layers[place].mlp = ExpandableFFN(24, width, bias=True)
    return model.to(dtype).eval()


def plain(**changes: Any) -> GPTNeoXConfig:
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "vocab_size": 31}
    return GPTNeoXConfig(**sizes, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("operator", "widths"),
    [
        (WidenFFN(add=3), (23, 15)),
        (WidenFFN(factor=2), (40, 24)),
        (WidenFFN(add=4, layers=[1]), (20, 16)),
        (WidenFFN(add=4, layers="gradient"), None),
        (WidenFFN(add=4, each=[0, 2.0]), (20, 20)),
        (WidenFFN(add=5, initial="split"), (25, 17)),
    ],
)
def test_it_grows_exactly_with_its_optimizer(operator: WidenFFN, widths: Any, dtype: torch.dtype) -> None:
    model = neox(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, config = logits(model), model.config.to_dict()
    event = grow(model, operator, optimizer=optimizer)
    assert relative_error(logits(model), before) <= TOLERANCE[dtype]
    found = tuple(model.gpt_neox.layers[place].mlp.intermediate_size for place in WIDTHS)
    if widths is not None:
        assert found == widths
        before_after = event.config_changes["intermediate_size"]
        assert [per_layer(size, 2) for size in before_after] == [[20, 12], list(widths)]
    assert all(
        model.gpt_neox.layers[i].mlp.down_proj.in_features == n for i, n in zip(WIDTHS, found, strict=True)
    )
    assert model.config.to_dict() == config, "a stock config has no place for these widths"
    assert event.parameters_after == sum(p.numel() for p in model.parameters())
    assert event.flops_per_token_after > event.flops_per_token_before > 0
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss_of(model))


@pytest.mark.parametrize(
    "operator",
    [
        AddLayers(add=1),
        AddHeads(add=3),
        AddKVHeads(add=1),
        WidenHeadDim(),
        WidenHidden(add=24),
        AddTokens(add=1),
    ],
)
def test_all_else_is_refused(operator: Operator) -> None:
    with pytest.raises(GrowthError, match="of this gpt_neox model only the ExpandableFFN modules are known"):
        plan_growth(neox(), operator)


def test_a_model_with_nothing_to_grow_is_refused() -> None:
    nothing = GPTNeoXForCausalLM(plain(num_hidden_layers=1))
    with pytest.raises(GrowthError, match=r"no architecture table for model type 'gpt_neox'.*ExpandableFFN"):
        plan_growth(nothing, WidenFFN(add=1))
    with pytest.raises(GrowthError, match="the model has layers 0 to 1"):
        plan_growth(neox(), WidenFFN(add=1, layers=[2]))


def test_a_plan_touches_nothing_and_ties_stay_tied() -> None:
    model = neox()
    before = [(name, id(p), p.shape) for name, p in model.named_parameters()]
    plan = plan_growth(model, WidenFFN(add=3))
    assert [(name, id(p), p.shape) for name, p in model.named_parameters()] == before
    assert all(p.is_meta for p in plan.after.parameters())
    assert model.get_output_embeddings().weight is model.gpt_neox.embed_in.weight
    grow(model, WidenFFN(add=3))
    assert model.get_output_embeddings().weight is model.gpt_neox.embed_in.weight
    assert plan.parameters_after == sum(p.numel() for p in model.parameters())


def test_it_grows_in_anybodys_loop_and_can_be_pruned_back() -> None:
    model = neox()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rule = GrowthRule(when=PlateauTrigger(patience=1, metric="loss"), then=WidenFFN(add=4), max_events=1)
    manager = GrowthManager([rule], model=model, optimizer=optimizer, rewarm_steps=2)
    events = []
    for _ in range(6):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        events += manager.step(loss=3.0)
    assert [event.step for event in events] == [2]
    prune(model, remove=4, batch=tokens(model))
    assert [model.gpt_neox.layers[place].mlp.intermediate_size for place in WIDTHS] == [20, 12]


def test_a_stock_model_with_other_feed_forward_parts_grows_there() -> None:
    """A table is no help where somebody has changed the model."""
    model = tiny("gpt2", torch.float64)
    for block in layers_of(model):
        block.mlp = ExpandableFFN(24, 20).double()
    batch = tokens(model)
    before = logits(model, batch)
    event = grow(model, WidenFFN(add=4))
    assert relative_error(logits(model, batch), before) <= 1e-10
    assert event.config_changes == {"intermediate_size": (20, 24)}
    with pytest.raises(GrowthError, match="of this gpt2 model only the ExpandableFFN modules are known"):
        grow(model, AddLayers(add=1))
