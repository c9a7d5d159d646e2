"""Training: the one loop, and what it needs."""

from __future__ import annotations

from cambia.training.allocation import PlainAllocator
from cambia.training.averaging import WeightAverage
from cambia.training.settings import CheckpointConfig, EvaluationConfig, TrainingConfig
from cambia.training.trainer import Trainer

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "PlainAllocator",
    "Trainer",
    "TrainingConfig",
    "WeightAverage",
]
