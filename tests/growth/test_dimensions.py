"""Every dimension: what is legal where, what the refusal proposes instead, and what the modules are told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cambia.config import resolve
from cambia.errors import ConfigError, GrowthError
from cambia.growth import (
    OPERATORS,
    AddHeads,
    AddKVHeads,
    AddLayers,
    AddTokens,
    Operator,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    WidenLoraRank,
    grow,
    plan_growth,
)
from cambia.growth.operators import Amount
from cambia.models.architectures import ARCHITECTURES
from tests.conftest import EPSILON, tiny
from tests.laws.examples import (
    EVERY,
    FAMILIES,
    layers_of,
    logits,
    makers,
    once,
    parameters,
    readers,
    size_of,
    units,
)

STOCK = [name for name in FAMILIES if not ARCHITECTURES[name].uneven]
APART = [name for name in FAMILIES if ARCHITECTURES[name].head_dim_apart]
TOGETHER = [name for name in FAMILIES if not ARCHITECTURES[name].head_dim_apart]
KINDS = [resolve(name, OPERATORS, "operator") for name in OPERATORS]
AMOUNTS = [kind for kind in KINDS if issubclass(kind, Amount) and kind is not WidenLoraRank]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AMOUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_grows_to_a_size_that_it_has(family: str, kind: type[Operator]) -> None:
    """Or to a smaller one; in GPT-2 some cannot grow at all."""
    for size in (1, 2):
        with pytest.raises(GrowthError, match=r"is not larger than the present size|neither can grow alone"):
            plan_growth(tiny(family), kind(to=size))
    for amount in ({"add": 0}, {"add": -1}, {"factor": 1}, {"factor": 0.5}):
        with pytest.raises(ConfigError, match="does not grow anything"):
            kind(**amount)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(
    data=st.data(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 3),
    growing=st.sampled_from([AddHeads, WidenHidden]),
)
def test_the_size_that_is_proposed_is_legal(
    family: str, data: st.DataObject, kv_heads: int, group: int, half: int, growing: Any
) -> None:
    heads = kv_heads * group
    model = tiny(
        family, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=heads * 2 * half
    )
    size = size_of(model, "num_attention_heads" if growing is AddHeads else "hidden_size")
    wanted = data.draw(st.integers(size + 1, 4 * size + 4))
    for _ in range(2):
        try:
            plan_growth(model, growing(to=wanted))
        except GrowthError as refusal:
            proposed = re.findall(r"to=([0-9]+)", str(refusal))
            if not proposed:
                assert "no such number" in str(refusal) or "neither can grow alone" in str(refusal)
                return
            wanted = int(data.draw(st.sampled_from(proposed)))
        else:
            return
    raise AssertionError(f"{growing.__name__} proposed {wanted} and refused it")


@pytest.mark.parametrize("factor", [1, 0, -2, 1.5])
def test_heads_grow_by_a_whole_number_of_times(factor: Any) -> None:
    with pytest.raises(ConfigError, match="a whole number of times, at least 2"):
        WidenHeadDim(factor=factor)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
@pytest.mark.parametrize("family", [name for name in APART if name != "cambia"])
def test_positions_that_do_not_scale_are_refused(family: str, kind: str) -> None:
    model = tiny(family)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind, "factor": 2.0}
    with pytest.raises(GrowthError, match=f"type '{kind}' turn a larger head at other speeds"):
        plan_growth(model, WidenHeadDim())


def test_scores_that_depend_on_a_layers_place_are_refused() -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(GrowthError, match="scale_attn_by_inverse_layer_idx divides"):
        plan_growth(model, AddLayers(add=1))
    grow(model, WidenFFN(add=3))


# ---- what grows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", APART)
def test_new_heads_stand_in_their_groups(family: str) -> None:
    """Query head h asks key/value head h // (H / K), so new heads cannot simply come last."""
    model = tiny(family)
    names = [name for name in makers(model, "query", layer=0) if name.endswith("weight")]
    old = model.get_parameter(names[0]).detach().clone().view(2, 2, 6, 24)  # (group, head in it, D, C)
    grow(model, AddHeads(add=2))
    new = model.get_parameter(names[0]).detach().view(2, 3, 6, 24)
    assert torch.equal(new[:, :2], old)
    assert new[:, 2].any()
    ((name, dim),) = readers(model, "attended", layer=0).items()
    reader = model.get_parameter(name).detach().movedim(dim, 0).view(2, 3, 6, 24)
    assert not reader[:, 2].any() and reader[:, :2].any()
    assert (size_of(model, "num_attention_heads"), size_of(model, "num_key_value_heads")) == (6, 2)
    assert size_of(model, "head_dim") == 6


@pytest.mark.parametrize("family", APART)
def test_new_groups_are_as_large_as_old_ones(family: str) -> None:
    model = tiny(family)
    grow(model, AddKVHeads(add=1))
    assert (size_of(model, "num_attention_heads"), size_of(model, "num_key_value_heads")) == (6, 3)
    assert size_of(model, "head_dim") == 6


@pytest.mark.parametrize("family", APART)
def test_old_dimensions_of_a_head_keep_their_speed(family: str) -> None:
    """Rotary pair (i, i + D/2) turns at theta^(-2i/D), so at twice the size it is pair (2i, 2i + D)."""
    model = tiny(family)
    names = [name for name in makers(model, "key", layer=1) if name.endswith("proj.weight")]
    old = model.get_parameter(names[0]).detach().clone().view(2, 2, 3, 24)  # (head, half, pair, C)
    grow(model, WidenHeadDim(factor=3))
    new = model.get_parameter(names[0]).detach().view(2, 2, 9, 24)
    assert torch.equal(new[:, :, ::3], old)
    assert size_of(model, "head_dim") == 18
    assert (size_of(model, "num_attention_heads"), size_of(model, "num_key_value_heads")) == (4, 2)
    for layer in layers_of(model):
        assert [m.head_dim for m in layer.modules() if "head_dim" in vars(m)] == [18]


@pytest.mark.parametrize("family", FAMILIES)
def test_epsilon_shrinks_with_the_mean_square(family: str) -> None:
    model = tiny(family)
    grow(model, WidenHidden(factor=2))
    name = next(n for n in ("rms_norm_eps", "layer_norm_epsilon") if hasattr(model.config, n))
    assert getattr(model.config, name) == pytest.approx(EPSILON / 2)
    assert size_of(model, "hidden_size") == 48
    assert size_of(model, "head_dim") == 6
    assert size_of(model, "intermediate_size") == 20
    assert size_of(model, "num_attention_heads") == (8 if family in TOGETHER else 4)


@pytest.mark.parametrize("said", [None, 20])
def test_a_width_that_gpt2_does_not_say_is_four_times_the_hidden_size(said: int | None) -> None:
    for operator in (WidenFFN(add=3), WidenHidden(add=12), AddLayers(add=1)):
        model = tiny("gpt2", n_inner=said)
        before, size = logits(model), said or 96
        assert size_of(model, "intermediate_size") == size
        grow(model, operator)
        assert size_of(model, "intermediate_size") == size + 3 * isinstance(operator, WidenFFN)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_are_the_mean_of_the_old(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    grow(model, AddTokens(add=4))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape == (35, 24)
        mean = table.weight[:31].mean(0, keepdim=True).expand(4, -1)
        torch.testing.assert_close(table.weight[31:], mean)
    assert model.config.vocab_size == 35
    batch = torch.arange(24).view(2, 12)
    assert logits(model, batch).shape == (2, 12, 35)


# ---- what modules are told -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["append", "interpose", "stack", "middle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_know_their_new_sizes(family: str, where: Any) -> None:
    model = tiny(family)
    config = model.config
    grow(model, AddLayers(add=3, where=where), WidenFFN(add=5))
    assert model.config is config
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
    assert config.num_hidden_layers == len(layers_of(model)) == 5
    assert size_of(model, "intermediate_size") == 25
    for place, layer in enumerate(layers_of(model)):
        told = [vars(module) for module in layer.modules()]
        assert [each["layer_idx"] for each in told if "layer_idx" in each] == [place]
        assert {each["intermediate_size"] for each in told if "intermediate_size" in each} <= {25}
        assert len(units(model, place)) == 25
    check_sizes(model)


def check_sizes(model: PreTrainedModel) -> None:
    """Layers that keep their sizes as numbers keep those of their weights."""
    checked = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            assert tuple(module.weight.shape) == (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            assert tuple(module.weight.shape) == (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.LayerNorm):
            assert tuple(module.weight.shape) == module.normalized_shape
        else:
            continue
        checked += 1
    assert checked > 4 * len(layers_of(model))


@pytest.mark.parametrize(("family", "operator"), parameters(once(EVERY, "initial", "preserve")))
def test_every_operator_tells_the_modules(family: str, operator: Operator) -> None:
    model = tiny(family, attention_bias=True)
    grow(model, operator)
    check_sizes(model)
    made = AutoModelForCausalLM.from_config(model.config)
    expected = dict(made.named_modules())
    for name, module in model.named_modules():
        told = {k: v for k, v in vars(module).items() if type(v) in (int, float, tuple)}
        assert told == {k: vars(expected[name])[k] for k in told}, name
        for key, buffer in module.named_buffers(recurse=False):
            assert torch.equal(buffer, expected[name].get_buffer(key)), (name, key)
