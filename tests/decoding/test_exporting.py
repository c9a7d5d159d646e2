"""What others are given is what they take, and what they cannot take is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from cambia.decoding import PRESETS, DecodingParameters, DecodingPolicy, exported, generation_config
from cambia.decoding.exporting import EXPORTS
from cambia.errors import ConfigError
from tests.decoding.test_policy import IDS, made

ALL = DecodingParameters(0.7, 0.9, 0.05, 40, 1.1, 0.2, 0.3)


def test_stock_transformers_writes_with_it(tmp_path: Path) -> None:
    model = made("llama")
    policy = DecodingPolicy(
        DecodingParameters(temperature=0.6, top_p=0.8, min_p=0.02, repetition_penalty=1.2)
    )
    model.save_pretrained(tmp_path)
    generation_config(policy, model).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.generation_config.temperature == 0.6 and stock.generation_config.eos_token_id == 2
    torch.manual_seed(0)
    many = IDS[:1].expand(3000, -1)
    theirs = stock.generate(many, attention_mask=torch.ones_like(many), max_new_tokens=1)[:, -1]
    mine = policy.generate(model, many, max_new_tokens=1)[:, -1]
    shares = [torch.bincount(tokens, minlength=23) / 3000 for tokens in (mine, theirs)]
    assert (shares[0] - shares[1]).abs().max() < 4 * (0.5 / 3000) ** 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_saved(preset: str, tmp_path: Path) -> None:
    config = generation_config(DecodingPolicy(PRESETS[preset]))
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).do_sample == (preset != "greedy")


def test_everything_is_given_or_said() -> None:
    policy = DecodingPolicy(ALL)
    for program, known in EXPORTS.items():
        found = exported(policy, program)
        for name, value in ALL.changed.items():
            said = any(
                line.startswith(name.split("_penalty")[0].replace("_", "-")) for line in found.left_out
            )
            assert found.values.get(known.names.get(name)) == value or said, (program, name)
    assert not exported(DecodingPolicy(DecodingParameters(temperature=0.7)), "openai").left_out
    assert exported(policy, "llama.cpp").values["--repeat-last-n"] == -1
    assert exported(DecodingPolicy(), "vllm").values["top_k"] == -1


def test_what_is_inside_a_model_is_said_to_be_lost() -> None:
    policy = DecodingPolicy.of(made("gpt2"), layers=True, heads=True, context=True)
    said = " ".join(exported(policy, "vllm").left_out)
    assert "layers" in said and "--fold-heads" in said and "each token" in said
    with pytest.raises(ConfigError, match="known are"):
        exported(policy, "ollama")
