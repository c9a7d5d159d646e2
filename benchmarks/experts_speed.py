"""How fast a batch is answered whose rows belong to different LoRA experts, beside PEFT and one merged model.

    cambia bench experts_speed --preset full

The same adapters stand beside the same Llama: in Cambia as LoRA experts, in PEFT as adapters that a batch
names row by row (`adapter_names`), and once merged into the weights, for one expert, which is as fast as
there is. Before anything is timed, all must say the same. Then they take turns:

    prefill   the prompts of a batch, read at once
    decode    token after token with the cache of keys and values
    training  a step of one expert, against one adapter of PEFT: forward, backward, AdamW
    stored    a token with many experts stored, against few

Experts are low-rank deltas of all linear layers, as PEFT's are, without tables and gains.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import arguments, interleaved, keep, median_interval, table
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.models import LoraExperts, LoraShape
from cambia.nn.routed import bare_copy

VOCABULARY = 1024


@dataclass(frozen=True)
class Preset:
    """What is measured and how often."""

    hidden: int = 512
    layers: int = 8
    rank: int = 16
    rows: int = 16
    prompt: int = 128
    written: int = 16
    experts: int = 8
    many: int = 64
    few: int = 2
    pairs: int = 31


PRESETS = {
    "quick": Preset(hidden=64, layers=2, rank=4, prompt=16, written=4, many=8, pairs=2),
    "full": Preset(),
    "gpu": Preset(hidden=2048, layers=16, prompt=512, written=64),
}
GOALS = {
    "decode, PEFT": 2.0,
    "prefill, PEFT": 1.05,
    "decode, merged": 0.85,
    "prefill, merged": 0.85,
    "training, PEFT": 1.0,
    "stored": 1.1,
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_model(preset: Preset) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.hidden,
        intermediate_size=3 * preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.hidden // 64,
        num_key_value_heads=preset.hidden // 64,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to(device()).eval()


def with_experts(model: PreTrainedModel, preset: Preset, count: int) -> LoraExperts:
    """Experts that say something."""
    experts = LoraExperts(model, LoraShape(rank=preset.rank, tables="none", gains=False))
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        part = experts.add(f"skill_{number}")
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
        experts.seal(part.name)
    return experts


@dataclass(frozen=True, eq=False)
class Side:
    """A model that reads prompts and writes on."""

    model: Any
    routed: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Inside, the rows belong to their experts."""
    more: Mapping[str, Any] | None = None
    """Given at every call."""

    @torch.no_grad()
    def read(self, prompts: Tensor) -> tuple[float, Any]:
        """Seconds, and what the model has to go on from."""
        with self.routed():
            began = clock()
            outputs = self.model(input_ids=prompts, use_cache=True, logits_to_keep=1, **(self.more or {}))
            return clock() - began, outputs

    @torch.no_grad()
    def written(self, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
        """Seconds for all tokens after the first, and the last logits (B, V)."""
        with self.routed():
            outputs = self.model(input_ids=prompts, use_cache=True, logits_to_keep=1, **(self.more or {}))
            began = clock()
            for _ in range(tokens):
                token = outputs.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
                outputs = self.model(
                    input_ids=token,
                    past_key_values=outputs.past_key_values,
                    use_cache=True,
                    **(self.more or {}),
                )
            return clock() - began, outputs.logits[:, -1]


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_peft(experts: LoraExperts, names: Sequence[str]) -> PeftModel:
    """The same experts as adapters of PEFT."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {name: experts.to_peft(name, Path(folder) / name) for name in names}
        model = PeftModel.from_pretrained(bare_copy(experts.model), paths[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(paths[name], adapter_name=name)
    return model.eval()


def answering(preset: Preset) -> dict[str, Any]:
    """Prefill and decoding on all sides."""
    experts = with_experts(new_model(preset), preset, preset.experts)
    names = [f"skill_{row % preset.experts}" for row in range(preset.rows)]
    prompts = torch.randint(
        0, VOCABULARY, (preset.rows, preset.prompt), generator=torch.Generator().manual_seed(2)
    ).to(device())
    ours = Side(experts.model, lambda: experts.routed(names))
    peft = Side(in_peft(experts, experts.names), more={"adapter_names": names})
    merged = Side(experts.merged("skill_0"))

    said = ours.written(prompts, 2)[1]
    same(said, peft.written(prompts, 2)[1], "PEFT")
    with experts.using("skill_0"):
        same(Side(experts.model).written(prompts, 2)[1], merged.written(prompts, 2)[1], "the merged model")

    found = {}
    for kind, other in (("PEFT", peft), ("merged", merged)):
        found[f"prefill, {kind}"] = timed(
            lambda o=other: o.read(prompts)[0], lambda: ours.read(prompts)[0], preset.pairs
        )
        found[f"decode, {kind}"] = timed(
            lambda o=other: o.written(prompts, preset.written)[0],
            lambda: ours.written(prompts, preset.written)[0],
            preset.pairs,
        )
    return found


def stored(preset: Preset) -> dict[str, Any]:
    """A token of the same rows and experts with many others stored, over few."""
    sides = []
    prompts = torch.randint(0, VOCABULARY, (preset.rows, 16), generator=torch.Generator().manual_seed(2))
    for count in (preset.many, preset.few):
        experts = with_experts(new_model(preset), preset, count)
        names = [f"skill_{row % preset.few}" for row in range(preset.rows)]
        sides.append(Side(experts.model, lambda e=experts, n=names: e.routed(n)))
    many, few = sides
    seconds = [lambda s=side: s.written(prompts.to(device()), preset.written)[0] for side in (many, few)]
    return {"stored": timed(*seconds, preset.pairs)}


def training(preset: Preset) -> dict[str, Any]:
    """A step of one expert, and of one adapter of PEFT."""
    experts = with_experts(new_model(preset), preset, 0)
    part = experts.add("skill")
    peft = in_peft(experts, ["skill"])
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    batch = torch.randint(
        0, VOCABULARY, (preset.rows, preset.prompt), generator=torch.Generator().manual_seed(3)
    ).to(device())
    ours = steps(experts.model, list(part.parameters()), batch, lambda: experts.teaching("skill"))
    theirs = steps(peft, [p for p in peft.parameters() if p.requires_grad], batch, nullcontext)
    mine, other = ours()[1], theirs()[1]
    if abs(mine - other) > 1e-4 * abs(other):
        raise SystemExit(f"the losses differ: {mine} here, {other} with PEFT")
    return {"training, PEFT": timed(lambda: theirs()[0], lambda: ours()[0], preset.pairs)}


def steps(
    model: Any, parameters: list[Any], batch: Tensor, using: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], tuple[float, float]]:
    """A training step, to be called again and again: its seconds and its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> tuple[float, float]:
        model.train()
        began = clock()
        with using():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - began, loss.item()

    return step


def same(one: Tensor, other: Tensor, whose: str) -> None:
    """Nothing is timed that says something else."""
    error = ((one - other).abs().max() / other.abs().max()).item()
    if error > 1e-3:
        raise SystemExit(f"the logits differ from those of {whose} by {error:.1e} (relative)")


def timed(other: Callable[[], float], ours: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Both in turn: the ratio of the other's time to ours, pair by pair."""
    theirs, mine = interleaved(other, ours, pairs=pairs)
    middle, low, high = median_interval([a / b for a, b in zip(theirs, mine, strict=True)])
    return {
        "ratio": middle,
        "low": low,
        "high": high,
        "other_ms": [round(1000 * t, 3) for t in theirs],
        "ours_ms": [round(1000 * t, 3) for t in mine],
    }


LABELS = {
    "prefill, PEFT": "prefill, time of PEFT's mixed batch / ours",
    "decode, PEFT": "decoding, time of PEFT's mixed batch / ours",
    "prefill, merged": "prefill, time of one merged model / ours",
    "decode, merged": "decoding, time of one merged model / ours",
    "training, PEFT": "training step, time of PEFT's LoRA / ours",
    "stored": "decoding, time with many experts stored / with few",
}


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    preset = result["preset"]
    told = (
        f"Llama of {preset['layers']} layers of {preset['hidden']}, rank {preset['rank']}, {preset['rows']} "
        f"rows over {preset['experts']} experts, prompts of {preset['prompt']} tokens and "
        f"{preset['written']} more; stored: {preset['many']} experts against {preset['few']}."
    )
    rows = []
    for name, label in LABELS.items():
        one, goal = result["ratios"][name], GOALS[name]
        reached = one["ratio"] <= goal if name == "stored" else one["ratio"] >= goal
        bound = "at most" if name == "stored" else "at least"
        rows.append(
            [
                label,
                f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})",
                f"{bound} {goal:.2f}, {'reached' if reached else 'missed'}",
            ]
        )
    return f"{told}\n\n{table(['what', 'ratio (95 % interval)', 'goal'], rows)}"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's rows."""
    ratios = {name: f"{one['ratio']:.2f}" for name, one in result["ratios"].items()}
    return {
        "a batch of 16 over 8 LoRA experts, time of PEFT's mixed batch / ours: decoding, prefill": (
            f"{ratios['decode, PEFT']}, {ratios['prefill, PEFT']}"
        ),
        "the same, time of one merged model / ours: decoding, prefill": (
            f"{ratios['decode, merged']}, {ratios['prefill, merged']}"
        ),
        "a token with 64 experts stored, in tokens with 2": ratios["stored"],
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    ratios = {**answering(preset), **training(preset), **stored(preset)}
    result = {"preset": asdict(preset), "ratios": ratios}
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
