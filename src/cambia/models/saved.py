"""Opening a model folder: one of Hugging Face's layout, a checkpoint of a run or somebody else's.

Only safetensors and JSON are read: opening runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cambia import files
from cambia.errors import CheckpointError
from cambia.models.causal_lm import align_memory  # its module registers the native model as well

STATE_JSON, AVERAGED = "state.json", "averaged"
"""What stands beside the model in a checkpoint of a run: the run's state, and the same model with averaged
weights."""


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint or of any Hugging Face model folder.

    Raises:
        CheckpointError: there is no model there that can be opened safely.
    """
    folder = Path(folder)
    checkpoint = folder.parent if folder.name == AVERAGED else folder
    if (checkpoint / files.MANIFEST).exists() or (checkpoint / STATE_JSON).exists():
        files.verified(checkpoint)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no .safetensors file: convert it with transformers, "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`, where you trust its source"
        )
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be opened as a model: {' '.join(str(error).split())}"
        ) from error
    model, told = loaded
    if told["missing_keys"]:  # transformers makes them up
        raise CheckpointError(
            f"{folder} lacks {sorted(told['missing_keys'])[0]!r}, a tensor of a {type(model).__name__}: "
            "take the checkpoint of a whole causal language model"
        )
    align_memory(model)
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: there is none that the tokenizers library backs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer: {' '.join(str(error).split())}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{folder} has a {type(tokenizer).__name__}; expected one with a tokenizer.json"
        )
    return tokenizer
