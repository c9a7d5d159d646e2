"""What a checkpoint holds: a model folder that stock tools open, and beside it the state of the run.

    latest/
      config.json model.safetensors tokenizer.json ...    Hugging Face's own layout
      state.json state.safetensors                        everything else: optimizer, random state,
                                                          position in the data, triggers, log lengths
      averaged/                                           the same model with averaged weights, where the
                                                          run keeps an average: a model folder as well
      manifest.json                                       SHA-256 of each of these

Only safetensors and JSON: opening a checkpoint runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cambia import files
from cambia.models.nested_state import put_in_tensors, take_out_tensors
from cambia.models.saved import AVERAGED, STATE_JSON
from cambia.training.averaging import WeightAverage

STATE_TENSORS = "state.safetensors"


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    state: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    average: WeightAverage | None = None,
    weights: Mapping[str, Tensor] | None = None,
    beside: Sequence[Callable[[Path], None]] = (),
) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: replaced if it is there.
        state: nested dictionaries and lists of tensors and plain values.
        average: of the model's weights; the averaged model is written into a folder of its own.
        weights: what is written in place of the model's own weights.
        beside: they write what stands beside the model into the checkpoint's folder.
    """
    tensors: dict[str, Tensor] = {}
    plain = take_out_tensors(state, tensors)
    transformers_logging.disable_progress_bar()
    with files.atomic_folder(folder) as temporary:
        _save_model(model, tokenizer, temporary, weights)
        if average is not None:
            with average.applied():
                _save_model(model, tokenizer, temporary / AVERAGED)
        for write in beside:
            write(temporary)
        save_file(tensors, temporary / STATE_TENSORS)
        files.write_json(temporary / STATE_JSON, plain)


def _save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after its files were checked against their hashes.

    Raises:
        CheckpointError: missing, cut short, altered, or of another version.
    """
    files.verified(folder)
    tensors = load_file(folder / STATE_TENSORS)
    return put_in_tensors(files.read_json(folder / STATE_JSON), tensors)


def random_state() -> dict[str, Any]:
    """The global random state of torch, of all devices in use."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Give `random_state` back to torch."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
