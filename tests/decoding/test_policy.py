"""A policy writes with any model, and what it changes of a model is exact and only there while it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cambia import CambiaConfig, CambiaForCausalLM
from cambia.decoding import DecodingParameters, DecodingPolicy, InferenceEngine
from cambia.decoding.mixing import with_heads_folded
from cambia.errors import ConfigError, DataError

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = GPT2Config(
    vocab_size=23, n_embd=12, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
)


def made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    uneven = SIZES | {"num_attention_heads": [2, 1, 2], "head_dim": 6}
    model = {
        "native": lambda: CambiaForCausalLM(CambiaConfig(**uneven)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


FAMILIES = ("native", "llama", "qwen2", "gpt2")
IDS = torch.tensor([[5, 9, 4, 17, 3], [8, 8, 12, 6, 20]])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_nothing_is_changed(family: str) -> None:
    model = made(family)
    policy = DecodingPolicy.of(model, layers=True, heads=True, context=True)
    before = logits(model)
    with policy.heard(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(model), before), "the hooks are gone"
    plain = DecodingPolicy(DecodingParameters(top_p=0.9))
    written = plain.generate(model, IDS, max_new_tokens=6, seed=3)
    same = DecodingPolicy.of(model, DecodingParameters(top_p=0.9), layers=True, heads=True, context=True)
    assert torch.equal(same.generate(model, IDS, max_new_tokens=6, seed=3), written)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_heads_fold_exactly_into_the_weights(family: str) -> None:
    model = made(family)
    policy = DecodingPolicy.of(model, heads=True)
    assert policy.head_weights is not None
    policy.head_weights = [torch.rand_like(scale) + 0.5 for scale in policy.head_weights]
    with policy.heard(model):
        heard = logits(model)
    assert (heard - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(with_heads_folded(model, policy.head_weights)), heard)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_summed_before_the_final_norm(family: str) -> None:
    model = made(family)
    policy = DecodingPolicy.of(model, layers=True)
    policy.layer_weights = torch.tensor([0.3, 0.0, 1.0, 0.0])
    states: list[Tensor] = []
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h

    def keep(module: Any, given: Any, said: Any) -> None:
        states.append(said[0] if isinstance(said, tuple) else said)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    hooks.append(layers[0].register_forward_pre_hook(lambda _, given: states.append(given[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    embedded, _, second, _ = states
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    with torch.no_grad():
        expected = model.get_output_embeddings()(norm(0.3 * embedded + second))
    with policy.heard(model):
        torch.testing.assert_close(logits(model), expected)


def test_it_writes_as_transformers_does_with_its_parameters() -> None:
    """The share of each token that is written second, over many draws of both."""
    model = made("llama")
    many = 4000
    ids = IDS[:1].expand(many, -1)
    parameters = DecodingParameters(temperature=0.8, top_p=0.8, repetition_penalty=1.3)
    mine = DecodingPolicy(parameters).generate(model, ids, max_new_tokens=2, seed=0)[:, -1]
    settings = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.8, top_k=0, repetition_penalty=1.3, max_new_tokens=2,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, -1]
    shares = [torch.bincount(tokens, minlength=23) / many for tokens in (mine, theirs)]
    assert (shares[0] - shares[1]).abs().max() < 4 * (0.5 / many) ** 0.5


@pytest.mark.parametrize("family", ["native", "gpt2"])
def test_padding_changes_nothing_and_a_seed_everything(family: str) -> None:
    model = made(family)
    greedy = DecodingParameters(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.4)
    policy = DecodingPolicy(greedy)
    alone = policy.generate(model, IDS[:1, 2:], max_new_tokens=5)
    padded = torch.cat([torch.tensor([[0, 0, 4, 17, 3]]), IDS[1:]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = policy.generate(model, padded, mask, max_new_tokens=5)
    assert together[0, 2 : 2 + alone.shape[1]].tolist() == alone[0].tolist()
    drawn = DecodingPolicy(DecodingParameters(temperature=1.5))
    state = torch.get_rng_state()
    one, same, other = (drawn.generate(model, IDS, max_new_tokens=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one[:, : other.shape[1]], other[:, : one.shape[1]])
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_streamed_as_they_come() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    policy = DecodingPolicy(DecodingParameters(temperature=0.9))
    written = policy.generate(made("llama"), IDS[:1], max_new_tokens=6, streamer=streamer)
    assert streamer.tokens == written[0].tolist() and streamer.ended


def test_a_models_own_settings_are_not_used_on_top() -> None:
    model = made("llama")
    policy = DecodingPolicy(DecodingParameters(temperature=0.9))
    before = policy.generate(model, IDS, max_new_tokens=6, seed=1)
    model.generation_config.repetition_penalty = 1.9
    model.generation_config.top_k = 2
    model.generation_config.do_sample = True
    assert torch.equal(policy.generate(model, IDS, max_new_tokens=6, seed=1), before)


def test_json_holds_all_of_it(tmp_path: Path) -> None:
    model = made("gpt2")
    parameters = DecodingParameters(temperature=0.7, top_p=0.9)
    policy = DecodingPolicy.of(model, parameters, layers=True, heads=True, context=True)
    assert policy.layer_weights is not None and policy.context is not None and policy.head_weights is not None
    policy.layer_weights[1] = 0.25
    policy.head_weights[0][1] = 1.5
    torch.nn.init.normal_(policy.context.linear.weight)
    again = InferenceEngine.from_json(policy.to_json(tmp_path / "inference_params.json"), model=model)
    assert again.to_dict() == policy.to_dict()
    written = [each.generate(model, IDS, max_new_tokens=5, seed=2) for each in (policy, again)]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 9}, "temperature"),
        ({"tempperature": 1}, "did you mean 'temperature'"),
        ({"format_version": 7}, "format_version 7"),
        ({"layer_weights": ["x"]}, "weights"),
        ({"context": [1]}, "context has to be a mapping"),
        ({"made_for": [1]}, "made_for has to be a mapping"),
    ],
)
def test_bad_json_is_refused_in_one_line(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"temperature": 0.7, **change}))
    with pytest.raises(ConfigError, match=message):
        DecodingPolicy.from_json(path)


def test_a_model_of_another_shape_is_refused() -> None:
    policy = DecodingPolicy.of(made("llama"), layers=True)
    with pytest.raises(ConfigError, match="model_type"):
        policy.generate(made("gpt2"), IDS)
    assert DecodingPolicy().check(made("gpt2")) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_weights": [1.0, 0.0]}, "num_hidden_layers 1, this one has 3"),
        (
            {"head_weights": [[1.0, 1.0, 1.0]] * 3},
            r"heads of each layer \[3, 3, 3\], this one has \[2, 2, 2\]",
        ),
        ({"context": {"linear.weight": [[0.0] * 5] * 2, "linear.bias": [0.0, 0.0]}}, "hidden_size 5, .* 12"),
    ],
)
def test_weights_of_another_shape_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingPolicy.from_dict(given).generate(made("llama"), IDS, max_new_tokens=4)


@pytest.mark.parametrize("values", [[], None, "x", 3])
def test_a_policy_is_a_mapping(values: object) -> None:
    with pytest.raises(ConfigError, match="has to be a mapping"):
        DecodingPolicy.from_dict(values)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    model = made("gpt2")
    with pytest.raises(DataError, match="empty"):
        DecodingPolicy().generate(model, IDS[:, :0], max_new_tokens=4)
    with pytest.raises(DataError, match="empty"):
        DecodingPolicy().generate(model, IDS, torch.tensor([[0] * 5, [1] * 5]), max_new_tokens=4)
    with pytest.raises(DataError, match="62 tokens and 4 new ones are more than the 64"):
        DecodingPolicy().generate(model, torch.full((1, 62), 5), max_new_tokens=4)
