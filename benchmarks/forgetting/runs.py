"""What benchmarks of continual learning train: domains, a base that has read something, sweeps of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cambia import rundir
from cambia.experiment.build import train_in
from cambia.experiment.tree import experiment_from
from cambia.rundir import RunReader
from cambia.sweepdir import SweepReader
from cambia.sweeps import run_grid
from forgetting.rows import Settings

FILES = {
    "wikitext": ("wikitext-2/wiki.{}.tokens.gz", "train", "valid", "test"),
    "spanish": ("domains/novel-es/{}.txt.gz", "train", "valid", "test"),
    "sql": ("domains/sql/{}.txt.gz", "train", "valid", "test"),
    "german-law": ("domains/law-de/{}.txt.gz", "train", "valid", "test"),
    "novel": ("domains/novel-en/{}.txt.gz", "train", "valid", "test"),
    "speeches": ("domains/speech-en/{}.txt.gz", "train", "valid", "test"),
    "biomedicine": ("domains/biomed-en/{}.txt.gz", "train", "valid", "test"),
}
FAR = ("wikitext", "spanish", "sql", "german-law")
NEAR = ("novel", "speeches", "wikitext")
NATIVE = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "zero_init_residual": True,
    "initializer_range": 0.06,
}
"""A model of a million parameters."""


def source(domain: str, data: Path, *, plain: bool) -> dict[str, Any]:
    """Where a domain's text is."""
    if domain == "plays":
        return {"type": "files", "path": str(data / "tiny-shakespeare/input.txt.gz")}
    if domain == "arithmetic":
        path = data / "domains/math-en/gsm8k_train.jsonl.gz"
        return {"type": "files", "path": str(path), "field": "answer"}
    pattern, *splits = FILES[domain]
    train, valid, test = (str(data / pattern.format(split)) for split in splits)
    return {"type": "files", "path": train, "valid_path": valid, "test_path": test, "plain": plain}


def pretrained(
    folder: Path, text: Mapping[str, Any], model: Mapping[str, Any], *, steps: int, rows: int
) -> Path:
    """The folder of a model that was trained on a text, 128 bytes a row; made once."""
    tree = {
        "data": {"tasks": [{"name": "general", "source": dict(text)}]},
        "model": dict(model),
        "optimizer": {"type": "adamw", "learning_rate": 0.003},
        "training": {"steps": steps, "batch_size": rows, "sequence_length": 128},
        "methods": [],
        "evaluation": {"every_steps": 200, "max_bytes": 32_768},
    }
    train_in(folder, experiment_from(tree, source="base", flags={}))
    return folder / rundir.LATEST


def sweep(
    name: str, shared: Mapping[str, Any], methods: Mapping[str, Settings], seed: int, workers: int | None
) -> dict[str, RunReader]:
    """One run for each method; returns them by method."""
    runs = sweep_seeds(name, shared, methods, {method: [seed] for method in methods}, workers)
    return {method: found for method, (found,) in runs.items()}


def sweep_seeds(
    name: str,
    shared: Mapping[str, Any],
    methods: Mapping[str, Settings],
    seeds: Mapping[str, Sequence[int]],
    workers: int | None,
    *,
    keep_checkpoints: bool = False,
) -> dict[str, list[RunReader]]:
    """One run for each method and each of its seeds; returns them by method, in the order of the seeds."""
    every = sorted({seed for some in seeds.values() for seed in some})
    left_out = {method: [seed for seed in every if seed not in seeds[method]] for method in methods}
    grid = {
        "base": dict(shared),
        "axes": {"method": dict(methods)},
        "seeds": every,
        "exclude": [{"method": method, "seed": some} for method, some in left_out.items() if some],
        "keep_checkpoints": keep_checkpoints,
        "attempts": 10,
    }
    folder = run_grid(grid, name=name, workers=workers)
    reader = SweepReader(folder)
    results = reader.results()
    failed = [result for result in results.values() if result.status != "finished"]
    if failed:
        raise SystemExit(f"{failed[0].cell} failed: {failed[0].error}; `cambia report {name}` shows more")
    runs = {
        (str(cell.choice["method"]), cell.choice["seed"]): RunReader(reader.folder / cell.name)
        for cell in reader.cells()
    }
    return {method: [runs[method, seed] for seed in seeds[method]] for method in methods}
