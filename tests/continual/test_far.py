"""On real, far domains: joint training ends better than replay, and replay better than naive fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cambia.experiment.build import train_in
from cambia.experiment.tree import experiment_from
from cambia.rundir import RunReader

FILES = {
    "wikitext": "wikitext-2/wiki.{}.tokens.gz",
    "spanish": "domains/novel-es/{}.txt.gz",
    "sql": "domains/sql/{}.txt.gz",
    "german-law": "domains/law-de/{}.txt.gz",
}


def final_mean(method: dict[str, Any], folder: Path, data: Path) -> float:
    tasks = []
    for name, pattern in FILES.items():
        paths = [str(data / pattern.format(split)) for split in ("train", "valid", "test")]
        source = dict(zip(("path", "valid_path", "test_path"), paths, strict=True))
        tasks.append({"name": name, "source": {"type": "files", "limit_bytes": 400_000, **source}})
    tree = {
        "data": {"tasks": tasks},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "zero_init_residual": True,
        },
        "training": {"steps": 60, "batch_size": 8, "sequence_length": 128},
        "optimizer": {"type": "adamw", "learning_rate": 0.005},
        "methods": [method],
        "evaluation": {"every_steps": None, "max_bytes": 16_384},
        "checkpoint": {"every_steps": None, "keep_tasks": False},
    }
    train_in(folder, experiment_from(tree, source="test", flags={}))
    return (RunReader(folder).summary() or {})["results"]["test_bits_per_byte"]


@pytest.mark.slow
@pytest.mark.skipif("CAMBIA_DATA" not in os.environ, reason="CAMBIA_DATA does not name the corpora")
def test_joint_replay_naive(tmp_path):
    data = Path(os.environ["CAMBIA_DATA"])
    methods = {
        "joint": {"type": "joint"},
        "replay": {"type": "replay", "fraction": 0.25},
        "naive": {"type": "naive"},
    }
    ends = {name: final_mean(method, tmp_path / name, data) for name, method in methods.items()}
    assert ends["joint"] < ends["replay"] < ends["naive"] - 0.3
