"""What the laws are held against: every operator of the registry in every form, and how to measure.

An operator joins by standing in `OPERATORS`, a family by standing in `ARCHITECTURES`; nothing here names
one. An operator's settings are read off its fields: every choice of a `Literal`, both values of a bool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.config import resolve
from cambia.growth.operators import OPERATORS, Amount, Operator
from cambia.models.architectures import ARCHITECTURES, architecture_of

FAMILIES = sorted(ARCHITECTURES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
AMOUNTS: list[dict[str, Any]] = [{"add": 3}, {"factor": 1.6}]
LEGAL_AMOUNTS: dict[str, list[dict[str, Any]]] = {
    "AddHeads": [{"add": 4}, {"factor": 3}],
    "AddKVHeads": [{"add": 1}, {"factor": 2}],
    "WidenHidden": [{"add": 12}, {"factor": 2}],
    "WidenHidden clone": [{"factor": 2}, {"factor": 3}],
}
"""Amounts that stock configs accept of the sizes in `tests.conftest`, where others would not be."""


_BESIDE = ("widen_lora_rank", "add_lora_expert")


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a field's type lists: a Literal's, a bool's, or those of a union's members."""
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(itertools.chain.from_iterable(choices(member) for member in get_args(hint)))


def forms(cls: type[Operator], amounts: list[dict[str, Any]]) -> list[Operator]:
    """An operator in every form that its fields allow."""
    hints = get_type_hints(cls)
    listed: dict[str, tuple[Any, ...]] = {}
    for field in dataclasses.fields(cls):
        if field.name in ("factor", "add", "to"):
            continue  # amounts are said above
        if values := choices(hints[field.name]):
            listed[field.name] = values
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TypeError(
                f"{cls.__name__}.{field.name} has no default: say here how the laws should set it"
            )
    found = []
    for values in itertools.product(*listed.values()):
        legal = next(
            (LEGAL_AMOUNTS[k] for v in values if (k := f"{cls.__name__} {v}") in LEGAL_AMOUNTS), None
        )
        legal = (legal or LEGAL_AMOUNTS.get(cls.__name__, AMOUNTS))[: len(amounts)]
        for amount in legal if issubclass(cls, Amount) else [{}]:
            found.append(cls(**amount, **dict(zip(listed, values, strict=True))))
    return found


def every(amounts: list[dict[str, Any]]) -> list[Operator]:
    """Every operator in every form; adapters and Parts are no part of a plain model (see `test_parts`)."""
    kinds = [resolve(name, OPERATORS, "operator") for name in OPERATORS if name not in _BESIDE]
    return [form for kind in kinds for form in forms(kind, amounts)]


def once(operators: list[Operator], *but: str) -> list[Operator]:
    """One of those that differ in nothing but the fields named; without names, one of each kind."""
    seen: dict[Any, Operator] = {}
    for operator in operators:
        fields = {k: repr(v) for k, v in vars(operator).items() if but and k not in but}
        seen.setdefault((type(operator), *sorted(fields.items())), operator)
    return list(seen.values())


EVERY = every(AMOUNTS[:1])
EXACT = [form for form in EVERY if form.contract.exactness == "tolerance"]
JUMPING = [form for form in EVERY if form.contract.exactness == "none"]
EXACT_BY_ANY_AMOUNT = [form for form in every(AMOUNTS) if form.contract.exactness == "tolerance"]


def told(operator: Operator) -> str:
    """A short name for a test's id."""
    given = ",".join(f"{k}={v}" for k, v in vars(operator).items() if v is not None)
    return f"{type(operator).__name__}({given})"


def parameters(operators: list[Operator]) -> list[Any]:
    """Every family with every operator, as pytest parameters.

    Families with the same table, as Llama, Mistral and Qwen2 have, take the same way through an operator:
    the first of them goes through all its forms, the others through one of each kind.
    """
    seen: set[Any] = set()
    cases = []
    for family in FAMILIES:
        table = ARCHITECTURES[family]
        way = (id(table.inside), table.uneven)
        forms = possible(family, operators)
        for operator in once(forms) if way in seen else forms:
            cases.append(pytest.param(family, operator, id=f"{family}-{told(operator)}"))
        seen.add(way)
    return cases


IMPOSSIBLE = {"gpt2": ("AddHeads", "AddKVHeads", "WidenHeadDim")}
"""What a family's stock class has no place for."""


def possible(family: str, operators: list[Operator]) -> list[Operator]:
    """Those that are legal for the family: a stock model cannot be uneven."""
    left = [operator for operator in operators if type(operator).__name__ not in IMPOSSIBLE.get(family, ())]
    if not ARCHITECTURES[family].hides_tokens:
        left = [operator for operator in left if not getattr(operator, "hidden", False)]
    even = [operator for operator in left if getattr(operator, "layers", "all") == "all"]
    return left if ARCHITECTURES[family].uneven else even


# ---- modules by the tables, whatever a family calls them -------------------------------------------


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers."""
    layers = model.get_submodule(architecture_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the head."""
    table = architecture_of(model.config)
    (name,) = (name for name, axes in table.outside.items() if axes.is_gain)
    return model.get_submodule(name.removesuffix(".weight"))


def along(model: PreTrainedModel, dimension: str, *, reads: bool, layer: int | None = None) -> dict[str, int]:
    """Parameters along which a dimension runs, as what they read or as what they make: name -> its axis."""
    table = architecture_of(model.config)
    found = {}
    for name, _ in model.named_parameters():
        axes = table.axes(name)
        if dimension in axes.names and (layer is None or table.layer_of(name) == layer):
            dim = axes.names.index(dimension)
            if (axes.read == dim) == reads:
                found[name] = dim
    return found


def readers(model: PreTrainedModel, dimension: str, *, layer: int | None = None) -> dict[str, int]:
    """The matrices that read a dimension: name -> axis."""
    return along(model, dimension, reads=True, layer=layer)


def makers(model: PreTrainedModel, dimension: str, *, layer: int | None = None) -> dict[str, int]:
    """What makes a dimension, matrices and biases: name -> axis."""
    return along(model, dimension, reads=False, layer=layer)


def units(model: PreTrainedModel, layer: int) -> Tensor:
    """(F, ...): for each feed-forward unit of a layer all weights that make it and all that it says."""
    found = makers(model, "ffn", layer=layer) | readers(model, "ffn", layer=layer)
    return torch.cat(_as_rows(model, found), dim=1)


def gate(model: PreTrainedModel, layer: int) -> Tensor:
    """(F, C): the first matrix that makes a layer's feed-forward units, one row for each."""
    return _as_rows(model, makers(model, "ffn", layer=layer))[0]


def _as_rows(model: PreTrainedModel, found: dict[str, int]) -> list[Tensor]:
    every = [(model.get_parameter(name).detach(), dim) for name, dim in found.items()]
    return [parameter.movedim(dim, 0) for parameter, dim in every if parameter.dim() == 2]


def size_of(model: PreTrainedModel, name: str) -> Any:
    """A size in a model's config, by `LlamaConfig`'s name."""
    return architecture_of(model.config).size(model.config, name)


def field(model: PreTrainedModel, name: str) -> str:
    """What a family's config calls a size on disk."""
    name = architecture_of(model.config).fields.get(name, name)
    return model.config.attribute_map.get(name, name)


# ---- measuring -----------------------------------------------------------------------------------


def tokens(model: PreTrainedModel, *, rows: int = 3, length: int = 13, seed: int = 1) -> Tensor:
    """(rows, length) token ids."""
    generator = torch.Generator().manual_seed(seed)
    hidden = getattr(model.config, "predictable_tokens", None)  # a native model may hide some
    return torch.randint(0, hidden or model.config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Tensor | None = None) -> Tensor:
    """(B, T, V)."""
    return model(input_ids=tokens(model) if batch is None else batch, use_cache=False).logits


def relative_error(after: Tensor, before: Tensor) -> float:
    """max |after - before| / max |before|."""
    difference = (after - before).masked_fill(after == before, 0.0)  # hidden tokens: minus infinity
    return (difference.abs().max() / before.masked_fill(before.isinf(), 0.0).abs().max()).item()


def loss_of(model: PreTrainedModel, batch: Tensor | None = None) -> Tensor:
    """Mean loss on fixed tokens, nats per token."""
    batch = tokens(model) if batch is None else batch
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def bits(tensor: Tensor | None) -> bytes | None:
    """A tensor's values, as they are in memory."""
    if tensor is None:
        return None
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a growth could touch, by identity and by bits."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    settings = {
        name: {
            key: str(value)
            for key, value in vars(module).items()
            if not key.startswith("_") or key.endswith("_hooks")
        }
        for name, module in model.named_modules()
    }
    return {
        "parameters": [(name, id(p), bits(p), p.requires_grad) for name, p in parameters],
        "gradients": [(name, id(p.grad), bits(p.grad)) for name, p in parameters],
        "buffers": [(name, id(b), bits(b)) for name, b in model.named_buffers()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "settings": settings,
        "config": (id(model.config), {key: str(value) for key, value in vars(model.config).items()}),
        "logits": bits(logits(model)),
        "groups": [
            {key: [id(p) for p in value] if key == "params" else value for key, value in group.items()}
            for group in optimizer.param_groups
        ],
        "moments": [
            (
                id(p),
                [(k, id(v), bits(v) if isinstance(v, Tensor) else v) for k, v in state.items()],
            )
            for p, state in optimizer.state.items()
        ],
    }


@contextlib.contextmanager
def without_upcasts(model: PreTrainedModel) -> Iterator[None]:
    """Stock norms and rotary tables compute in float32 whatever the weights are; here they do not.

    Otherwise a float64 model would show errors no smaller than float32 allows.
    """
    replaced = {}
    for module in model.modules():
        kind = type(module)
        if kind in replaced or kind.__module__.startswith("cambia."):
            continue
        if kind.__name__.endswith("RMSNorm"):
            replaced[kind] = (kind.forward, _plain_norm)
        elif kind.__name__.endswith("RotaryEmbedding"):
            replaced[kind] = (kind.forward, _plain_rotary)
    for kind, (_, plain) in replaced.items():
        kind.forward = plain
    try:
        yield
    finally:
        for kind, (stock, _) in replaced.items():
            kind.forward = stock


def _plain_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(mean_square + self.variance_epsilon))


def _plain_rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].to(x) * self.inv_freq.to(x)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
