"""LoRA experts put into a model's own weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cambia.errors import ConfigError
from cambia.models.parts.lora_expert import LoraExpert
from cambia.nn.deltas import Delta, Gain, Lookup, Matrix
from cambia.nn.lora import weight_of
from cambia.nn.routed import bare_copy


@torch.no_grad()
def merged(model: PreTrainedModel, part: LoraExpert) -> PreTrainedModel:
    """A copy of a model that says by itself, up to rounding, what it says with an expert.

    Raises:
        ConfigError: a norm's gain cannot be put into its weight, or a weight that two layers share has
            another delta in each, or a weight is quantised.
    """
    copied = bare_copy(model)
    done: dict[int, tuple[str, Matrix]] = {}
    for path, delta in part.by_module.items():
        module = copied.get_submodule(path)
        if isinstance(delta, Gain):
            for name, tensor in louder(model.get_submodule(path), delta, path).items():
                module.get_parameter(name).copy_(tensor)
            continue
        weight, matrix = weight_of(module), matrix_of(delta)
        if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
            raise ConfigError(
                f"{path} is stored quantised, and nothing can be added to such a weight: merge into "
                "model.dequantize(), or into the model that it was made from"
            )
        first, other = done.setdefault(id(weight), (path, matrix))
        if other is not matrix:
            raise ConfigError(
                f"{first} and {path} share a weight, and LoRA expert {part.name!r} adds something else to "
                "each: it cannot be merged into this model"
            )
        if first == path:
            product = matrix.product().to(weight.dtype)
            weight.add_(product.T if isinstance(module, Conv1D) else product)
    _refuse_half_tied(copied, part, done)
    return copied


def _refuse_half_tied(model: PreTrainedModel, part: LoraExpert, done: dict[int, tuple[str, Matrix]]) -> None:
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if id(weight) in done and path not in part.by_module:
            raise ConfigError(
                f"{path} shares its weight with {done[id(weight)][0]}, and LoRA expert {part.name!r} adds to "
                "that one alone: it cannot be merged into this model"
            )


def matrix_of(delta: Delta) -> Matrix:
    """What a delta adds to a weight."""
    matrix = delta.matrix if isinstance(delta, Lookup) else delta
    assert isinstance(matrix, Matrix)
    return matrix


@torch.no_grad()
def louder(norm: nn.Module, gain: Gain, path: str) -> dict[str, Tensor]:
    """The weights with which a norm says what it says with a gain, by their names in it.

    Most norms multiply with their weight, some (Gemma's) with one more: which, is tried.

    Raises:
        ConfigError: neither does.
    """
    weight, bias = weight_of(norm), norm._parameters.get("bias")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, len(weight), generator=generator).to(weight)
    wanted = norm(probe) + gain(probe, norm(probe))
    factor = 1 + gain.g
    shift = (
        {} if bias is None or gain.shift is None else {"bias": (bias * factor + gain.shift).to(bias.dtype)}
    )
    for one in (0.0, 1.0):
        weights = {"weight": ((weight + one) * factor - one).to(weight.dtype), **shift}
        said = torch.func.functional_call(norm, weights, (probe,))
        if torch.allclose(said.float(), wanted.float(), rtol=1e-2, atol=1e-3 * float(wanted.abs().max())):
            return weights
    raise ConfigError(
        f"the gain of {path} ({type(norm).__name__}) cannot be put into its weight; experts of "
        "LoraShape(gains=False) can be written"
    )
