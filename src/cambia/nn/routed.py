"""A model whose batches take deltas of several Parts: all rows one Part's, each row its own, or a mixture.

The model stays what it is, class and names and weights; the deltas are added by forward hooks, and only
inside a block that says which:

    >>> routed = Routed(model)
    >>> routed.add("sql", {"model.layers.0.mlp.up_proj": LowRank(...)})
    >>> with routed.using(Everywhere("sql")):
    ...     model(input_ids)
    >>> with routed.using(ByRow(("sql", None))):      # None: the model alone
    ...     model(input_ids)                          # (2, T)
"""

# N rows of a batch, T time, E Parts, O a module's outputs

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cambia.errors import ConfigError
from cambia.nn.deltas import Adding, Delta

_TAKEN = "_cambia_routed"
"""Marks a model to which deltas are added."""
Model = TypeVar("Model", bound=nn.Module)
Deltas = Mapping[str, Delta]
"""What each Part adds to one module, by the Part's id."""


class Use(ABC):
    """Which deltas a batch takes."""

    @abstractmethod
    def apply(self, module: str, deltas: Deltas, given: Tensor, said: Tensor) -> Tensor:
        """A module's output with its deltas.

        Args:
            module: its name.
            deltas: of all Parts that have one for it.
            given: its input.
            said: its output without them.
        """


@dataclass(frozen=True)
class Everywhere(Use):
    """All rows take the deltas of one Part: how it is trained."""

    part: str

    def apply(self, module: str, deltas: Deltas, given: Tensor, said: Tensor) -> Tensor:
        delta = deltas.get(self.part)
        return said if delta is None else said + delta(given, said)


@dataclass(frozen=True)
class ByRow(Use):
    """Each row takes the deltas of its own Part, or none.

    What is made of the deltas is kept for further calls, as in writing token after token: make a new one once
    they have been trained.
    """

    parts: Sequence[str | None]
    """For each row a Part, or None for the model alone."""
    _made: dict[tuple[str, int], list[Adding]] = field(default_factory=dict, repr=False, compare=False)

    def apply(self, module: str, deltas: Deltas, given: Tensor, said: Tensor) -> Tensor:
        rows, flat = len(self.parts), said.dim() == 2
        if flat or len(said) != rows:
            given, said = _in_rows(module, given, rows), _in_rows(module, said, rows)
        times = len(said) // rows  # in a beam search those of one row stand together
        made = self._made.get((module, times))
        if made is None:
            made = self._made[module, times] = self._by_kind(deltas, times)
        for adding in made:  # a row has a delta of one kind, and is left alone by all others
            said = adding(given, said)
        return said.flatten(0, 1) if flat else said

    def _by_kind(self, deltas: Deltas, times: int) -> list[Adding]:
        """One function for each kind of delta that some row has."""
        rows = [None if part is None else deltas.get(part) for part in self.parts for _ in range(times)]
        kinds = {delta.kind: delta for delta in rows if delta is not None}
        return [
            one.by_row([row if row is not None and row.kind == kind else None for row in rows])
            for kind, one in kinds.items()
        ]


@dataclass(frozen=True, eq=False)
class Mixed(Use):
    """Every row, or every token, takes the deltas of several Parts, each with a weight."""

    parts: Sequence[str]
    weights: Callable[[str, Tensor], Tensor]
    """(a module's name, its input) -> the weight of each Part, (N, E), or (N, T, E) for each token."""

    def apply(self, module: str, deltas: Deltas, given: Tensor, said: Tensor) -> Tensor:
        weights = self.weights(module, given)
        if weights.dim() == 2:
            weights = weights[:, None]  # (N, 1, E)
        flat = said.dim() == 2
        given, said = _in_rows(module, given, len(weights)), _in_rows(module, said, len(weights))
        if len(said) > len(weights):  # in a beam search those of one row stand together
            weights = weights.repeat_interleave(len(said) // len(weights), 0)
        total = said
        for number, part in enumerate(self.parts):
            if part in deltas:
                added = deltas[part](given, said)
                weight = weights[..., number].to(added.dtype)
                total = total + added * weight.view(*weight.shape, *[1] * (added.dim() - weight.dim()))
        return total.flatten(0, 1) if flat else total


class Routed:
    """The hooks on a model, and which deltas its batches take now.

    Args:
        model: is not changed; `remove` takes the hooks off.
        owner: whose Parts they are.

    Raises:
        ConfigError: somebody adds deltas to it already.
    """

    def __init__(self, model: nn.Module, owner: object = None):
        if _TAKEN in vars(model):
            raise ConfigError(
                "deltas are added to this model already: add to those, remove() them first, or take a copy "
                "of the model, cambia.nn.routed.bare_copy(model)"
            )
        vars(model)[_TAKEN] = self
        self.model, self.owner = model, owner
        self.deltas: dict[str, dict[str, Delta]] = {}
        """Of all Parts, by the module's name and the Part's id."""
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.use: Use | None = None
        """Which deltas batches take; None: the model alone answers."""

    @staticmethod
    def on(model: nn.Module) -> Routed | None:
        """The one whose deltas are added to a model; None where nobody's are."""
        found = vars(model).get(_TAKEN)
        return found if isinstance(found, Routed) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Routed:
        return self  # a copy of the model is not this one's: see `bare_copy`

    def add(self, part: str, deltas: Deltas) -> None:
        """Hang up a Part's deltas.

        Args:
            deltas: by the name of the module.
        """
        for name, delta in deltas.items():
            if name not in self.deltas:
                self.deltas[name] = {}
                module = self.model.get_submodule(name)
                self._hooks.append(module.register_forward_hook(_Adding(self, name)))
            self.deltas[name][part] = delta

    def drop(self, part: str) -> None:
        """Take a Part's deltas down."""
        for deltas in self.deltas.values():
            deltas.pop(part, None)

    def remove(self) -> None:
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.deltas = [], {}
        vars(self.model).pop(_TAKEN, None)

    @contextmanager
    def using(self, use: Use | None) -> Generator[None]:
        """Inside the block batches take these."""
        before, self.use = self.use, use
        try:
            yield
        finally:
            self.use = before


@dataclass(frozen=True)
class _Adding:
    """A forward hook."""

    routed: Routed
    name: str

    def __call__(self, module: nn.Module, given: tuple[Any, ...], said: Tensor) -> Tensor | None:
        use = self.routed.use
        return None if use is None else use.apply(self.name, self.routed.deltas[self.name], given[0], said)


def bare_copy(model: Model) -> Model:
    """A copy of a model to which nothing is added."""
    copied = copy.deepcopy(model)
    vars(copied).pop(_TAKEN, None)
    for module in copied.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Adding)]:
            del hooks[key]
    return copied


def _in_rows(module: str, tensor: Tensor, rows: int) -> Tensor:
    """A batch as rows of tokens, also where a module is given all tokens in a line, (N T, ...)."""
    if len(tensor) % rows:
        raise ConfigError(
            f"{module} was given {len(tensor)} rows, not a multiple of the {rows} that were routed: "
            "a model that works on parts of a batch cannot be routed by rows"
        )
    in_a_line = tensor.dim() == 2 and tensor.is_floating_point()
    return tensor.unflatten(0, (rows, -1)) if in_a_line else tensor
