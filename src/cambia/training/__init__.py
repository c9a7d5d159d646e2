"""Training: the one loop, and what it needs."""

from __future__ import annotations

from typing import Any

from cambia.training.allocation import PlainAllocator
from cambia.training.averaging import WeightAverage
from cambia.training.settings import CheckpointConfig, EvaluationConfig, TrainingConfig
from cambia.training.trainer import Trainer

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "ExpertsCallback",
    "PlainAllocator",
    "Trainer",
    "TrainingConfig",
    "WeightAverage",
]


def __getattr__(name: str) -> Any:
    # Only who trains with transformers.Trainer has accelerate, which the callback needs.
    if name != "ExpertsCallback":
        raise AttributeError(f"module 'cambia.training' has no attribute {name!r}")
    from cambia.training.callback import ExpertsCallback

    return ExpertsCallback
