"""What memory one growth event needs, beside what the model and its optimizer grow by.

    cambia bench growth_memory --preset full

Goal: at most one extra copy of the largest tensor that grew and of its moments, and what its check takes.

Each event runs on a fresh copy of a model with two steps of AdamW behind it. Measured is the rise of the
process's peak resident size during the event (Linux), in a process of its own whose allocator gives every
tensor pages of its own, so that holes in its heap do not count. Other work on the machine does no harm.

    grown by   what is there more afterwards, weights and moments
    held       the largest old tensor that is replaced, with its moments, and all old tensors that growth
               multiplied, which are kept until it has succeeded
    check      what a forward pass of the check batch (4 x 128 tokens) needs by itself, and three times its
               logits: before, after, and their difference
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from growth_cost import EVENTS, SIZES, build, train_step
from harness import arguments, keep, table

from cambia import CambiaForCausalLM
from cambia.growth import grow, plan_growth

PRESETS = {
    "quick": {"sizes": SIZES[:1], "repeats": 1},
    "full": {"sizes": SIZES[1:], "repeats": 3},
}


def peak_rise(action) -> int | None:
    """Bytes by which an action raised the peak resident size above the size before it; None if unknown."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        action()
        return None
    # What training steps have freed goes back to the system first, or growth would hide in it.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts anew at the present size

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    before = kilobytes("VmRSS:")
    action()
    return (kilobytes("VmHWM:") - before) * 1024


def planned_bytes(model: CambiaForCausalLM, operator) -> dict[str, int]:
    """What the event adds for good and what it holds meanwhile: weights, and moments of old ones."""
    plan = plan_growth(model, operator)
    fresh = sum(p.numel() for name, p in plan.after.named_parameters() if not plan.lineages[name].inherits)
    grown = plan.parameters_after - plan.parameters_before
    return {"grown_by_bytes": 4 * (3 * (grown - fresh) + fresh), "held_bytes": plan.extra_bytes()}


def memory(size: tuple[int, int, int, int], event: str, repeats: int) -> dict:
    """What an event needs beside what is there, and what of it its check needs."""
    ids = torch.randint(0, size[3], (8, 256))
    check = torch.randint(0, size[3], (4, 128))
    events, checks = [], []
    for _ in range(repeats):
        model, optimizer = build(*size)
        for _ in range(2):
            train_step(model, optimizer, ids)
        checks.append(peak_rise(partial(forward, model, check)))
        events.append(
            peak_rise(partial(grow, model, EVENTS[event](), optimizer=optimizer, check_batch=check))
        )
    known = None not in events
    planned = planned_bytes(build(*size)[0], EVENTS[event]())
    vocabulary = plan_growth(build(*size)[0], EVENTS[event]()).config.vocab_size
    logits = 3 * check.numel() * vocabulary * 4
    check_bytes = int(statistics.median(checks)) + logits if known else None
    peak = int(statistics.median(events)) if known else None
    return {
        "size": size,
        "event": event,
        **planned,
        "check_bytes": check_bytes,
        "peak_rise_bytes": peak,
        "within_goal": peak is not None and peak <= sum(planned.values()) + (check_bytes or 0),
    }


@torch.no_grad()
def forward(model: CambiaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def markdown(result: Mapping[str, Any]) -> str:
    head = (
        "hidden, layers, feed-forward, vocabulary",
        "event",
        "grown by MB",
        "held MB",
        "check MB",
        "peak MB",
        "within the goal",
    )
    rows = []
    for row in result["events"]:
        figures = [row[key] for key in ("grown_by_bytes", "held_bytes", "check_bytes", "peak_rise_bytes")]
        rows.append(
            [
                ", ".join(map(str, row["size"])),
                row["event"],
                *(megabytes(figure) for figure in figures),
                "yes" if row["within_goal"] else "no",
            ]
        )
    return table(head, rows)


def megabytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:.0f}"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    widened = [row for row in result["events"] if row["event"] == "widen_ffn x1.5"]
    row = max(widened, key=lambda row: row["size"])
    hidden, layers, *_ = row["size"]
    peak, grown, check = (megabytes(row[key]) for key in ("peak_rise_bytes", "grown_by_bytes", "check_bytes"))
    return {
        f"highest memory of one growth event, {layers} layers of {hidden}, feed-forward x1.5": (
            f"{peak} MB, of which {grown} MB are the larger model and its moments, "
            f"and up to {check} MB the check"
        )
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    cells = [(size, event, preset["repeats"]) for size in preset["sizes"] for event in EVENTS]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc reads it when a process starts
    with multiprocessing.get_context("spawn").Pool(1) as process:
        found = {"events": process.starmap(memory, cells)}
    print(markdown(found))
    keep(__file__, options, found)


if __name__ == "__main__":
    main()
