"""LoRA experts that nobody tells where a domain ends or whose a text is, beside what people use today.

    cambia bench experts --preset headline [--parts FOLDER]

A small model that has read an encyclopedia learns other domains. Experts see a stream without boundaries and
route each text by its first 64 bytes; the other methods are told where domains end, and some of them whose a
text is. Only what follows the first 64 bytes of a row is scored, for all of them. Their settings are those
that `continual --preset headline` has chosen; experts have one configuration for all streams and bases, the
recipe `learn`. Streams:

    far, near      as in `continual`
    recurring      A, B, A, C, B of the far domains: three of them, five stages
    gradual        far domains that pass over into each other
    stationary     one text for very long: what grows after the first expert is a false alarm

Everything is a sweep of runs: a stopped benchmark goes on where it was. Whole parts (each seed of a stream)
are kept in the folder of --parts too. The corpora are found by CAMBIA_DATA.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forgetting.rows import ROWS, Settings
from forgetting.runs import sweep
from forgetting.streams import base_model, experiment, learner
from harness import in_parts, keep, over_seeds, table

from cambia import bench, rundir
from cambia.evaluation import run_metrics, task_matrix
from cambia.reporting.units import plural
from cambia.rundir import RunReader

BASELINES = ("naive", "replay", "lora", "lora_per_task", "full_per_task", "joint")
"""Rows of the continual benchmark, with the settings that it has chosen."""
CLAIMED = ("far", "near")
"""Streams on which the first claim decides, too."""


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    streams: tuple[str, ...] = ("far", "near", "recurring", "gradual")
    bases: tuple[str, ...] = ("llama", "gpt2")
    """The first one carries all rows on all streams, others the experts on far domains."""
    steps: int = 200
    """Steps of new text on each domain."""
    rows: int = 16
    """Sequences of 128 bytes in each step."""
    base_steps: int = 800
    seeds: int = 3
    stationary_steps: int = 2000
    scored_bytes: int = 16_384
    workers: int | None = None


PRESETS = {
    "quick": Preset(
        ("far",), ("llama",), steps=60, base_steps=100, seeds=1, stationary_steps=0, scored_bytes=8192
    ),
    "headline": Preset(),
    "full": Preset(seeds=9),
    "gpu": Preset(seeds=9, rows=160, workers=8),
}


# ---- the runs ------------------------------------------------------------------------------------


EXPERTS = {"experts": learner(), "experts, first claim": learner(routing="first_claim")}


def baselines() -> dict[str, Settings]:
    """What the continual benchmark has chosen, and replay of a twentieth."""
    chosen = (bench.find("continual", "headline").result("headline") or {}).get("settings")
    if chosen is None:
        sys.exit("the settings of the baselines come from `cambia bench continual --preset headline`: run it")
    (replay,) = chosen["replay"]["methods"]
    little = {**chosen["replay"], "methods": [{**replay, "fraction": 0.05}]}
    return {**{name: chosen[name] for name in BASELINES}, "replay of 5 %": little}


def rows_of(stream: str, kind: str) -> dict[str, Settings]:
    """Who learns a stream, on a base of a kind."""
    if stream == "gradual" or kind != "llama":
        return {"experts": EXPERTS["experts"]}
    return {**(EXPERTS if stream in CLAIMED else {"experts": EXPERTS["experts"]}), **baselines()}


# ---- what came out -------------------------------------------------------------------------------


def measured(run: RunReader) -> dict[str, Any]:
    """One cell: what it learned and lost, what grew and when, what it cost."""
    summary = run.summary() or {}
    found = run_metrics(run.rows(rundir.EVAL))
    assert found is not None
    results, texts = summary["results"], summary.get("texts", ())
    return {
        "final": found.final_mean,
        "forgetting": found.forgetting,
        "learned": found.learning_loss,
        "moved_since_sealed": moved_since_sealed(run),
        "lost_by_routes": found.forgetting_by_routes,
        "regret": found.regret_to_oracle,
        "right": statistics.fmean(text["right"] for text in texts) if texts else None,
        "texts": list(texts),
        "kept": len(summary.get("experts", ())),
        "grew_at": [event["step"] for event in run.growth() if event["done"]],
        "begins": begins(run.rows(rundir.METRICS)),
        **{f"{kind}_parameters": results[f"{kind}_parameters"] for kind in ("trained", "stored", "active")},
        "flops": results["flops"],
        "ms_per_token": summary["scoring_ms_per_token"],
        "wall_seconds": summary["wall_seconds"],
    }


def moved_since_sealed(run: RunReader) -> float | None:
    """By how much a text's loss has changed at most since its expert, told, was sealed: bits per byte."""
    matrix = task_matrix(run.rows(rundir.EVAL), route="oracle")
    moved = []
    for place in range(len(matrix.tasks)):
        sealed = [line["stage"] for line in run.promises() if str(place) in line.get("answerers", {})]
        since = [row[place] for row in matrix.rows[min(sealed) + 1 :]] if sealed else []
        moved += [max(since) - min(since)] if since else []
    return max(moved, default=None)


def begins(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Domain -> the first step that read it."""
    found: dict[str, int] = {}
    for row in rows:
        found.setdefault(str(row["task"]), int(row["step"]))
    return found


def delays(cell: Mapping[str, Any]) -> list[int]:
    """Batches from a domain's first one until an expert came; of domains that got one."""
    found = []
    starts = sorted(cell["begins"].values())
    for begin, end in zip(starts, [*starts[1:], sys.maxsize], strict=True):
        came = [step for step in cell["grew_at"] if begin <= step < end]
        found += [came[0] - begin + 1] if came else []
    return found


def stream_table(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One stream, best final average first."""
    head = [
        "method", "final average", "behind right routes", "routed right", "forgetting", "moved since sealed",
        "lost by routes", "learning", "experts born, kept", "batches until one came",
        "trained / stored / active (M)", "TFLOP",
    ]  # fmt: skip
    found = []
    for method, runs in cells.items():
        counts = (runs[-1][f"{kind}_parameters"] / 1e6 for kind in ("trained", "stored", "active"))
        mine = method in EXPERTS
        late = [delay for run in runs for delay in delays(run)]
        found.append(
            (
                statistics.fmean(run["final"] for run in runs),
                [
                    ROWS[method].label if method in ROWS else method,
                    over_seeds([run["final"] for run in runs]),
                    over_seeds([run["regret"] for run in runs]),
                    over_seeds([run["right"] for run in runs]),
                    "" if method == "joint" else over_seeds([run["forgetting"] for run in runs]),
                    f"{max(run['moved_since_sealed'] for run in runs):g}" if mine else "",
                    over_seeds([run["lost_by_routes"] for run in runs]) if mine else "",
                    "" if method == "joint" else over_seeds([run["learned"] for run in runs]),
                    "; ".join(f"{len(run['grew_at'])}, {run['kept']}" for run in runs) if mine else "",
                    f"{statistics.median(late):.0f} (at most {max(late)})" if mine and late else "",
                    " / ".join(f"{count:.2f}" for count in counts),
                    f"{statistics.fmean(run['flops'] for run in runs) / 1e12:.1f}",
                ],
            )
        )
    return table(head, [row for _, row in sorted(found, key=lambda pair: pair[0])])


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each stream and base, and what grew where nothing new came."""
    parts = []
    for name, cells in result["streams"].items():
        count = len(next(iter(cells.values())))
        what = f"**{name}**, {result['preset']['steps']} steps of {result['preset']['rows'] * 128:,} bytes"
        parts += [
            f"{what} a stage; {plural(count, 'seed')}, bits per byte of test text behind the first 64 bytes "
            "of each row, mean ± standard deviation:",
            stream_table(cells),
        ]
    for order, cell in result["stationary"].items():
        false = max(0, len(cell["grew_at"]) - 1)
        steps = result["preset"]["stationary_steps"]
        bound = f"; the rate is below {3 / steps:.4f} a batch with 95 %" if not false else ""
        parts.append(f"**stationary**, {order}: {plural(false, 'false growth')} in {steps:,} batches{bound}.")
    return "\n\n".join(parts)


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's rows: what is forgotten, and the end beside replay's."""
    found = {}
    for name, cells in result["streams"].items():
        if "naive" in cells:
            shown = ("naive", "replay of 5 %", "experts", "full_per_task")
            what = f"{name} domains, bits per byte at the end: naive, 5 % replay, experts, specialists"
            found[what] = ", ".join(over_seeds([run["final"] for run in cells[one]], 2) for one in shown)
    return found


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    name = f"bench-experts-{options.preset}"
    bases = {
        kind: base_model(
            kind, data, rundir.run_folder(f"{name}-{kind}"), steps=preset.base_steps, rows=preset.rows
        )
        for kind in preset.bases
    }

    def settings(stream: str, seed: int, base: Path, steps: int) -> dict[str, Any]:
        scored = preset.scored_bytes
        return experiment(stream, seed, data, base, steps=steps, rows=preset.rows, scored_bytes=scored)

    def cells(part: str, rows: Mapping[str, Settings], shared: dict[str, Any], seed: int) -> dict[str, Any]:
        runs = sweep(f"{name}-{part}", shared, rows, seed, preset.workers)
        return {method: measured(run) for method, run in runs.items()}

    first, *others = preset.bases
    streams: dict[str, dict[str, list[Any]]] = {}
    for stream, kind in [*((stream, first) for stream in preset.streams), *(("far", one) for one in others)]:
        rows, by_seed = rows_of(stream, kind), []
        for seed in range(preset.seeds):
            part, shared = f"{kind}-{stream}-{seed}", settings(stream, seed, bases[kind], preset.steps)
            by_seed.append(parts.once(part, functools.partial(cells, part, rows, shared, seed)))
        shown = stream if kind == first else f"{stream}, {kind}"
        streams[shown] = {method: [found[method] for found in by_seed] for method in rows}
    stationary = {}
    for order in ("contiguous", "shuffled") if preset.stationary_steps else ():
        shared = settings("stationary", 0, bases[first], preset.stationary_steps)
        shared["data"]["stream"] = {"type": "stationary", "stages": 1, "order": order}
        part, rows = f"stationary-{order}", {"experts": EXPERTS["experts"]}
        stationary[order] = parts.once(part, functools.partial(cells, part, rows, shared, 0))["experts"]
    result = {
        "name": f"experts_{options.preset}",
        "preset": asdict(preset),
        "streams": streams,
        "stationary": stationary,
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
