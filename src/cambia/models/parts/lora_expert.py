"""A LoRA expert: the kind of Part that adds deltas to the layers of a frozen model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from cambia.models.bodies import count_parameters
from cambia.models.hashing import fingerprint
from cambia.nn.deltas import Delta, LowRank

State = Literal["seeding", "consolidating", "sealed"]


class LoraExpert(nn.Module):
    """One Part: its deltas, its state, and from whom it was born.

    Args:
        name: its id, which it keeps.
        deltas: by the name of the module that they are added to; a tied one may stand there twice.
        parents: ids of the Parts that it began as.
    """

    def __init__(self, name: str, deltas: Mapping[str, Delta], parents: tuple[str, ...] = ()):
        super().__init__()
        self.name, self.parents = name, parents
        self.state: State = "seeding"
        # In one order, so that a tied one has the same name however the expert came to be.
        self.deltas = nn.ModuleDict({path.replace(".", "/"): deltas[path] for path in sorted(deltas)})

    @property
    def by_module(self) -> dict[str, Delta]:
        """Its deltas by the name of the module."""
        found = {path.replace("/", "."): delta for path, delta in self.deltas.items()}
        return {path: delta for path, delta in found.items() if isinstance(delta, Delta)}

    @property
    def rank(self) -> int:
        """The largest of its low-rank deltas; 0 where it has none."""
        return max((len(m.A) for m in self.modules() if isinstance(m, LowRank)), default=0)

    def reset(self, seed: int) -> None:
        """Begin as nothing: low-rank deltas read at random and write zero, all others are zero."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, LowRank):
                module.reset(generator)

    def copied(self, name: str) -> LoraExpert:
        """Another expert that begins as this one is, and trains."""
        return LoraExpert(name, copy.deepcopy(self.by_module), (self.name,)).requires_grad_(True)

    @torch.no_grad()
    def become(self, other: LoraExpert) -> None:
        """Begin as another one of the same shape."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
        self.parents = (other.name,)

    def seal(self) -> None:
        """Nothing of it changes any more."""
        self.state = "sealed"
        self.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        """Tied ones count once."""
        return count_parameters(self)

    @property
    def sha256(self) -> str:
        """The hash of all its tensors."""
        return fingerprint(self)
