"""How long a training step takes: the native model against stock Llama, a grown model against a built one.

Both sides hold the same weights, see the same batch, use the same optimizer with the same flags, and must
report the same loss before anything is timed. A step is forward, backward and the optimizer's update. The
two take turns, the first of a pair changing each time, so that a machine that slows down slows both; what is
reported is the median over pairs of (time of the other / time of ours) and its bootstrap interval.

    cambia bench step_speed --preset full     # refuses to start on a busy machine
    cambia bench step_speed --preset gpu      # bfloat16, torch.compile, larger shapes

The native model is asked for the loss alone (`skip_logits=True`), as Cambia's trainer asks it; stock Llama
has no such way and keeps its logits. Neither keeps a cache of keys and values.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from harness import arguments, interleaved, keep, median_interval, table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.models import CambiaConfig, CambiaForCausalLM
from cambia.models.bodies import count_parameters, on_meta

Step = Callable[[], float]
"""One training step; returns its seconds."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; key/value heads are half the heads."""

    hidden: int
    layers: int
    ffn: int
    vocabulary: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.hidden} x {self.layers}, ffn {self.ffn}, vocab {self.vocabulary}"

    def settings(self) -> dict[str, Any]:
        heads = self.hidden // self.head_dim
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
        }

    @property
    def parameters(self) -> int:
        return count_parameters(on_meta(CambiaForCausalLM, CambiaConfig(**self.settings())))


@dataclass(frozen=True)
class Preset:
    """What is measured and how often."""

    shapes: tuple[Shape, ...]
    pairs: int
    warm_up: int = 4
    batch: int = 8
    length: int = 256
    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False


SMALL = (Shape(128, 4, 384, 256, 32), Shape(256, 6, 768, 4096, 32), Shape(512, 8, 1408, 4096, 64))
LARGE = (Shape(768, 12, 2048, 32768, 64), Shape(2048, 16, 5632, 32768, 128))
PRESETS = {
    "quick": Preset(SMALL[:1], pairs=3, warm_up=1),
    "full": Preset(SMALL, pairs=31),
    "gpu": Preset(LARGE, 31, warm_up=8, batch=16, length=1024, device="cuda", bfloat16=True, compiled=True),
}


@dataclass(frozen=True)
class Result:
    """One row: `ratio` above 1 means that ours is faster."""

    name: str
    other: str
    goal: float
    goal_low: float
    ratio: float
    low: float
    high: float
    """95 % bootstrap interval of the median ratio."""
    other_ms: float
    ours_ms: float
    ours_tokens_per_second: float
    losses: tuple[float, float]
    """Of the other and of ours before the first step, nats per token."""
    other_times_ms: list[float]
    ours_times_ms: list[float]

    @property
    def reached(self) -> bool:
        return self.ratio >= self.goal and self.low >= self.goal_low


# ---- what is timed -------------------------------------------------------------------------------


def batch_of(preset: Preset, vocabulary: int) -> torch.Tensor:
    """(B, T) random token ids."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (preset.batch, preset.length), generator=generator)
    return ids.to(preset.device)


def adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)


def stepper(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, preset: Preset
) -> Step:
    """A function that does one training step."""
    model.train()
    extra = {"skip_logits": True} if isinstance(model, CambiaForCausalLM) else {}
    forward = torch.compile(model) if preset.compiled else model
    on_gpu = preset.device == "cuda"

    def step() -> float:
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        began = time.perf_counter()
        with torch.autocast(preset.device, dtype=torch.bfloat16, enabled=preset.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not on_gpu:
            return time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    return step


@torch.no_grad()
def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def result(
    name: str,
    other: str,
    goals: tuple[float, float],
    losses: tuple[float, float],
    times: tuple[list[float], list[float]],
    tokens: int,
) -> Result:
    ratio, low, high = median_interval([one / two for one, two in zip(*times, strict=True)])
    medians = [statistics.median(side) for side in times]
    return Result(
        name=name,
        other=other,
        goal=goals[0],
        goal_low=goals[1],
        ratio=ratio,
        low=low,
        high=high,
        other_ms=1000 * medians[0],
        ours_ms=1000 * medians[1],
        ours_tokens_per_second=tokens / medians[1],
        losses=losses,
        other_times_ms=[1000 * seconds for seconds in times[0]],
        ours_times_ms=[1000 * seconds for seconds in times[1]],
    )


# ---- the rows ------------------------------------------------------------------------------------


def native_against_stock(shape: Shape, preset: Preset) -> Result:
    """The same weights in both classes."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**shape.settings()))
    stock.set_attn_implementation("sdpa")
    stock.to(preset.device)
    native = CambiaForCausalLM(CambiaConfig(**shape.settings())).to(preset.device)
    native.load_state_dict(stock.state_dict())
    ids = batch_of(preset, shape.vocabulary)
    losses = (loss_of(stock, ids), loss_of(native, ids))
    if abs(losses[0] - losses[1]) > 1e-5 * losses[0]:
        sys.exit(f"the two models do not compute the same loss: stock {losses[0]}, native {losses[1]}")
    times = interleaved(
        stepper(stock, adamw(stock), ids, preset),
        stepper(native, adamw(native), ids, preset),
        pairs=preset.pairs,
        warmup=preset.warm_up,
    )
    return result(str(shape), "stock Llama", (1.05, 1.02), losses, times, ids.numel())


def grown_against_built(preset: Preset) -> Result:
    """A model that grew three times, with its optimizer, and one that was built at the final size."""
    from cambia.growth import AddLayers, WidenFFN, grow

    final = preset.shapes[min(1, len(preset.shapes) - 1)]
    small = replace(final, layers=final.layers // 2, ffn=final.ffn // 2)
    torch.manual_seed(0)
    grown = CambiaForCausalLM(CambiaConfig(**small.settings())).to(preset.device)
    optimizer = adamw(grown)
    ids = batch_of(preset, final.vocabulary)
    once = replace(preset, compiled=False)
    for operator in (WidenFFN(to=final.ffn * 3 // 4), AddLayers(to=final.layers), WidenFFN(to=final.ffn)):
        stepper(grown, optimizer, ids, once)()
        grow(grown, operator, optimizer=optimizer)
    built = CambiaForCausalLM(CambiaConfig(**final.settings())).to(preset.device)
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (grown, built)]
    if shapes[0] != shapes[1]:
        sys.exit("the grown model has not the shape of the built one")
    losses = (loss_of(built, ids), loss_of(grown, ids))
    times = interleaved(
        stepper(built, adamw(built), ids, preset),
        stepper(grown, optimizer, ids, preset),
        pairs=preset.pairs,
        warmup=preset.warm_up,
    )
    return result(f"{final} (grown)", "built so", (0.97, 0.0), losses, times, ids.numel())


# ---- the report ----------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    head = (
        "model (hidden x layers)",
        "against",
        "its ms",
        "our ms",
        "our tokens/s",
        "its time / ours (95 %)",
        "goal",
    )
    return table(head, [cells(row) for row in result["results"]])


def cells(row: Mapping[str, Any]) -> list[str]:
    least = f", interval from {row['goal_low']}" if row["goal_low"] else ""
    return [
        row["name"],
        row["other"],
        f"{row['other_ms']:.1f}",
        f"{row['ours_ms']:.1f}",
        f"{row['ours_tokens_per_second']:,.0f}",
        f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        f"{row['goal']}{least}: {'reached' if row['reached'] else 'missed'}",
    ]


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    *against_stock, grown = result["results"]
    ratios = ", ".join(f"{row['ratio']:.2f}" for row in against_stock)
    shapes = [Shape(**shape) for shape in result["preset"]["shapes"]]
    *sizes, largest = (f"{shape.parameters / 1e6:.2g}M" for shape in shapes)
    return {
        "a training step of the native model against stock Llama, sdpa, the same loss: "
        "time of stock / ours": f"{ratios} at {', '.join(sizes)} and {largest} parameters",
        "a step of a model that grew three times against one built at that size": f"{grown['ratio']:.2f}",
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--preset gpu needs a CUDA device and torch finds none here; run --preset full")
    rows = []
    for shape in preset.shapes:
        rows.append(native_against_stock(shape, preset))
        print(f"{shape}: {rows[-1].ratio:.3f}", file=sys.stderr)
    rows.append(grown_against_built(preset))
    found = {
        "preset": asdict(preset),
        "results": [{**asdict(row), "reached": row.reached} for row in rows],
    }
    print(markdown(found))
    keep(__file__, options, found)


if __name__ == "__main__":
    main()
