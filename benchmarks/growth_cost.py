"""What one growth event costs, in training steps; and what asking the rules costs.

    python benchmarks/growth_cost.py

Goals: an event takes less time than two training steps of 2,048 tokens at the size before it; signals and
rules take under 1 % of a step. (`growth_memory.py` measures memory.)

Each event runs on a fresh copy of a model with two steps of AdamW behind it, and is checked on a batch of
4 x 128 tokens, as in a run. Steps and events alternate.
"""

from __future__ import annotations

import statistics
import time

import torch
from harness import arguments, interleaved, median_interval, write_result
from rich.console import Console
from rich.table import Table

from cambia import CambiaConfig, CambiaForCausalLM
from cambia.growth import (
    AddKVHeads,
    AddLayers,
    AddTokens,
    GrowthManager,
    GrowthRule,
    Measured,
    PlateauTrigger,
    ScheduleTrigger,
    Signals,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    grow,
)

SIZES = [(128, 4, 384, 256), (256, 6, 768, 4096), (512, 8, 1408, 4096)]
EVENTS = {
    "widen_ffn x1.5": lambda: WidenFFN(factor=1.5),
    "add_layers +2": lambda: AddLayers(add=2),
    "add_kv_heads x2": lambda: AddKVHeads(factor=2),
    "widen_head_dim x2": lambda: WidenHeadDim(factor=2),
    "widen_hidden x1.5": lambda: WidenHidden(factor=1.5),
    "add_tokens +1024": lambda: AddTokens(add=1024),
}


def build(hidden: int, layers: int, ffn: int, vocab: int) -> tuple[CambiaForCausalLM, torch.optim.Optimizer]:
    heads = max(2, hidden // 64)
    config = CambiaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = CambiaForCausalLM(config).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def train_step(model: CambiaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def measure(size: tuple[int, int, int, int], event: str, pairs: int) -> dict:
    ids = torch.randint(0, size[3], (8, 256))
    check = torch.randint(0, size[3], (4, 128))
    stepping = build(*size)

    def one_event() -> float:
        model, optimizer = build(*size)
        for _ in range(2):
            train_step(model, optimizer, ids)
        began = time.perf_counter()
        grow(model, EVENTS[event](), optimizer=optimizer, check_batch=check)
        return time.perf_counter() - began

    events, steps = interleaved(one_event, lambda: train_step(*stepping, ids), pairs=pairs, warmup=2)
    ratio, low, high = median_interval([e / s for e, s in zip(events, steps, strict=True)])
    return {
        "size": dict(zip(("hidden", "layers", "ffn", "vocab"), size, strict=True)),
        "event": event,
        "pairs": pairs,
        "step_ms": statistics.median(steps) * 1e3,
        "event_ms": statistics.median(events) * 1e3,
        "event_in_steps": ratio,
        "interval_95": [low, high],
        "goal_met": high < 2,
    }


def rules_cost(size: tuple[int, int, int, int], repeats: int) -> dict:
    """Seconds to build Signals and ask three rules that do not fire, against a training step."""
    model, optimizer = build(*size)
    ids = torch.randint(0, size[3], (8, 256))
    step = statistics.median(train_step(model, optimizer, ids) for _ in range(10))
    rules = [
        GrowthRule(when=ScheduleTrigger(at_steps=[10**9]), then=WidenFFN(factor=1.5)),
        GrowthRule(when=ScheduleTrigger(at_fractions=[0.99]), then=AddLayers(add=1)),
        GrowthRule(when=PlateauTrigger(patience=10**9), then=WidenFFN(factor=1.5)),
    ]
    manager = GrowthManager(rules, model=model, optimizer=optimizer)
    began = time.perf_counter()
    for i in range(repeats):
        values = {"validation_loss": Measured(1.0, i)}
        manager.step(Signals(step=i, tokens=i, loss=1.0, grad_norm=1.0, values=values))
    each = (time.perf_counter() - began) / repeats
    return {"size": size, "step_ms": step * 1e3, "asking_ms": each * 1e3, "share_of_step": each / step}


def main() -> None:
    options = arguments(__doc__ or "", ["full", "quick"])
    pairs = 12 if options.preset == "full" else 3
    sizes = SIZES if options.preset == "full" else SIZES[:1]
    # The two events that runs have mostly at every size, the others at one.
    cells = [(size, event) for size in sizes for event in list(EVENTS)[:2]]
    cells += [(sizes[len(sizes) // 2], event) for event in list(EVENTS)[2:]]
    rows = [measure(*cell, pairs) for cell in cells]
    asking = rules_cost(SIZES[0], 2000)
    columns = ("event", "step ms", "event ms", "event / step (95 %)")
    table = Table("d, L, ffn, V", *columns)
    for row in rows:
        low, high = row["interval_95"]
        table.add_row(
            ", ".join(map(str, row["size"].values())),
            row["event"],
            f"{row['step_ms']:.0f}",
            f"{row['event_ms']:.0f}",
            f"{row['event_in_steps']:.2f} ({low:.2f} to {high:.2f})",
        )
    console = Console()
    console.print(table)
    console.print(f"asking three rules: {asking['share_of_step']:.3%} of a step at {SIZES[0]}")
    write_result(__file__, options, {"events": rows, "rules": asking})


if __name__ == "__main__":
    main()
