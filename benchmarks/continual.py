"""What continual-learning methods learn and what they forget, on far and on near domains.

    cambia bench continual --preset headline [--parts FOLDER]

A small model that has read general text learns one domain after another: far ones (an encyclopedia, a
Spanish novel, SQL, German law) and near ones (an English novel, English speeches, the same encyclopedia,
with the marks of their making removed, so that content alone tells them apart). Each method sees as much new
text; its settings are chosen on other domains, each from as many trials. Seed s begins with domain s, so that
domains stand at different places. The rate re-warms and decays within each domain. What joint training learns
and forgets domain by domain means nothing, since all of them train at once.

Everything is a sweep of runs: a stopped benchmark goes on where it was. Whole parts (the tuning,
each seed of a stream) are kept in the folder of --parts too, so that another machine can go on. The corpora
are found by CAMBIA_DATA.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forgetting.figures import draw
from forgetting.rows import REFERENCE, ROWS, Settings
from forgetting.runs import FAR, NATIVE, NEAR, pretrained, source, sweep
from harness import in_parts, keep, over_seeds, table

from cambia import rundir
from cambia.evaluation import task_matrix, transfer_metrics
from cambia.reporting.units import plural
from cambia.rundir import RunReader

OTHER = ("biomedicine", "arithmetic", "plays")
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
BY_DOMAIN = ("forgetting", "learned", "intransigence")
DRAWN = {
    "tradeoff": "learning loss against forgetting",
    "lost": "bits per byte lost with each further domain",
    "matrices": "task matrices of six methods",
}


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    streams: tuple[str, ...] = ("far", "near")
    steps: int = 200
    """Steps on each domain."""
    tuning_steps: int = 80
    """Steps on each domain of tuning."""
    rows: int = 16
    """Sequences of 128 bytes in each step."""
    base_steps: int = 800
    seeds: int = 3
    tuned: bool = True
    few: bool = False
    """Only the methods that matter most."""
    trials: int = 6
    scored_bytes: int = 16_384
    workers: int | None = None


PRESETS = {
    "quick": Preset(("far",), seeds=1, tuned=False, base_steps=200, scored_bytes=8192),
    "headline": Preset(),
    "full": Preset(steps=300, seeds=9, few=True),
    "gpu": Preset(steps=300, seeds=9, rows=160, few=True, workers=8),
}


# ---- the runs ------------------------------------------------------------------------------------


def experiment(
    preset: Preset, domains: Sequence[str], data: Path, base: Path, *, plain: bool
) -> dict[str, Any]:
    """The settings that all methods share."""
    return {
        "data": {
            "tasks": [{"name": name, "source": source(name, data, plain=plain)} for name in domains],
            "stream": {"type": "sequence", "order_by_seed": True},
        },
        "model": {"type": "pretrained", "path": str(base)},
        "training": {"steps": preset.steps, "batch_size": preset.rows, "sequence_length": 128},
        "evaluation": {"every_steps": None, "max_bytes": preset.scored_bytes, "batch_size": 32},
        "checkpoint": {"every_steps": None, "keep_tasks": False},
        "growth": {"enabled": False},
    }


def base_model(preset: Preset, folder: Path) -> Path:
    """A model of a million parameters that has read prose, code and law: what every method begins with."""
    kinds = ("english", "python", "cpp", "legal")
    text = {"type": "mixture", "sources": [{"type": "embedded", "domain": kind} for kind in kinds]}
    return pretrained(folder, text, NATIVE, steps=preset.base_steps, rows=preset.rows)


def chosen(
    name: str, preset: Preset, shared: Mapping[str, Any]
) -> tuple[dict[str, Settings], list[dict[str, Any]]]:
    """The settings of each method that end best on the domains of tuning, and all that was tried."""
    rows = {method: row for method, row in ROWS.items() if row.matters or not preset.few}
    if not preset.tuned:
        return {method: row.trials[len(row.trials) // 2] for method, row in rows.items()}, []
    names = {
        f"{method} {i}": s for method, row in rows.items() for i, s in enumerate(row.trials[: preset.trials])
    }
    ran = sweep(name, shared, names, 0, preset.workers)
    losses = {trial: (run.summary() or {})["results"]["test_bits_per_byte"] for trial, run in ran.items()}
    best, tried = {}, []
    for method, row in rows.items():
        mine = [losses[f"{method} {i}"] for i in range(len(row.trials[: preset.trials]))]
        taken = min(range(len(mine)), key=mine.__getitem__)
        best[method] = row.trials[taken]
        tried += [
            {"method": method, "settings": row.trials[i], "loss": loss, "chosen": i == taken}
            for i, loss in enumerate(mine)
        ]
    return best, tried


# ---- what came out -------------------------------------------------------------------------------


def measured(run: RunReader) -> dict[str, Any]:
    """One cell: its task matrix, and what it cost."""
    matrix = task_matrix(run.rows(rundir.EVAL))
    summary = run.summary() or {}
    names = (
        "trained_parameters",
        "stored_parameters",
        "active_parameters",
        "replay_bytes",
        "flops",
        "tokens",
    )
    return {
        "tasks": list(matrix.tasks),
        "matrix": [list(row) for row in matrix.rows],
        **{name: summary["results"][name] for name in names},
        "ms_per_token": summary["scoring_ms_per_token"],
        "wall_seconds": summary["wall_seconds"],
    }


def measures(cell: Mapping[str, Any], specialist: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a cell, in bits per byte."""
    # Each domain is trained once, in the order of the columns.
    own = {task: specialist["matrix"][j + 1][j] for j, task in enumerate(specialist["tasks"])}
    reference = [own[task] for task in cell["tasks"]]
    found = transfer_metrics(cell["matrix"], cell["tasks"], reference=reference)
    assert found.intransigence is not None
    return {
        "final": found.final_mean,
        "forgetting": found.forgetting,
        "learned": found.learning_loss,
        "intransigence": statistics.fmean(found.intransigence),
    }


def columns_of(cells: Mapping[str, Sequence[Mapping[str, Any]]], method: str) -> dict[str, list[float]]:
    """The columns of a method, over seeds."""
    each = [measures(cell, other) for cell, other in zip(cells[method], cells[REFERENCE], strict=True)]
    return {name: [one[name] for one in each] for name in each[0]}


def stream_table(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One stream, best final average first."""
    head = [
        "method", "needs", "final average", "forgetting", "learning", "intransigence",
        "trained / stored / active (M)", "replay (kB)", "TFLOP",
    ]  # fmt: skip
    found = []
    for method, runs in cells.items():
        columns = columns_of(cells, method)
        counts = (runs[-1][f"{kind}_parameters"] / 1e6 for kind in ("trained", "stored", "active"))
        found.append(
            (
                statistics.fmean(columns["final"]),
                [
                    ROWS[method].label,
                    ROWS[method].needs,
                    over_seeds(columns["final"]),
                    *("" if method == "joint" else over_seeds(columns[name]) for name in BY_DOMAIN),
                    " / ".join(f"{count:.2f}" for count in counts),
                    f"{runs[-1]['replay_bytes'] / 1e3:.0f}",
                    f"{statistics.fmean(run['flops'] for run in runs) / 1e12:.1f}",
                ],
            )
        )
    return table(head, [row for _, row in sorted(found, key=lambda pair: pair[0])])


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of both streams, and what was tried."""
    parts = []
    for stream, cells in result["streams"].items():
        tasks = cells[REFERENCE][0]["tasks"]
        count = len(cells[REFERENCE])
        parts += [
            f"**{stream}**: {', '.join(tasks)}, {result['preset']['steps']} steps of "
            f"{result['preset']['rows'] * 128:,} bytes each; {plural(count, 'seed')}, bits per byte of test "
            "text, mean ± standard deviation:",
            stream_table(cells),
        ]
        if result["name"] != "continual_quick":  # of which nothing is drawn
            pictures = f"pictures/{result['name']}_{stream}"
            parts += [f"![{told}]({pictures}_{kind}.png)" for kind, told in DRAWN.items()]
    left = [stream for stream in result["preset"]["streams"] if stream not in result["streams"]]
    parts += [f"**{stream}**: not measured yet." for stream in left]
    if result["tried"]:
        rows = [
            [ROWS[one["method"]].label, told(one["settings"]), f"{one['loss']:.3f}", "✓" * one["chosen"]]
            for one in result["tried"]
        ]
        parts += [
            f"Tuned on {', '.join(OTHER)}, {result['preset']['tuning_steps']} steps each "
            "(final average of one run):",
            table(["method", "tried", "final average", "taken"], rows),
        ]
    return "\n\n".join(parts)


def told(settings: Settings) -> str:
    """Settings in a few words."""
    (method,) = settings["methods"]
    knobs = ", ".join(
        f"{name} {value}" for name, value in method.items() if name not in ("type", "text", "on_top")
    )
    return ", ".join(filter(None, [f"rate {settings['optimizer.learning_rate']}", knobs]))


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's rows: the span from naive to joint, and what replay makes of it."""
    found = {}
    for stream, cells in result["streams"].items():
        ends = [over_seeds(columns_of(cells, method)["final"], 2) for method in ("naive", "replay", "joint")]
        what = f"final average loss on {stream} domains, bits per byte: naive, replay, joint"
        found[what] = ", ".join(ends)
    return found


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    name = f"bench-continual-{options.preset}"
    base = base_model(preset, rundir.run_folder(f"{name}-base"))
    shared = {
        "far": experiment(preset, FAR, data, base, plain=False),
        "near": experiment(preset, NEAR, data, base, plain=True),
    }
    other = experiment(replace(preset, steps=preset.tuning_steps), OTHER, data, base, plain=False)
    methods, tried = parts.once("tuning", lambda: chosen(f"{name}-tuning", preset, other))
    streams = {}
    for stream in preset.streams:
        by_seed = []
        for seed in range(preset.seeds):
            part = f"{stream}-{seed}"
            run = functools.partial(sweep, f"{name}-{part}", shared[stream], methods, seed, preset.workers)
            by_seed.append(parts.once(part, lambda run=run: {m: measured(r) for m, r in run().items()}))
        streams[stream] = {method: [cells[method] for cells in by_seed] for method in methods}
        if options.preset != "quick":
            labels = {method: ROWS[method].label for method in methods}
            columns = functools.partial(columns_of, streams[stream])
            draw(PICTURES, f"continual_{options.preset}_{stream}", streams[stream], labels, columns)
        # After each stream, since they take hours; the page says what is not there yet.
        result = {
            "name": f"continual_{options.preset}",
            "preset": asdict(preset),
            "streams": streams,
            "tried": tried,
            "settings": methods,
        }
        print(markdown(result))
        keep(__file__, options, result)


if __name__ == "__main__":
    main()
