"""One interface: a reward, a budget, and a policy that is worth more; what leads nowhere is said."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cambia.data.tokenizers import BytesTokenizer, build_tokenizer
from cambia.decoding import DecodingParameters, DecodingPolicy
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.learners import scored
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards import Reward, Samples, Score, mean_of
from cambia.decoding.rollouts import Rollouts
from cambia.decoding.searching import CmaSearch, TpeSearch
from cambia.errors import ConfigError, DataError

TEXTS = [f"{number} is a number, and {number * number} is what it is, times itself." for number in range(90)]


@dataclass
class Varied(Reward):
    """Worth most where a continuation has so many different tokens, which one temperature gives."""

    wanted: float = 11.0

    def measure(self, samples: Samples) -> Score:
        found = torch.tensor([len(set(row)) for row in samples.tokens], dtype=torch.float64)
        return mean_of(-((found.mean() - self.wanted) ** 2) + 0 * found)


@dataclass
class Low(Reward):
    """Worth more the fewer different tokens there are."""

    def measure(self, samples: Samples) -> Score:
        return mean_of(torch.tensor([-len(set(row)) for row in samples.tokens], dtype=torch.float64))


@dataclass
class Same(Reward):
    def measure(self, samples: Samples) -> Score:
        return mean_of(torch.ones(len(samples)))


@pytest.fixture(scope="module")
def writer():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(BytesTokenizer()).hf
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)
    return model.eval(), tokenizer


FIT = {"prompts": 16, "prompt_tokens": 8, "new_tokens": 12}


@pytest.mark.parametrize("search", [CmaSearch(population=6), TpeSearch(population=6)])
def test_a_search_finds_what_is_worth_more(writer, search) -> None:
    settings = DecodingFit(search=search, parameters=("temperature",), tokens=16 * 12 * 6 * 8, **FIT)
    told = []
    found = settings.run(DecodingPolicy(), *writer, TEXTS, Varied(), told=told.append)
    assert found.tokens == told[-1].tokens <= settings.tokens and len(told) == 8
    model, tokenizer = writer
    prompts = Prompts.of(TEXTS, tokenizer, prompt_tokens=8, new_tokens=12)
    rollouts = Rollouts(model, tokenizer, prompts, new_tokens=12)
    asked = [found.policy.parameters, DecodingParameters()]
    mine, plain = (score.value for score in scored(Varied(), rollouts, asked, range(len(prompts)), 99))
    assert 0 >= mine > plain / 2, "behind other prompts, with other noise"
    again = settings.run(DecodingPolicy(), *writer, TEXTS, Varied())
    assert again.policy.parameters == found.policy.parameters, "a seed is a seed"


def test_gradients_reach_parameters_through_the_same_interface(writer) -> None:
    policy = DecodingPolicy(DecodingParameters(temperature=1.0))
    fitted = policy.fit(*writer, TEXTS, Low(), by="gradient", tokens=6000, **FIT)
    assert fitted.parameters.temperature < 0.9 and policy.parameters.temperature == 1.0


def test_what_leads_nowhere_is_said(writer) -> None:
    with pytest.raises(ConfigError, match="nothing can be learned"):
        DecodingFit(tokens=2000, **FIT).run(DecodingPolicy(), *writer, TEXTS, Same())
    with pytest.raises(ConfigError, match="nothing can be learned"):
        DecodingFit(by="gradient", tokens=2000, **FIT).run(DecodingPolicy(), *writer, TEXTS, Same())
    with pytest.raises(DataError, match="lower prompt_tokens"):
        DecodingFit(**{**FIT, "prompt_tokens": 60}).run(DecodingPolicy(), *writer, TEXTS, Low())
    with pytest.raises(DataError, match="longer texts"):
        DecodingFit(**{**FIT, "new_tokens": 50}).run(DecodingPolicy(), *writer, ["short"], Low())
