"""LoRA experts on the disk: a stock adapter of PEFT for each, and what they are together.

    experts.json            of which model they are, their order, states, parents and hashes
    router.safetensors      what the router knows of their domains, where it knows any
    adapters/NAME/          see `cambia.models.parts.peft_format`
    base/                   the model itself, where it was asked for
    manifest.json           the SHA-256 of every file

A folder is written under another name and renamed, so it is whole or not there. Reading checks every hash:
of the files, of the model that the experts are to stand beside, and of each expert's tensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cambia import files
from cambia.errors import CheckpointError, ConfigError
from cambia.models.hashing import fingerprint
from cambia.models.nested_state import put_in_tensors, take_out_tensors
from cambia.models.parts.lora_shape import LoraShape
from cambia.models.parts.peft_format import read_adapter, said_of_base, write_adapter
from cambia.models.routing.router import Router

if TYPE_CHECKING:
    from cambia.models.parts.lora_experts import LoraExperts

EXPERTS, ROUTER, ADAPTERS, BASE = "experts.json", "router.safetensors", "adapters", "base"


def write_experts(
    folder: str | Path,
    experts: LoraExperts,
    *,
    with_base: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write all experts; a folder that is there is replaced once the new one is whole."""
    model = experts.model
    about: dict[str, Any] = {
        "base": {**said_of_base(model), "name_or_path": model.config.name_or_path or None},
        "shape": asdict(experts.shape),
        "seed": experts.seed,
        "routing": experts.routing,
        "prefix_tokens": experts.prefix_tokens,
        "feature_layer": experts.feature_layer,
        "experts": [
            {
                "name": name,
                "state": experts[name].state,
                "parents": list(experts[name].parents),
                "parameters": experts[name].num_parameters,
                "sha256": experts[name].sha256,
            }
            for name in experts.names
        ],
    }
    with files.atomic_folder(folder) as temporary:
        for name in experts.names:
            write_adapter(temporary / ADAPTERS / name, experts[name], model)
        if with_base:
            model.save_pretrained(temporary / BASE)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary / BASE)
        if experts.router.domains:
            about["router"] = _write_router(temporary / ROUTER, experts.router)
        files.write_json(temporary / EXPERTS, about)
    return Path(folder)


def _write_router(path: Path, router: Router) -> dict[str, str]:
    tensors: dict[str, Tensor] = {}
    plain = take_out_tensors(router.state_dict(), tensors)
    save_file(tensors, path, metadata={"state": json.dumps(plain, sort_keys=True)})
    return {"sha256": files.sha256_file(path)}


def _read_router(path: Path, router: Router, sha256: str) -> None:
    if not path.is_file() or files.sha256_file(path) != sha256:
        raise CheckpointError(
            f"{path} is not the router that was written with these LoRA experts (its SHA-256 differs): use "
            "another copy"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        plain = json.loads(file.metadata()["state"])
    router.load_state_dict(put_in_tensors(plain, tensors))


def base_folder(folder: str | Path) -> Path:
    """Where the model of a folder of experts is: in it, or around it, as in a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    inside, around = Path(folder) / BASE, Path(folder).resolve().parent
    for place in (inside, around):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return place
    raise CheckpointError(
        f"{folder} holds LoRA experts without their model: give it, from_pretrained(folder, model), or "
        "save with with_base=True"
    )


def read_base(folder: str | Path) -> PreTrainedModel:
    """The model of a folder of experts.

    Raises:
        CheckpointError: there is none.
    """
    model = AutoModelForCausalLM.from_pretrained(base_folder(folder))
    assert isinstance(model, PreTrainedModel)
    return model


def read_experts(folder: str | Path, experts: LoraExperts, about: dict[str, Any]) -> None:
    """Add every expert of a folder to experts that have none yet.

    Args:
        about: what `opened` has returned.

    Raises:
        CheckpointError: something is not what was written, or the model is another one.
    """
    ours = fingerprint(experts.model)
    if ours != about["base"]["sha256"]:
        raise CheckpointError(
            f"{folder} holds LoRA experts of another {about['base']['class']} (its weights hash to "
            f"{about['base']['sha256'][:12]}, those of the model given to {ours[:12]}): give the model that "
            f"they were trained beside{_where(about)}"
        )
    for line in about["experts"]:
        name = line["name"]
        part = read_adapter(Path(folder) / ADAPTERS / name, name, experts.model)
        if part.sha256 != line["sha256"]:
            raise CheckpointError(
                f"the tensors of LoRA expert {name!r} in {folder} are not those that were written (their "
                "SHA-256 differs): it was altered, use another copy"
            )
        part.parents = tuple(line["parents"])
        part.state = line["state"]
        part.requires_grad_(part.state != "sealed")
        experts.hang(part)
    # Folders of before have none of these.
    experts.routing = about.get("routing", experts.routing)
    experts.prefix_tokens = about.get("prefix_tokens", experts.prefix_tokens)
    experts.feature_layer = about.get("feature_layer", experts.feature_layer)
    if "router" in about:
        _read_router(Path(folder) / ROUTER, experts.router, about["router"]["sha256"])


def opened(folder: str | Path) -> dict[str, Any]:
    """What stands in experts.json of a folder whose files are all as they were written.

    Raises:
        CheckpointError: they are not, or the folder holds something else.
    """
    path = Path(folder)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is one adapter of PEFT: LoraExperts(model).from_peft({str(folder)!r}) takes it in"
        )
    files.verified(path)
    return files.read_json(path / EXPERTS)


def shape_of(about: dict[str, Any]) -> LoraShape:
    """What experts of a folder are made of."""
    fields: dict[str, Any] = {**about["shape"], "targets": tuple(about["shape"]["targets"])}
    try:
        return LoraShape(**fields)
    except TypeError as error:
        raise ConfigError(f"experts.json has a shape that this Cambia does not know: {error}") from None


def _where(about: dict[str, Any]) -> str:
    name = about["base"]["name_or_path"]
    return f", {name}" if name else ""
