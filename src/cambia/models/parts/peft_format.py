"""LoRA experts as stock adapter folders of PEFT, and back.

Whatever an expert adds has an exact form there. A low-rank delta is one of PEFT's own. A whole matrix D is
the low-rank product ``D I`` with the unit matrix. A norm's gain is a copy of the norm (`modules_to_save`);
there the product is rounded, so the gains themselves stand beside it in a file that PEFT does not read.

    adapter_config.json          ranks, alphas, which modules
    adapter_model.safetensors    lora_A and lora_B, and the norms
    gains.safetensors            what each norm is multiplied with, less one, and its shift
"""

# O a layer's outputs, I its inputs, V entries of a table, C its width, R rank

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cambia import files
from cambia.errors import CheckpointError, ConfigError
from cambia.models.hashing import fingerprint
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.parts.lora_shape import places_of, scale_of, sides
from cambia.models.parts.merging import louder, matrix_of
from cambia.nn.deltas import Delta, Gain, Lookup, LowRank, Matrix, Whole
from cambia.nn.lora import LINEAR, weight_of

CONFIG, WEIGHTS, GAINS = "adapter_config.json", "adapter_model.safetensors", "gains.safetensors"
BASE = "base.json"
"""Beside an adapter: the model that it was made for."""
_PREFIX = "base_model.model."
_CHANGES_ITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of PEFT to begin that take something out of the base's weights, or put something into them."""


# ---- writing -------------------------------------------------------------------------------------


def write_adapter(folder: Path, part: LoraExpert, model: PreTrainedModel) -> None:
    """Write an expert as an adapter of PEFT.

    Args:
        folder: is made.
        model: beside which it stands.

    Raises:
        ConfigError: a norm of a kind whose gain cannot be put into its weight.
    """
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    gains: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path, delta in part.by_module.items():
        module = model.get_submodule(path)
        if isinstance(delta, Gain):
            gains |= {f"{path}.{name}": p for name, p in delta.named_parameters()}
            tensors |= {f"{path}.{name}": tensor for name, tensor in louder(module, delta, path).items()}
            continue
        read, write, scales[path] = _thin(matrix_of(delta))
        ranks[path] = len(read)
        if isinstance(module, nn.Embedding):  # there A is (R, V) and B is (C, R)
            tensors |= {f"{path}.lora_embedding_A": write.T, f"{path}.lora_embedding_B": read.T}
        else:
            tensors |= {f"{path}.lora_A.weight": read, f"{path}.lora_B.weight": write}
    _save(folder / WEIGHTS, {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    if gains:
        _save(folder / GAINS, gains)
    norms = [path for path, delta in part.by_module.items() if isinstance(delta, Gain)]
    config = _config(model, ranks, scales, norms)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def said_of_base(model: PreTrainedModel) -> dict[str, Any]:
    """Which model something is for, and the hash by which it is known again."""
    return {"class": type(model).__name__, "sha256": fingerprint(model)}


def write_base(folder: Path, model: PreTrainedModel) -> None:
    """Say which model an adapter is for."""
    files.write_json(folder / BASE, said_of_base(model))


def _check_base(folder: Path, model: PreTrainedModel) -> None:
    if not (folder / BASE).exists():
        return
    made_for = files.read_json(folder / BASE)
    if made_for["sha256"] != fingerprint(model):
        raise CheckpointError(
            f"{folder} was made for another {made_for['class']}, whose weights or whose dtype differ from "
            f"those of this one ({model.dtype}): load the model that it was made for, or, if this one is to "
            f"serve in its place, remove {BASE} there"
        )


def _config(
    model: PreTrainedModel, ranks: Mapping[str, int], scales: Mapping[str, float], norms: list[str]
) -> dict[str, Any]:
    common = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path or None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(model.get_submodule(path), Conv1D) for path in ranks),
        "target_modules": sorted(ranks),
        "modules_to_save": norms or None,
        # PEFT reads these as regular expressions.
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != common},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in alphas.items() if alpha != common},
    }


def _thin(matrix: Matrix) -> tuple[Tensor, Tensor, float]:
    """A (R, I), B (O, R) and the scale of a product that is the matrix, exactly."""
    if isinstance(matrix, LowRank):
        return matrix.A, matrix.B, matrix.scale
    whole = matrix.product()
    outputs, inputs = whole.shape
    if inputs <= outputs:
        return _unit(inputs, whole), whole, 1.0
    return whole, _unit(outputs, whole), 1.0


def _unit(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


# ---- reading -------------------------------------------------------------------------------------


def read_adapter(folder: Path, name: str, model: PreTrainedModel) -> LoraExpert:
    """An adapter of PEFT as an expert.

    Args:
        name: of the expert.
        model: beside which it is to stand.

    Raises:
        CheckpointError: the folder is no adapter, is damaged, or was made for another model.
        ConfigError: it does what LoRA experts cannot: the message says what.
    """
    config, found = _opened(folder)
    _refuse(config, folder)
    _check_base(folder, model)
    adapted = sorted({n.partition(".lora_")[0] for n in found if ".lora_" in n})
    saved = sorted({n.rpartition(".")[0] for n in found if ".lora_" not in n})
    modules = dict(model.named_modules())
    for path in (*adapted, *saved):
        if path not in modules:
            raise CheckpointError(
                f"{folder} was made for another model: it adapts {path!r}, which this {type(model).__name__} "
                "does not have"
            )
    deltas: dict[str, Delta] = {}
    for path in adapted:
        deltas[path] = _low_rank(modules[path], path, config, found, folder)
    gains = load_file(folder / GAINS) if (folder / GAINS).exists() else {}
    for path in saved:
        deltas[path] = _saved(modules[path], path, found, gains, folder)
    _tie(deltas, model)
    return LoraExpert(name, deltas)


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no adapter folder of PEFT: {Path(error.filename or WEIGHTS).name} is missing"
        ) from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); it was altered or cut short") from None
    # Tensors of a file lie wherever the file puts them, and kernels round by that: each gets its own memory.
    return config, {name.removeprefix(_PREFIX): tensor.clone() for name, tensor in tensors.items()}


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{folder} is an adapter of type {kind}; LoRA experts are made of LORA adapters")
    for field in (
        "use_dora",
        "layer_replication",
        "lora_bias",
        "target_parameters",
        "use_bdlora",
        "arrow_config",
        "alora_invocation_tokens",
        "trainable_token_indices",
    ):
        if config.get(field):
            raise ConfigError(
                f"{folder} has {field}={config[field]!r}, which a LoRA expert cannot do: merge it into its "
                "model with PEFT (merge_and_unload), or train it without"
            )
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGES_ITS_BASE):
        raise ConfigError(
            f"{folder} began as {begun}, which changes the weights of its base: let PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion), or merge it into its model"
        )
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{folder} trains biases (bias={config['bias']!r}), which a LoRA expert cannot")


def _low_rank(
    module: nn.Module, path: str, config: Mapping[str, Any], found: Mapping[str, Tensor], folder: Path
) -> Delta:
    is_table = isinstance(module, nn.Embedding)
    if not isinstance(module, (*LINEAR, nn.Embedding)):
        raise ConfigError(f"{folder} adapts {path!r}, a {type(module).__name__}, which LoRA experts cannot")
    names = ("lora_embedding_B", "lora_embedding_A") if is_table else ("lora_A.weight", "lora_B.weight")
    try:
        read, write = (found[f"{path}.{name}"] for name in names)
    except KeyError as error:
        raise CheckpointError(f"{folder} is damaged: it has no {error.args[0]}") from None
    if is_table:
        read, write = read.T.contiguous(), write.T.contiguous()
    outputs, inputs = sides(module)
    rank = len(read)
    if read.shape != (rank, inputs) or write.shape != (outputs, rank):
        raise CheckpointError(
            f"{folder} was made for another model: at {path!r} it has {tuple(write.shape)} x "
            f"{tuple(read.shape)} for a layer of {outputs} outputs and {inputs} inputs"
        )
    matrix = _as_matrix(read, write, _scale(config, path, rank))
    return Lookup(matrix, scale_of(module)) if is_table else matrix


def _as_matrix(read: Tensor, write: Tensor, scale: float) -> Matrix:
    """B A; the matrix itself where one of them is a unit matrix, as we write whole ones."""
    for unit, other in ((read, write), (write, read)):
        if scale == 1.0 and unit.shape[0] == unit.shape[1] and torch.equal(unit, _unit(len(unit), unit)):
            whole = Whole(read.shape[1], len(write), other)
            whole.D = nn.Parameter(other)
            return whole
    matrix = LowRank(read.shape[1], len(write), len(read), scale, read)
    matrix.A, matrix.B = nn.Parameter(read), nn.Parameter(write)
    return matrix


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = config.get("lora_alpha") or config["r"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


@torch.no_grad()
def _saved(
    module: nn.Module, path: str, found: Mapping[str, Tensor], gains: Mapping[str, Tensor], folder: Path
) -> Delta:
    """The delta of a module of which the adapter has a whole copy."""
    if isinstance(module, (*LINEAR, nn.Embedding)):
        weight = weight_of(module)
        difference = found[f"{path}.weight"].to(weight) - weight
        whole = Whole(*reversed(sides(module)), weight)
        whole.D.copy_(difference.T if isinstance(module, Conv1D) else difference)
        return Lookup(whole) if isinstance(module, nn.Embedding) else whole
    if "norm" not in type(module).__name__.lower() or f"{path}.weight" not in found:
        raise ConfigError(
            f"{folder} has a copy of {path!r}, a {type(module).__name__}; LoRA experts can have copies of "
            "norms, linear layers and tables"
        )
    weight, bias = weight_of(module), module._parameters.get("bias")
    gain = Gain(len(weight), weight, shifts=bias is not None)
    if f"{path}.g" in gains:
        for name, parameter in gain.named_parameters():
            parameter.copy_(gains[f"{path}.{name}"])
        return gain
    _match(gain, module, found, path, folder)
    return gain


def _match(gain: Gain, norm: nn.Module, found: Mapping[str, Tensor], path: str, folder: Path) -> None:
    """Set a gain so that the norm says what its copy would."""
    weight, bias = weight_of(norm), norm._parameters.get("bias")
    wanted = {n: found[f"{path}.{n}"].to(weight) for n in ("weight", "bias") if f"{path}.{n}" in found}
    for one in (0.0, 1.0):
        gain.g.copy_((wanted["weight"] + one) / (weight + one) - 1)
        if gain.shift is not None and bias is not None:
            gain.shift.copy_(wanted["bias"] - bias * (1 + gain.g))
        try:
            made = louder(norm, gain, path)
        except ConfigError:
            continue
        if all(torch.allclose(made[n], wanted[n], rtol=1e-4, atol=1e-5) for n in wanted):
            return
    raise ConfigError(f"{folder} has a copy of {path!r} that cannot be told as a gain")


def _tie(deltas: dict[str, Delta], model: PreTrainedModel) -> None:
    """Where the model's head is its table and both have the same delta, they have one."""
    places = places_of(model)
    table, head = deltas.get(places.table), deltas.get(places.head or "")
    if places.tied and isinstance(table, Lookup) and isinstance(head, Matrix) and _equal(table.matrix, head):
        deltas[places.head or ""] = table.matrix


def _equal(one: Matrix, other: Matrix) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return (
        one.kind == other.kind
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
