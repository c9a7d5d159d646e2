"""Exported models say what the native ones say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cambia.errors import ExportError
from cambia.models import CambiaConfig, CambiaForCausalLM, to_llama


def native(**sizes: Any) -> CambiaForCausalLM:
    """No weight is one or zero by chance."""
    defaults = {"vocab_size": 29, "num_hidden_layers": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-3}
    model = CambiaForCausalLM(CambiaConfig(**{**defaults, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@given(
    ffn=st.lists(st.integers(1, 19), min_size=2, max_size=2),
    kv_heads=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    shared=st.integers(1, 3),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_uneven_layers_become_a_llama_with_the_same_logits(
    ffn: list[int], kv_heads: list[int], shared: int, bias: bool, tied: bool
) -> None:
    model = native(
        hidden_size=36,
        head_dim=4,
        intermediate_size=ffn,
        num_key_value_heads=kv_heads,
        num_attention_heads=[shared * count for count in kv_heads],
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
    )
    ids = torch.randint(29, (2, 40))
    llama = to_llama(model)
    assert type(llama) is LlamaForCausalLM
    assert relative_error(llama(ids).logits, model(ids).logits) < 1e-5
    assert llama.config.intermediate_size == max(ffn)
    assert llama.config.num_attention_heads // llama.config.num_key_value_heads == shared
    assert llama.config.hidden_size % llama.config.num_attention_heads == 0


def test_an_even_model_is_not_padded() -> None:
    model = native(hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2)
    llama = to_llama(model)
    for (ours, a), (theirs, b) in zip(model.named_parameters(), llama.named_parameters(), strict=True):
        assert ours == theirs and torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_a_saved_export_is_loaded_by_the_stock_class(tmp_path: Path) -> None:
    model = native(hidden_size=24, intermediate_size=[8, 12], num_attention_heads=4)
    to_llama(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(29, (1, 7))
    assert type(loaded) is LlamaForCausalLM
    assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-5


def test_the_random_state_is_left_alone() -> None:
    model = native(hidden_size=24, num_attention_heads=4)
    before = torch.get_rng_state()
    to_llama(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_uneven_sharing_is_refused() -> None:
    model = native(hidden_size=24, num_attention_heads=[4, 4], num_key_value_heads=[2, 4])
    with pytest.raises(ExportError, match="one ratio"):
        to_llama(model)


def test_head_counts_that_no_llama_has_are_refused() -> None:
    model = native(hidden_size=10, head_dim=2, num_attention_heads=[8, 12], num_key_value_heads=[8, 12])
    with pytest.raises(ExportError, match="divides hidden_size=10"):
        to_llama(model)


def test_added_tensors_are_refused() -> None:
    model = native(hidden_size=24, num_attention_heads=4)
    model.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ExportError, match="extra"):
        to_llama(model)
