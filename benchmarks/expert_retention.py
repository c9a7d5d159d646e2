"""What a model that somebody else trained still says of its own text, after experts have learned other text.

    cambia bench expert_retention --preset headline [--parts FOLDER]

stories260K, a Llama of 260,032 parameters that has read children's stories alone, learns Shakespeare, SQL and
a Spanish novel one after another as `cambia learn` does it: nobody says where one ends, or whose a text is.
Then it is asked for stories, routed freely: the first ones of TinyStories, and what it wrote itself before it
learned anything. Where a window is left to the model alone, its logits must be those of before, to the last
bit; beside that, how many windows are, and what the others cost.

The data is that of CAMBIA_DATA. A stopped benchmark goes on where it was; what was measured on each run is
kept in the folder of --parts too.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from forgetting.runs import sweep_seeds
from forgetting.stories import piece_bytes, stories_folder
from forgetting.streams import PREFIX
from harness import in_parts, keep, over_seeds, seeds_told, table
from peers.llama import BEGIN, Pieces
from routes.deciders import Learned
from torch import Tensor, nn

import cambia
from cambia import rundir
from cambia.experiment.learn import learning
from cambia.experiment.tree import plain_tree
from cambia.generation import written_rows
from cambia.rundir import RunReader

TEXTS = {
    "shakespeare": "tiny-shakespeare/input.txt.gz",
    "sql": "domains/sql/train.txt.gz",
    "spanish": "domains/novel-es/train.txt.gz",
}
STORIES = {"read": "TinyStories", "written": "its own writing"}
WINDOW = 128
"""Tokens; decided from the first 64, scored behind them."""
_ROWS = 32


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    steps: int = 150
    """Steps of 16 rows of 128 tokens on each text."""
    seeds: int = 3
    windows: int = 320
    """Of each kind of stories."""
    scored_bytes: int = 32_768
    workers: int | None = None


PRESETS = {
    "quick": Preset(steps=15, seeds=1, windows=32, scored_bytes=2048),
    "headline": Preset(),
    "full": Preset(steps=300, seeds=9),
}


def settings(preset: Preset, data: Path, base: Path) -> dict[str, Any]:
    """What `cambia learn` would run."""
    flags = {"evaluation.max_bytes": preset.scored_bytes, "checkpoint.keep_tasks": False}
    texts = [data / path for path in TEXTS.values()]
    tree = plain_tree(learning(base, texts, steps=preset.steps, flags=flags))
    for task, name in zip(tree["data"]["tasks"], TEXTS, strict=True):
        task["name"] = name
    tree["data"]["stream"]["order"] = list(TEXTS)
    return tree


# ---- stories -------------------------------------------------------------------------------------


def stories_of(data: Path, base: Path, pieces: Pieces, preset: Preset) -> dict[str, Tensor]:
    """Windows (N, T) of both kinds, each from the beginning of a story or from anywhere in one."""
    text = gzip.decompress((data / "tinystories_sample.txt.gz").read_bytes()).decode()
    tokens = torch.tensor(pieces(text))
    read = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        own = written_rows(cambia.load(base), preset.windows, WINDOW + 1, first=BEGIN, generator=generator)
    return {"read": read[: preset.windows], "written": own[:, 1:]}


def logits_of(model: nn.Module, windows: Tensor) -> Tensor:
    """(N, T, V), a batch at a time; the batches are the same for everybody."""
    with torch.no_grad():
        return torch.cat([model(input_ids=rows).logits for rows in windows.split(_ROWS)])


def kept(learned: Learned, before: Tensor, windows: Tensor, sizes: Tensor) -> dict[str, Any]:
    """One kind of stories, before and after.

    Args:
        before: (N, T, V) of the model without experts.
        sizes: (V,) bytes of each token.
    """
    experts = learned.experts
    experts.model.eval()
    after = logits_of(experts, windows)
    routes = [name for rows in windows.split(_ROWS) for name in experts.route(rows)]
    alone = [i for i, name in enumerate(routes) if name is None]
    same = sum(torch.equal(before[i], after[i]) for i in alone)
    taken = Counter(name for name in routes if name is not None)
    learner = {learned.right[domain]: domain for domain in learned.right}
    return {
        "windows": len(windows),
        "to_base": len(alone),
        "same": same,
        "taken_by": {learner.get(name, name): count for name, count in sorted(taken.items())},
        "before": bits_per_byte(before, windows, sizes),
        "after": bits_per_byte(after, windows, sizes),
    }


def bits_per_byte(logits: Tensor, windows: Tensor, sizes: Tensor) -> float:
    """Of what follows the first P tokens."""
    targets = windows[:, PREFIX:]
    said = logits[:, PREFIX - 1 : -1].double().flatten(0, 1)
    nats = nn.functional.cross_entropy(said, targets.flatten(), reduction="sum")
    return float(nats) / math.log(2) / int(sizes[targets].sum())


def cell(run: RunReader, base: Path, data: Path, preset: Preset) -> dict[str, Any]:
    """One seed: what was learned, and what became of the stories."""
    summary = run.summary() or {}
    pieces = Pieces(data / "tok512.bin")
    sizes, alone, learned = piece_bytes(pieces), cambia.load(base).eval(), Learned.by(run)
    found = {}
    for kind, windows in stories_of(data, base, pieces, preset).items():
        found[kind] = kept(learned, logits_of(alone, windows), windows, sizes)
    return {
        "stories": found,
        "texts": {text["name"]: text for text in summary["texts"]},
        "experts": len(summary["experts"]),
        "wall_seconds": summary["wall_seconds"],
    }


# ---- tables --------------------------------------------------------------------------------------


def column(cells: Sequence[Mapping[str, Any]], *path: str) -> list[float]:
    """A number of each seed."""
    found: list[Any] = list(cells)
    for key in path:
        found = [one[key] for one in found]
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """What was kept, and what was learned."""
    cells, preset = result["cells"], result["preset"]
    lines = []
    for kind, label in STORIES.items():
        counts = [one["stories"][kind] for one in cells]
        told = [
            f"{one['to_base']} of {one['windows']}, {'all' if one['same'] == one['to_base'] else one['same']}"
            for one in counts
        ]
        lines.append(
            [
                label,
                over_seeds(column(cells, "stories", kind, "before")),
                over_seeds(column(cells, "stories", kind, "after")),
                over_seeds([one["to_base"] / one["windows"] for one in counts]),
                "; ".join(told),
            ]
        )
    learned = [
        [name, *(over_seeds(column(cells, "texts", name, key)) for key in ("base", "own", "told", "right"))]
        for name in TEXTS
    ]
    experts = ", ".join(str(count) for count in column(cells, "experts"))
    return "\n\n".join(
        [
            f"stories260K after {', '.join(TEXTS)}, {preset['steps']} steps of 2,048 tokens each, free "
            f"routing; {seeds_told(len(cells))}. Bits per byte of the last "
            f"{WINDOW - PREFIX} tokens of windows of {WINDOW}:",
            table(
                ["stories", "before", "after", "left to the model", "of which with the same bits, by seed"],
                lines,
            ),
            f"What it learned ({experts} experts), bits per byte of test text:",
            table(["text", "before", "after", "with right routes", "passages routed right"], learned),
        ]
    )


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's row."""
    cells = result["cells"]
    counts = [one["stories"]["read"] for one in cells]
    alone, same, windows = (sum(one[key] for one in counts) for key in ("to_base", "same", "windows"))
    before, after = (over_seeds(column(cells, "stories", "read", key), 3) for key in ("before", "after"))
    what = (
        "stories260K after three other texts, windows of stories: left to the model, these with the same bits"
    )
    return {
        what: f"{alone / windows:.3f}, {same / max(1, alone):.3f}",
        "the same, bits per byte of stories before, after": f"{before}, {after}",
    }


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    name = f"bench-expert_retention-{options.preset}"
    rundir.runs_root().mkdir(parents=True, exist_ok=True)
    base = stories_folder(data / "stories260K", rundir.runs_root() / f"{name}-stories260K")
    seeds = list(range(preset.seeds))

    def runs() -> list[RunReader]:
        shared = settings(preset, data, base)
        found = sweep_seeds(
            name, shared, {"experts": {}}, {"experts": seeds}, preset.workers, keep_checkpoints=True
        )
        return found["experts"]

    cells = [
        parts.once(f"seed-{seed}", lambda i=seed: cell(runs()[i], base, data / "stories260K", preset))
        for seed in seeds
    ]
    result = {"name": f"expert_retention_{options.preset}", "preset": asdict(preset), "cells": cells}
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
