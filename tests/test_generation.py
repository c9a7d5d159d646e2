"""Continuing text: padding, seeds, ends."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cambia.errors import ConfigError
from cambia.generation import continue_text
from cambia.models import CambiaConfig, CambiaForCausalLM

LETTERS = "abcdefghijklmnop"
END = len(LETTERS)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, no padding token, and an end."""
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)} | {"|": END}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="|")


@pytest.fixture
def model() -> CambiaForCausalLM:
    config = CambiaConfig(
        vocab_size=END + 1, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, initializer_range=0.5
    )
    return CambiaForCausalLM(config)


def test_prompts_of_different_length_do_not_disturb_each_other(model, tokenizer) -> None:
    prompts = ["abcdef", "p", "ka"]
    together = continue_text(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    alone = [continue_text(model, tokenizer, [p], max_new_tokens=12, temperature=0)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) == 3 and all(0 < len(text) <= 12 for text in together)


def test_greedy_text_is_the_likeliest_token_again_and_again(model, tokenizer) -> None:
    ids = torch.tensor([[0, 1]])
    for _ in range(6):
        ids = torch.cat((ids, model.eval()(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    expected = "".join((LETTERS + "|")[i] for i in ids[0, 2:])
    text = continue_text(model, tokenizer, ["ab"], max_new_tokens=6, temperature=0)[0]
    assert text == expected.partition("|")[0]


def test_the_seed_decides_and_the_global_random_state_stays(model, tokenizer) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        continue_text(model, tokenizer, ["abc", "d"], max_new_tokens=20, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_top_p_close_to_nothing_is_greedy(model, tokenizer) -> None:
    greedy = continue_text(model, tokenizer, ["abc"], max_new_tokens=9, temperature=0)
    assert continue_text(model, tokenizer, ["abc"], max_new_tokens=9, top_p=1e-6, seed=5) == greedy


def test_text_stops_at_the_end_token(model, tokenizer) -> None:
    greedy = continue_text(model, tokenizer, ["abc"], max_new_tokens=9, temperature=0)[0]
    stop = greedy[4]
    model.generation_config.eos_token_id = LETTERS.index(stop)
    # The second prompt goes on, so the first is padded behind its end; padding is a letter here.
    texts = continue_text(model, tokenizer, ["abc", "p"], max_new_tokens=9, temperature=0)
    assert texts[0] == greedy[: greedy.index(stop)]


def test_training_mode_is_left_as_it_was(model, tokenizer) -> None:
    assert continue_text(model.train(), tokenizer, ["a"], max_new_tokens=1)
    assert model.training
    continue_text(model.eval(), tokenizer, ["a"], max_new_tokens=1)
    assert not model.training


def test_no_prompts_give_no_texts(model, tokenizer) -> None:
    assert continue_text(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"temperature": -1}, "temperature=-1"), ({"top_p": 0}, "top_p=0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_settings_out_of_range_are_refused(model, tokenizer, settings, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        continue_text(model, tokenizer, ["a"], **settings)


def test_a_prompt_that_is_not_utf_8_is_refused(model, tokenizer) -> None:
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as a command line hands it over
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        continue_text(model, tokenizer, [prompt])


def test_an_empty_prompt_is_refused(model, tokenizer) -> None:
    with pytest.raises(ConfigError, match="at least one character"):
        continue_text(model, tokenizer, ["a", ""])


def test_text_longer_than_the_model_is_written_window_by_window(model, tokenizer) -> None:
    longest = model.config.max_position_embeddings = 12
    texts = continue_text(model, tokenizer, ["a" * 7, "bc"], max_new_tokens=2 * longest + 3, seed=4)
    again = continue_text(model, tokenizer, ["a" * 7, "bc"], max_new_tokens=2 * longest + 3, seed=4)
    assert texts == again
    short = continue_text(model, tokenizer, ["a" * 7, "bc"], max_new_tokens=longest - 7, seed=4)
    assert [text.startswith(begin) for text, begin in zip(texts, short, strict=True)] == [True, True]
