"""What a policy costs when it writes: `policy.generate` against `model.generate` with the same sampling.

    cambia bench decoding_cost --preset full

Both sides write as many tokens behind the same prompts with the same cache; they alternate, and the median of
(Cambia's time / transformers' time) is reported with its bootstrap interval. `plain` samples with temperature
and top-p; `penalties` with a repetition penalty beside; `layers and heads` mixes the hidden states of all
layers and scales heads, `context` has a head that sets temperature and top-p for each token. Goals: at most
1.05 without weights of layers and heads, 1.15 with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import arguments, interleaved, keep, median_interval, table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.decoding import DecodingParameters, DecodingPolicy


@dataclass(frozen=True)
class Preset:
    """What is measured and how often."""

    pairs: int = 21
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 32_000
    rows: int = 16
    prompt: int = 32
    written: int = 48


PRESETS = {
    "quick": Preset(pairs=3, hidden=64, layers=2, vocabulary=1000, written=8),
    "full": Preset(),
    "gpu": Preset(pairs=31, hidden=2048, layers=16, prompt=128, written=128),
}
PLAIN = DecodingParameters(temperature=0.8, top_p=0.95)
PENALISED = DecodingParameters(temperature=0.8, top_p=0.95, repetition_penalty=1.1)
GOALS = {"plain": 1.05, "penalties": 1.05, "layers and heads": 1.15, "context": 1.15}


def model_of(preset: Preset) -> PreTrainedModel:
    """A Llama with weights drawn at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=int(8 / 3 * preset.hidden),
        num_hidden_layers=preset.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LlamaForCausalLM(config).eval().to(device)


def policies(model: PreTrainedModel) -> dict[str, DecodingPolicy]:
    """What is measured; all of them draw with the parameters that transformers is told."""
    heard = DecodingPolicy.of(model, PLAIN, layers=True, heads=True)
    assert heard.layer_weights is not None
    heard.layer_weights[1] = 0.01
    return {
        "plain": DecodingPolicy(PLAIN),
        "penalties": DecodingPolicy(PENALISED),
        "layers and heads": heard,
        "context": DecodingPolicy.of(model, PLAIN, context=True),
    }


def ratio(model: PreTrainedModel, policy: DecodingPolicy, preset: Preset) -> dict[str, Any]:
    """Writing with a policy and with transformers, in turn."""
    prompts = torch.randint(0, preset.vocabulary, (preset.rows, preset.prompt), device=model.device)
    mask = torch.ones_like(prompts)
    own = policy.parameters
    settings = GenerationConfig(
        do_sample=True,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=0,
        repetition_penalty=own.repetition_penalty,
        max_new_tokens=preset.written,
        pad_token_id=0,
    )

    def ours() -> Any:
        return policy.generate(model, prompts, mask, max_new_tokens=preset.written, seed=1)

    def theirs() -> Any:
        return model.generate(prompts, attention_mask=mask, generation_config=settings)

    first, second = interleaved(clocked(ours), clocked(theirs), pairs=preset.pairs)
    middle, low, high = median_interval([a / b for a, b in zip(first, second, strict=True)])
    return {"ratio": middle, "low": low, "high": high, "ours": first, "theirs": second}


def clocked(write: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of a call."""

    def call() -> float:
        began = time.perf_counter()
        write()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return call


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    preset = result["preset"]
    note = (
        f"Writing {preset['written']} tokens in {preset['rows']} rows, hidden size {preset['hidden']}, "
        f"{preset['layers']} layers, {preset['vocabulary']:,} tokens: Cambia's time over transformers' with "
        "the same sampling, median and 95 % interval."
    )
    rows = [
        [name, f"{one['ratio']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", f"{GOALS[name]:.2f}"]
        for name, one in result["ratios"].items()
    ]
    return f"{note}\n\n{table(['policy', 'time', 'interval', 'goal, at most'], rows)}"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The README's rows."""
    found = result["ratios"]
    return {
        "writing with a policy, time over transformers' sampling": f"{found['plain']['ratio']:.2f}",
        "the same with weights of layers and heads": f"{found['layers and heads']['ratio']:.2f}",
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    model = model_of(preset)
    ratios = {name: ratio(model, policy, preset) for name, policy in policies(model).items()}
    result = {"preset": asdict(preset), "ratios": ratios}
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
