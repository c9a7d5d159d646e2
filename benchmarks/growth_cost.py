"""What one growth event costs, in training steps; and what asking the rules costs.

    cambia bench growth_cost --preset full

Goals: an event takes less time than two training steps of 2,048 tokens at the size before it; signals and
rules take under 1 % of a step. (`growth_memory.py` measures memory.)

Each event runs on a fresh copy of a model with two steps of AdamW behind it, and is checked on a batch of
4 x 128 tokens, as in a run. Steps and events alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from harness import arguments, interleaved, keep, median_interval, table

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
PRESETS = {
    "quick": {"sizes": SIZES[:1], "pairs": 3},
    "full": {"sizes": SIZES, "pairs": 12},
}
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


def markdown(result: Mapping[str, Any]) -> str:
    head = (
        "hidden, layers, feed-forward, vocabulary",
        "event",
        "step, ms",
        "event, ms",
        "event / step (95 %)",
    )
    rows = []
    for row in result["events"]:
        low, high = row["interval_95"]
        size = ", ".join(map(str, row["size"].values()))
        times = f"{row['step_ms']:.0f}", f"{row['event_ms']:.0f}"
        rows.append([size, row["event"], *times, f"{row['event_in_steps']:.2f} ({low:.2f} to {high:.2f})"])
    asking = result["rules"]
    return (
        f"{table(head, rows)}\n\n"
        f"Signals and three rules take {share(asking)} of a step at {', '.join(map(str, asking['size']))}."
    )


def share(asking: Mapping[str, Any]) -> str:
    return f"{100 * asking['share_of_step']:.1g} %"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    in_steps = [row["event_in_steps"] for row in result["events"]]
    return {
        "one growth event, in training steps of 2,048 tokens": f"{min(in_steps):.1f} to {max(in_steps):.1f}",
        "signals and three rules, share of a step": share(result["rules"]),
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    sizes = preset["sizes"]
    # The two events that runs have mostly at every size, the others at one.
    cells = [(size, event) for size in sizes for event in list(EVENTS)[:2]]
    cells += [(sizes[len(sizes) // 2], event) for event in list(EVENTS)[2:]]
    rows = [measure(*cell, preset["pairs"]) for cell in cells]
    found = {"events": rows, "rules": rules_cost(SIZES[0], 2000)}
    print(markdown(found))
    keep(__file__, options, found)


if __name__ == "__main__":
    main()
