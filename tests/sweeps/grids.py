"""A grid of tiny runs that the tests of sweeps share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

BASE = {
    "data": {"tasks": [{"name": "counting", "source": {"type": "generated", "limit_bytes": 40_000}}]},
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"steps": 3, "batch_size": 2, "sequence_length": 16},
    "evaluation": {"every_steps": 2, "max_bytes": 500},
    "device": "cpu",
}
METHODS = {
    "fixed": {"growth.enabled": False},
    "grown": {
        "growth.rules": [
            {"when": {"type": "schedule", "at_steps": [2]}, "then": {"type": "widen_ffn", "add": 8}}
        ]
    },
}


def grid(**more: Any) -> dict[str, Any]:
    """Two methods, one seed, and what else is said."""
    return {"base": BASE, "axes": {"method": METHODS}, **more}


def written(folder: Path, tree: Mapping[str, Any], name: str = "tiny.yaml") -> Path:
    """A grid's file in a folder."""
    path = folder / name
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text, once for all cells."""
    return tmp_path_factory.mktemp("cache")
