"""A run that goes on with the experts of an earlier one, and with what is known of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cambia.continual.methods.experts import EXPERTS_FOLDER, Experts
from cambia.errors import CheckpointError, ConfigError, DataError
from cambia.experiment.starts import PretrainedModel, StartModel
from cambia.models.hashing import fingerprint
from cambia.models.parts.folder import opened
from cambia.models.saved import STATE_JSON
from cambia.training import Trainer
from cambia.training.checkpoint import load_state


def go_on(trainer: Trainer, start: StartModel, sequence_length: int) -> bool:
    """Take the experts of the checkpoint that a new run starts from into it.

    Args:
        trainer: that has its stream, and has not begun.
        sequence_length: tokens of a row.

    Returns:
        Whether there were any.

    Raises:
        CheckpointError: the checkpoint was altered, or its experts stand beside another model.
        ConfigError: they do not fit the settings.
    """
    method = trainer.method
    if not isinstance(start, PretrainedModel) or not start.keep_experts or not isinstance(method, Experts):
        return False
    checkpoint = start.folder()
    if not (checkpoint / EXPERTS_FOLDER).is_dir() or not (checkpoint / STATE_JSON).is_file():
        return False
    state = load_state(checkpoint)
    _same_base(trainer, checkpoint)
    _same_rows(state["method"], sequence_length, checkpoint)
    try:
        method.restore(state["method"])
        trainer.allocator.load_state_dict(state["allocator"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the experts in {checkpoint} do not fit the settings of the method ({error}): leave "
            "--methods as they were, or begin with the model alone, --model.keep_experts false"
        ) from None
    return True


def refuse_few(trainer: Trainer, rows: int) -> None:
    """Refuse a stream that is over before an expert can be born.

    Raises:
        DataError: with what repairs it.
    """
    method = trainer.method
    if isinstance(method, Experts) and rows < method.detector.min_windows:
        raise DataError(
            f"there are {rows} windows to learn from, and an expert is born after "
            f"{method.detector.min_windows} strange ones: give more text, a smaller "
            "--training.sequence_length, or read it several times, --training.epochs"
        )


def _same_base(trainer: Trainer, checkpoint: Path) -> None:
    base = opened(checkpoint / EXPERTS_FOLDER)["base"]
    if fingerprint(trainer.model) != base["sha256"]:
        raise CheckpointError(
            f"the experts in {checkpoint} stand beside another {base['class']}, whose weights or whose dtype "
            f"differ from those of this one ({trainer.model.dtype}): leave out --model.dtype, or begin with "
            "the model alone, --model.keep_experts false"
        )


def _same_rows(state: Mapping[str, Any], sequence_length: int, checkpoint: Path) -> None:
    known = state["row_tokens"]
    if state["experts"] and known != sequence_length:
        raise ConfigError(
            f"in {checkpoint} strangeness was measured on rows of {known} tokens, and "
            f"--training.sequence_length is {sequence_length}: leave it as it was"
        )
