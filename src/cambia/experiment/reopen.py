"""A run opened again to be looked at: model and method as a checkpoint has them, without the text.

    >>> opened = reopen(folder / "latest", RunReader(folder).config())
    >>> with opened.method.answering(0):
    ...     logits = opened.model(input_ids).logits

Nothing is written and no text is read, which may be gone, or slow to prepare. Nothing can be trained from
here: the optimizer remembers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from cambia import files
from cambia.continual.methods import Method, Situation
from cambia.data.streams import Stage
from cambia.errors import CambiaError, CheckpointError, RunError
from cambia.experiment.tree import experiment_from
from cambia.models.saved import load_model
from cambia.training.checkpoint import load_state
from cambia.training.settings import Progress

_TRIES = 5


@dataclass(frozen=True)
class StagesOnly:
    """What a method is told of the stream where there is no text: its tasks and stages.

    Of a mixture it is known which tasks it has, and not at which shares.
    """

    names: Sequence[str]
    """Of the tasks."""
    stages: Sequence[Stage]
    boundaries: bool
    batch_size: int
    sequence_length: int


@dataclass(frozen=True, eq=False)
class Reopened:
    """What a checkpoint holds."""

    model: PreTrainedModel
    method: Method
    stream: StagesOnly
    progress: Progress


def reopen(checkpoint: Path, tree: Mapping[str, Any], *, device: torch.device | None = None) -> Reopened:
    """Open a checkpoint of a run, which may be going on and replace it just now.

    Args:
        checkpoint: its folder.
        tree: the run's configuration, as config.json holds it.
        device: where the model shall be; the CPU by default.

    Raises:
        CheckpointError: it is missing, was altered, or is of another configuration.
        ConfigError: the configuration is none that can be built.
        RunError: it was trained on a data loader, which has no stages; or it is replaced all the time.
    """
    for _ in range(_TRIES):
        before = _manifest(checkpoint)
        try:
            found = _reopen(checkpoint, tree, device or torch.device("cpu"))
        except CheckpointError:
            if _manifest(checkpoint) == before:
                raise
            continue
        if _manifest(checkpoint) == before:  # else its files may be of two checkpoints
            return found
    raise RunError(f"{checkpoint} is replaced faster than it can be read: wait until the run is over")


def _manifest(checkpoint: Path) -> bytes | None:
    try:
        return (checkpoint / files.MANIFEST).read_bytes()
    except OSError:
        return None


def _reopen(checkpoint: Path, tree: Mapping[str, Any], device: torch.device) -> Reopened:
    experiment = experiment_from(tree, source=str(checkpoint.parent), flags={})  # anew: methods remember
    training, boundaries = experiment.training, experiment.data.stream.boundaries
    try:
        state = load_state(checkpoint)
        model = load_model(checkpoint).to(device)
        names, stages = _layout(checkpoint, state["stream"])
        stream: Any = StagesOnly(names, stages, boundaries, training.batch_size, training.sequence_length)
        method = experiment.method
        trained = method.prepare(model)
        optimizer = experiment.optimizer.build(trained)
        told = Situation(
            model, optimizer, stream, experiment.seed, trained=trained, weights=method.saved_weights
        )
        method.attach(told)
        method.restore(state["method"])
        method.load_state_dict(state["method"])
        allocator = method.allocator()
        if allocator is not None:
            allocator.load_state_dict(state["allocator"])
        return Reopened(model, method, stream, Progress(**state["progress"]))
    except CambiaError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit the configuration of its run ({type(error).__name__}: {error}): one "
            "of the two was altered"
        ) from error


def _layout(checkpoint: Path, state: Mapping[str, Any]) -> tuple[list[str], list[Stage]]:
    """Tasks and stages of a stream by their names: a stage is called after the tasks that it begins with."""
    if "stages" not in state:
        raise RunError(f"{checkpoint.parent} was trained on a data loader, which is one task without stages")
    names, stages = list(state["tasks"]), []
    for name in state["stages"]:
        having = name.split("+")  # no task's name has one
        unknown = [task for task in having if task not in names]
        if unknown:
            raise CheckpointError(f"{checkpoint} has a stage {name!r}, and no task {unknown[0]!r}")
        stages.append(Stage.of(names, [(task in having) / len(having) for task in names]))
    return names, stages
