"""Tiny runs of continual-learning methods, for tests of what they promised; and ways to spoil one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cambia import files
from cambia.experiment.tree import Experiment, experiment_from

FORMS: dict[str, dict[str, Any]] = {
    "full_per_task": {"type": "full_per_task"},
    "lora_per_task": {"type": "lora_per_task", "rank": 2},
    "masks": {"type": "masks", "share": 0.4},
    "freeze": {"type": "freeze"},
    "naive": {"type": "naive"},
}
ORDER = ("counting", "copy", "counting")


def experiment_of(*methods: dict[str, Any], cache: Path, **more: Any) -> Experiment:
    """Two tasks, the first of which comes again, at three steps each."""
    tasks = [
        {"name": name, "source": {"type": "generated", "task": name, "size_bytes": 20_000}}
        for name in dict.fromkeys(ORDER)
    ]
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tree = {
        "data": {
            "tasks": tasks,
            "stream": {"type": "sequence", "order": list(ORDER)},
            "cache_dir": str(cache),
        },
        "model": sizes,
        "training": {"steps": 3, "batch_size": 4, "sequence_length": 24},
        "optimizer": {"type": "adamw", "learning_rate": 0.02},
        "methods": list(methods),
        "evaluation": {"every_steps": None, "max_bytes": 400, "batch_size": 4},
        "checkpoint": {"every_steps": 2},
        "threads": 1,
        **more,
    }
    return experiment_from(tree, source="test", flags={})


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint's file, and its manifest so that nobody notices."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    renew(file.parent)


def renew(checkpoint: Path) -> None:
    """Give a checkpoint a manifest of the files that it has now."""
    manifest = files.read_json(checkpoint / files.MANIFEST)
    hashes = {name: files.sha256_file(checkpoint / name) for name in manifest["sha256"]}
    files.write_json(checkpoint / files.MANIFEST, {**manifest, "sha256": hashes})
