"""A checkpoint on the disk, opened without its weights: what it is, and where each tensor lies.

>>> checkpoint = open_checkpoint(Path("llama"))
>>> checkpoint.tensors["model.norm.weight"].shape
(4096,)
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

import cambia.models.causal_lm  # noqa: F401 (registers the native family)
from cambia import files
from cambia.errors import CambiaError, CheckpointError, GrowthError
from cambia.growth.disk.shards import DTYPES, INDEX, WHOLE, StoredTensor, read_shards
from cambia.models.architectures import ARCHITECTURES
from cambia.models.bodies import on_meta

_BESIDE = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "README*",
    "LICENSE*",
    "NOTICE*",
)
"""What goes along as it is. Everything else in a folder belongs to the old weights: other formats of them,
the state of an optimizer."""


@dataclass(frozen=True, eq=False)
class CheckpointOnDisk:
    """A model folder of which only headers were read."""

    folder: Path
    model: PreTrainedModel
    """On the meta device: right shapes, no memory."""
    tensors: Mapping[str, StoredTensor]
    """For each parameter, by its name in the model, where it lies. Of tied ones only the first is here."""
    others: tuple[str, ...]
    """Names of tensors in the files that are no parameters: masks, tables of positions."""
    num_tokens: int | None
    """Rows of the vocabulary that its tokenizer uses; None where it has no tokenizer.json."""

    @property
    def num_bytes(self) -> int:
        """Size of all parameters."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def copy_beside(self, target: Path) -> None:
        """Copy tokenizer, chat template, generation settings and texts into another folder."""
        for path in sorted({path for pattern in _BESIDE for path in self.folder.glob(pattern)}):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def open_checkpoint(folder: Path) -> CheckpointOnDisk:
    """Look at a checkpoint without reading its weights.

    Raises:
        CheckpointError: it is no folder with safetensors, or what it holds does not fit its config.
        GrowthError: models of its kind cannot grow.
    """
    _refuse_what_is_no_model(folder)
    if (folder / files.MANIFEST).exists():
        files.verified(folder)
    config = _config(folder)
    stored = read_shards(folder)
    model = _without_memory(folder, config)
    tensors, others = _matched(folder, model, stored)
    return CheckpointOnDisk(folder, model, tensors, others, _num_tokens(folder))


def _refuse_what_is_no_model(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; expected one with config.json and {WHOLE}")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter: merge it into its model first, "
            "`AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)`"
        )
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder")
    if (folder / WHOLE).exists() or (folder / INDEX).exists():
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickled[0]}): where you trust their source, convert them with "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
        )
    raise CheckpointError(f"{folder} holds neither {WHOLE} nor {INDEX}: there are no weights to grow")


def _config(folder: Path) -> PreTrainedConfig:
    plain = files.read_json(folder / "config.json")
    kind = plain.get("model_type") if isinstance(plain, dict) else None
    if kind not in ARCHITECTURES:
        raise GrowthError(
            f"{folder} holds a model of type {kind!r}, which has no architecture table yet; growable on disk "
            f"are {', '.join(ARCHITECTURES)}"
        )
    if plain.get("quantization_config") is not None:
        method = plain["quantization_config"].get("quant_method", "in some way")
        raise GrowthError(
            f"{folder} is quantized ({method}), and growth works on full weights: grow the checkpoint that "
            "it was made from, then quantize the grown one"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except CambiaError:
        raise
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None


def _without_memory(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return on_meta(model_class, config)
    except CambiaError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not make a model: {' '.join(str(error).split())}"
        ) from None


def _matched(
    folder: Path, model: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Where each parameter of the model lies, and the names of what is none."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    left = set(stored)
    tensors = {}
    for parameter, tied in names.items():
        places = [key for name in tied for key in _spellings(model, name) if key in stored]
        if not places:
            raise CheckpointError(
                f"{folder} holds no {tied[0]!r}, which a {type(model).__name__} of its config.json has: it "
                "is incomplete, or of another class"
            )
        found = stored[places[0]]
        for other in places[1:]:
            _refuse_unequal(folder, found, stored[other], (places[0], other))
        if found.kind not in DTYPES:
            raise GrowthError(f"{places[0]!r} is of type {found.kind}; growable are {', '.join(DTYPES)}")
        if found.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{places[0]!r} has shape {found.shape} in {found.file.name} and {tuple(parameter.shape)} by "
                "config.json: they do not belong together"
            )
        tensors[tied[0]] = found
        left -= set(places)
    return tensors, tuple(sorted(left))


def _spellings(model: PreTrainedModel, name: str) -> Iterator[str]:
    """How files may call a parameter: as the model does, or without the name of the part that is the body.

    (GPT-2's public checkpoints were saved from the body alone: `h.0.ln_1.weight`.)
    """
    yield name
    prefix = f"{model.base_model_prefix}."
    if name.startswith(prefix):
        yield name.removeprefix(prefix)


def _refuse_unequal(folder: Path, one: StoredTensor, other: StoredTensor, names: tuple[str, str]) -> None:
    same = (one.shape, one.kind) == (other.shape, other.kind)
    if not same or any(a != b for a, b in zip(one.pieces(), other.pieces(), strict=True)):
        raise CheckpointError(
            f"{folder} holds {names[0]!r} and {names[1]!r} with different values, and by config.json they "
            "are one tensor: set tie_word_embeddings to false there"
        )


def _num_tokens(folder: Path) -> int | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        words = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is no tokenizer: {' '.join(str(error).split())}") from None
    return max(words.values(), default=-1) + 1
