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
from cambia.models.architectures import ARCHITECTURES

FAMILIES = sorted(ARCHITECTURES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
AMOUNTS: list[dict[str, Any]] = [{"add": 3}, {"factor": 1.6}]


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
    amounts = amounts if issubclass(cls, Amount) else [{}]
    listed: dict[str, tuple[Any, ...]] = {}
    for field in dataclasses.fields(cls):
        if field.name in ("factor", "add", "to"):
            continue
        if values := choices(hints[field.name]):
            listed[field.name] = values
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise TypeError(
                f"{cls.__name__}.{field.name} has no default: say here how the laws should set it"
            )
    return [
        cls(**amount, **dict(zip(listed, values, strict=True)))
        for values in itertools.product(*listed.values())
        for amount in amounts
    ]


def every(amounts: list[dict[str, Any]]) -> list[Operator]:
    """Every operator in every form."""
    return [form for name in OPERATORS for form in forms(resolve(name, OPERATORS, "operator"), amounts)]


EVERY = every(AMOUNTS[:1])
EXACT = [form for form in EVERY if form.contract.exactness == "tolerance"]
JUMPING = [form for form in EVERY if form.contract.exactness == "none"]
EXACT_BY_ANY_AMOUNT = [form for form in every(AMOUNTS) if form.contract.exactness == "tolerance"]


def told(operator: Operator) -> str:
    """A short name for a test's id."""
    given = ",".join(f"{k}={v}" for k, v in vars(operator).items() if v is not None)
    return f"{type(operator).__name__}({given})"


def parameters(operators: list[Operator]) -> list[Any]:
    """Every family with every operator, as pytest parameters."""
    return [
        pytest.param(family, operator, id=f"{family}-{told(operator)}")
        for family in FAMILIES
        for operator in possible(family, operators)
    ]


def possible(family: str, operators: list[Operator]) -> list[Operator]:
    """Those that are legal for the family: a stock model cannot be uneven."""
    even = [operator for operator in operators if getattr(operator, "layers", "all") == "all"]
    return operators if ARCHITECTURES[family].uneven else even


def tokens(model: PreTrainedModel, *, rows: int = 3, length: int = 13, seed: int = 1) -> Tensor:
    """(rows, length) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Tensor | None = None) -> Tensor:
    """(B, T, V)."""
    return model(input_ids=tokens(model) if batch is None else batch, use_cache=False).logits


def relative_error(after: Tensor, before: Tensor) -> float:
    """max |after - before| / max |before|."""
    return ((after - before).abs().max() / before.abs().max()).item()


def loss_of(model: PreTrainedModel, batch: Tensor | None = None) -> Tensor:
    """Mean loss on fixed tokens, nats per token."""
    batch = tokens(model) if batch is None else batch
    return model(input_ids=batch, labels=batch, use_cache=False).loss


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
