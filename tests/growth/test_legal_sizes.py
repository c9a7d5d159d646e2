"""Heads, widths and vocabularies: default steps, legal sizes, and what is refused with what would do."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from cambia.errors import ConfigError, ExportError, GrowthError
from cambia.growth import (
    AddHeads,
    AddKVHeads,
    AddLayers,
    AddTokens,
    Operator,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    grow,
    plan_growth,
)
from cambia.models import to_llama
from cambia.models.bodies import on_meta
from tests.conftest import tiny
from tests.laws.examples import logits, loss_of, relative_error, tokens

# ---- amounts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "family", "changed"),
    [
        (WidenFFN(), "llama", {"intermediate_size": 24}),
        (WidenFFN(), "gpt2", {"n_inner": 24}),
        (AddLayers(), "qwen3", {"num_hidden_layers": 3}),
        (AddHeads(), "llama", {"num_attention_heads": 6}),
        (AddHeads(), "cambia", {"num_attention_heads": 6}),
        (AddHeads(factor=2.5), "llama", {"num_attention_heads": 8}),
        (AddKVHeads(), "llama", {"num_attention_heads": 6, "num_key_value_heads": 3}),
        (AddKVHeads(factor=2.4), "cambia", {"num_attention_heads": 10, "num_key_value_heads": 5}),
        (WidenHeadDim(), "qwen2", {"head_dim": 12}),
        (WidenHidden(), "llama", {"hidden_size": 28}),
        (WidenHidden(), "cambia", {"hidden_size": 32}),
        (WidenHidden(), "gpt2", {"n_embd": 30, "n_head": 5}),
        (WidenHidden(factor=1.5), "gpt2", {"n_embd": 36, "n_head": 6}),
        (WidenHidden(initial="clone"), "mistral", {"hidden_size": 48}),
        (AddTokens(), "llama", {"vocab_size": 64}),
    ],
    ids=str,
)
def test_no_amount_is_the_smallest_legal_step_and_a_factor_the_nearest(
    operator: Operator, family: str, changed: dict[str, int]
) -> None:
    config = plan_growth(tiny(family), operator).config
    assert {name: getattr(config, name) for name in changed} == changed


@pytest.mark.parametrize(
    ("operator", "family", "problem"),
    [
        (AddHeads(to=7), "llama", r"7 is no such number; the nearest above 4: to=6 or to=8"),
        (AddHeads(to=10), "llama", r"must divide the hidden size 24.*: to=8 or to=12"),
        (AddHeads(to=7), "cambia", r"multiples of the 2 key/value heads, and 7 is no such"),
        (AddKVHeads(to=5), "qwen3", r"come with 2 heads each.*: to=4 or to=6"),
        (
            WidenHidden(to=30),
            "llama",
            r"its 4 heads divide, and 30 is no.*: to=28 or to=32",
        ),
        (WidenHidden(to=32), "gpt2", r"heads of 6 make up .*: to=30 or to=36"),
        (WidenHidden(to=36, initial="clone"), "llama", r"multiple of the hidden size 24, and 36 is no"),
        (AddHeads(), "gpt2", "WidenHidden adds heads along with width"),
        (AddKVHeads(), "gpt2", "WidenHidden adds heads along with width"),
        (WidenHeadDim(), "gpt2", "WidenHidden adds heads along with width"),
        (AddHeads(to=4), "llama", "to=4 is not larger than the present size 4"),
        (WidenHidden(to=24), "llama", "to=24 is not larger than the present size 24"),
        (AddTokens(to=31), "llama", "to=31 is not larger than the present size 31"),
        (AddTokens(hidden=True), "llama", "a stock llama model cannot hide tokens"),
        (AddTokens(pieces=[[1, 31]]), "llama", r"name the tokens \[31\], and the vocabulary has 31"),
        (AddTokens(pieces=[[1]] * 3, add=2), "llama", "spell 3 tokens, and 2 are added"),
        (AddTokens(tokenizer_length=29), "llama", "the next 2 tokens have rows already"),
        (AddTokens(tokenizer_length=40), "llama", "only 31 rows: grow it to=40 first"),
    ],
    ids=str,
)
def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(
    operator: Operator, family: str, problem: str
) -> None:
    with pytest.raises(GrowthError, match=problem):
        plan_growth(tiny(family), operator)


def test_heads_larger_than_any_kernel_takes_are_refused() -> None:
    model = tiny(head_dim=64)
    with pytest.raises(GrowthError, match=r"heads of 320 are larger .* \(256\); the largest factor .* 4"):
        plan_growth(model, WidenHeadDim(factor=5))
    plan_growth(model, WidenHeadDim(factor=4))


# ---- models that cannot grow ---------------------------------------------------------------------


def test_quantised_weights_are_refused() -> None:
    model = tiny()
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(GrowthError, match=r"down_proj.weight' is quantised or sharded \(int8 Tensor\)"):
        plan_growth(model, WidenFFN())
    other = tiny()
    other.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(GrowthError, match="load the model unquantised"):
        plan_growth(other, AddLayers())


def test_models_without_weights_can_be_planned_and_not_grown() -> None:
    model = tiny()
    empty = on_meta(type(model), model.config)
    plan_growth(empty, WidenFFN())
    with pytest.raises(GrowthError, match="on the meta device and has no values: plan_growth plans"):
        grow(empty, WidenFFN())


def test_wrappers_are_refused() -> None:
    with pytest.raises(GrowthError, match=r"DataParallel is no model of transformers.*model\.module"):
        grow(nn.DataParallel(tiny()), WidenFFN())


# ---- tokens --------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one letter, and the rest is spelled."""
    vocabulary = {"[UNK]": 0, **{letter: i for i, letter in enumerate("abcdefgh", 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("tied", [False, True])
def test_new_words_start_as_the_mean_of_what_spelled_them(
    tokenizer: PreTrainedTokenizerFast, tied: bool
) -> None:
    model = tiny(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    old = model.get_input_embeddings().weight.detach().clone()
    words = ["bad", "cafe"]
    grow(model, AddTokens.spelled(tokenizer, words))
    tokenizer.add_tokens(words)
    new = model.get_input_embeddings().weight.detach()
    assert tokenizer("bad")["input_ids"] == [9]
    assert len(new) == len(tokenizer) == 11
    torch.testing.assert_close(new[9], old[[2, 1, 4]].mean(0))
    torch.testing.assert_close(new[10], old[[3, 1, 6, 5]].mean(0))
    assert torch.equal(new[:9], old)


def test_rows_beyond_the_spelled_ones_are_the_mean_of_all() -> None:
    model = tiny()
    old = model.model.embed_tokens.weight.detach().clone()
    grow(model, AddTokens(pieces=[[4, 6]], to=64))
    new = model.model.embed_tokens.weight
    torch.testing.assert_close(new[31], old[[4, 6]].mean(0))
    torch.testing.assert_close(new[32:], old.mean(0).expand(32, -1))


def test_a_word_that_is_a_token_already_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="'b' is the token"):
        AddTokens.spelled(tokenizer, ["bad", "b"])


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_tokens_leave_the_loss_as_it_was(tied: bool) -> None:
    model, plain = (tiny("cambia", torch.float64, tie_word_embeddings=tied) for _ in range(2))
    batch = tokens(model)
    before, loss = logits(model, batch), loss_of(model, batch).item()
    grow(model, AddTokens(add=5, hidden=True))
    grow(plain, AddTokens(add=5))
    after = logits(model, batch)
    assert relative_error(after[..., :31], before) <= 1e-12
    assert bool((after[..., 31:] == -torch.inf).all())
    assert loss_of(model, batch).item() == pytest.approx(loss, rel=1e-12)
    assert loss_of(plain, batch).item() > loss + 0.01
    skipped = model(input_ids=batch, labels=batch, skip_logits=True, use_cache=False).loss
    assert skipped.item() == pytest.approx(loss, rel=1e-12)
    assert model.generate(batch[:, :4], max_new_tokens=9, do_sample=True).max() < 31

    model.config.predictable_tokens = None
    assert loss_of(model, batch).item() == pytest.approx(loss_of(plain, batch).item(), rel=1e-12)
    to_llama(model)


def test_a_model_that_hides_tokens_has_no_form_as_a_llama() -> None:
    model = tiny("cambia")
    grow(model, AddTokens(add=5, hidden=True))
    assert model.config.predictable_tokens == 31
    grow(model, AddTokens(add=5, hidden=True))
    assert model.config.predictable_tokens == 31, "what was hidden stays hidden"
    with pytest.raises(ExportError, match="predictable_tokens = None first"):
        to_llama(model)


# ---- clones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cloned_channels_part(family: str) -> None:
    model = tiny(family, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grow(model, WidenHidden(initial="clone"), optimizer=optimizer)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[:, :24], rows[:, 24:])
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    rows = model.get_input_embeddings().weight
    assert (rows[:, :24] - rows[:, 24:]).abs().max() > 1e-4
