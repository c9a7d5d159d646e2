"""How long a training step takes: the native model against stock Llama, a grown model against a built one.

Both sides hold the same weights, see the same batch, use the same optimizer with the same flags, and must
report the same loss before anything is timed. A step is forward, backward and the optimizer's update. The
two take turns, the first of a pair changing each time, so that a machine that slows down slows both; what is
reported is the median over pairs of (time of the other / time of ours) and its bootstrap interval.

    python benchmarks/step_speed.py                    # the figures; refuses to start on a busy machine
    python benchmarks/step_speed.py --preset quick     # does it run? (3 pairs, no figures)
    python benchmarks/step_speed.py --preset gpu       # bfloat16, torch.compile, larger shapes

The native model is asked for the loss alone (`skip_logits=True`), as Cambia's trainer asks it; stock Llama
has no such way and keeps its logits. Neither keeps a cache of keys and values.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from harness import arguments, interleaved, machine, median_interval, write_result
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.models import CambiaConfig, CambiaForCausalLM

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
    "cpu": Preset(SMALL, pairs=31),
    "quick": Preset(SMALL[:1], pairs=3, warm_up=1),
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


def table(results: list[Result]) -> Table:
    table = Table(
        title="ratio: time of the other / time of ours",
        caption="goal: 1.05 with an interval from 1.02 on against stock; 0.97 for a grown model",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
    )
    for column in ("model", "against", "its ms", "our ms", "tokens/s", "ratio", "95 % interval", "goal"):
        table.add_column(column, justify="left" if column in ("model", "against") else "right", no_wrap=True)
    for r in results:
        table.add_row(
            r.name,
            r.other,
            f"{r.other_ms:.1f}",
            f"{r.ours_ms:.1f}",
            f"{r.ours_tokens_per_second:,.0f}",
            f"{r.ratio:.3f}",
            f"{r.low:.3f} to {r.high:.3f}",
            "reached" if r.reached else "missed",
        )
    return table


def main() -> None:
    options = arguments(__doc__ or "", list(PRESETS))
    preset = PRESETS[options.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--preset gpu needs a CUDA device and torch finds none here; run --preset cpu")
    console = Console(width=120)
    console.print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, {preset.pairs} pairs")
    results = []
    for shape in preset.shapes:
        results.append(native_against_stock(shape, preset))
        console.print(f"  {shape}: {results[-1].ratio:.3f}")
    results.append(grown_against_built(preset))
    console.print(table(results))
    rows = [{**asdict(row), "reached": row.reached} for row in results]
    write_result(__file__, options, {"preset": asdict(preset), "results": rows})


if __name__ == "__main__":
    main()
