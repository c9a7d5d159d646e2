"""What a LoRA expert adds to a model, and how much.

By default low-rank deltas on all linear layers, a gain for each norm, and a delta of the token table: whole
where the table is a small share of the model, low-rank where not. At a million parameters it is the table and
the gains that close the gap to fine-tuning everything.
"""

# O a layer's outputs, I its inputs, R rank

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cambia.errors import ConfigError
from cambia.models.bodies import count_parameters
from cambia.nn.deltas import Delta, Gain, Lookup, LowRank, Matrix, Whole
from cambia.nn.lora import LINEAR, weight_of

SMALL_TABLE = 0.1
"""The share of a model up to which a table's delta is whole."""


@dataclass(frozen=True)
class LoraShape:
    """What a LoRA expert adds to, and how much."""

    rank: Annotated[int, Gt(0)] | None = None
    """Of the matrices; by default the largest that fits `share_of(model)`."""
    alpha: Annotated[float, Gt(0)] | None = None
    """What a low-rank delta adds is multiplied by alpha / rank; rank where it is left out."""
    kind: Literal["lora", "full"] = "lora"
    """full: whole matrices everywhere, for small models."""
    tables: Literal["auto", "whole", "lora", "none"] = "auto"
    """The delta of the token table, and of the output head; auto: whole where it is small."""
    gains: bool = True
    """A gain for each norm."""
    targets: tuple[str, ...] = ()
    """Linear layers to adapt, by the end of their names, as in PEFT; all by default."""


@dataclass(frozen=True, eq=False)
class Places:
    """The modules of a model that can have a delta, by name."""

    linears: Mapping[str, nn.Module]
    norms: Mapping[str, nn.Module]
    table: str
    """The token table."""
    head: str | None
    """The output head, where there is one."""
    tied: bool
    """Whether the head's weight is the table's."""


def places_of(model: PreTrainedModel, targets: tuple[str, ...] = ()) -> Places:
    """Where deltas can be.

    Raises:
        ConfigError: no linear layer, or none of those asked for; the message lists what there is.
    """
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    every = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR) and m is not head}
    missing = [t for t in targets if not any(_ends(n, t) for n in every)]
    if not every or missing:
        seen = ", ".join(sorted({n.rpartition(".")[2] for n in every})) or "none"
        wanted = f"that ends with {missing[0]!r}" if missing else "that can be adapted"
        raise ConfigError(f"a {type(model).__name__} has no linear layer {wanted}; its linear layers: {seen}")
    linears = {n: m for n, m in every.items() if not targets or any(_ends(n, t) for t in targets)}
    return Places(
        linears,
        {n: m for n, m in model.named_modules() if _is_norm(m)},
        names[id(table)],
        None if head is None else names[id(head)],
        head is not None and weight_of(head) is weight_of(table),
    )


def share_of(model: nn.Module) -> float:
    """The share of a model that an expert takes by default: 0.35 to ten million parameters, then less, one
    percent at a billion."""
    return 0.35 * min(1.0, (1e7 / count_parameters(model)) ** 0.75)


def new_deltas(model: PreTrainedModel, shape: LoraShape) -> dict[str, Delta]:
    """The deltas of a new expert by the name of the module, all zero.

    Raises:
        ConfigError: see `places_of`.
    """
    places = places_of(model, shape.targets)
    rank = shape.rank or _fitting_rank(model, places, shape)
    return _deltas(model, places, replace(shape, rank=rank))


def _deltas(model: PreTrainedModel, places: Places, shape: LoraShape) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {
        path: _matrix(layer, shape, whole=shape.kind == "full") for path, layer in places.linears.items()
    }
    if shape.tables != "none":
        deltas |= _tables(model, places, shape)
    for path, norm in places.norms.items() if shape.gains else ():
        weight = weight_of(norm)
        deltas[path] = Gain(len(weight), weight, shifts=norm._parameters.get("bias") is not None)
    return deltas


def _tables(model: PreTrainedModel, places: Places, shape: LoraShape) -> dict[str, Delta]:
    table = model.get_submodule(places.table)
    size, base = weight_of(table).numel(), count_parameters(model)
    both = size if places.tied or places.head is None else 2 * size
    fits = size <= SMALL_TABLE * base and both <= share_of(model) * base
    auto = fits or shape.kind == "full"
    whole = auto if shape.tables == "auto" else shape.tables == "whole"
    matrix = _matrix(table, shape, whole=whole)
    deltas: dict[str, Delta] = {places.table: Lookup(matrix, scale_of(table))}
    if places.head is not None:
        head = model.get_submodule(places.head)
        deltas[places.head] = matrix if places.tied else _matrix(head, shape, whole=whole)
    return deltas


def _matrix(layer: nn.Module, shape: LoraShape, *, whole: bool) -> Matrix:
    outputs, inputs = sides(layer)
    if whole:
        return Whole(inputs, outputs, weight_of(layer))
    assert shape.rank is not None
    size = min(shape.rank, inputs, outputs)
    return LowRank(inputs, outputs, size, (shape.alpha or shape.rank) / shape.rank, weight_of(layer))


def _fitting_rank(model: PreTrainedModel, places: Places, shape: LoraShape) -> int:
    """The largest rank, a multiple of 4, with which an expert stays within its share of the model; at least
    4, and 16 from a billion parameters on."""
    thin, thicker = (
        count_parameters(nn.ModuleList(_deltas(model, places, replace(shape, rank=rank)).values()))
        for rank in (1, 2)
    )
    each = thicker - thin
    room = share_of(model) * count_parameters(model) - (thin - each)
    widest = max(min(sides(layer)) for layer in places.linears.values())
    least = 16 if count_parameters(model) >= _LARGE else 4
    return max(least, min(int(room / each) // 4 * 4, widest)) if each else 1


_LARGE = 1_000_000_000
"""Parameters of a model that is given a rank of 16 or more."""


def sides(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer; entries and width of a table."""
    if isinstance(layer, nn.Linear):  # a quantised one's weight has another shape
        return layer.out_features, layer.in_features
    first, second = weight_of(layer).shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def scale_of(table: nn.Module) -> float:
    """What a table multiplies its entries with, as Gemma's do."""
    scale = getattr(table, "embed_scale", 1.0)
    return float(scale)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
