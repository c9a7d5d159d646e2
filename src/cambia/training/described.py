"""What stands in the run directory of a run that was put together in Python."""

from __future__ import annotations

from typing import Any

from cambia.config import dump
from cambia.growth import GrowthManager
from cambia.training.settings import CheckpointConfig, EvaluationConfig, Progress, TrainingConfig


def summary(progress: Progress, parameters: int, *, finished: bool) -> dict[str, Any]:
    """summary.json."""
    return {
        "status": "finished" if finished else "interrupted",
        "parameters_end": parameters,
        "steps": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "flops_grown": progress.flops_grown,
        "flops_scored": progress.flops_scored,
        "skipped_steps": progress.skipped,
    }


def described(
    config: TrainingConfig,
    evaluation: EvaluationConfig,
    checkpoint: CheckpointConfig,
    growth: GrowthManager | None,
) -> dict[str, Any]:
    """config.json: the settings; they cannot be run again."""
    return {
        "description": "made in Python from a live model and data; not runnable from this file",
        "training": dump(config),
        "evaluation": dump(evaluation),
        "checkpoint": dump(checkpoint),
        "growth": {"rules": [dump(rule) for rule in growth.rules] if growth is not None else []},
    }
