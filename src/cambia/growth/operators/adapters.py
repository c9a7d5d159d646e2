"""Adapters: a higher rank for LoRA, on models of PEFT.

A LoRA layer adds alpha / r B A x to what its base layer says (Hu et al. 2021, arXiv:2106.09685). New rows
of A are random and new columns of B zero, so nothing changes at first; alpha follows the rank, so that
alpha / r stays and old rows train on as they did.

    >>> model = peft.get_peft_model(base, peft.LoraConfig(r=4))
    >>> grow(model, WidenLoraRank(to=16), optimizer=optimizer)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cambia.errors import GrowthError
from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.growth.operators.widen import lengthened
from cambia.models.architectures import per_layer, uniform


@dataclass(frozen=True)
class WidenLoraRank(Amount, Operator):
    """A higher rank for one LoRA adapter, in all of its layers: exact, and alive from the second step on."""

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    adapter: str = "default"
    """Name of the adapter."""

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance", alive_within=2)

    def step(self, shape: Shape) -> Step:
        known = getattr(shape.config, "lora_ranks", None)
        if known is None:
            raise GrowthError(
                f"a plain {shape.table.name} model has no LoRA adapter whose rank could grow: add one with "
                "peft.get_peft_model, or grow the model itself, for example with WidenFFN"
            )
        if self.adapter not in known:
            raise GrowthError(f"there is no adapter {self.adapter!r}; adapter= is one of {', '.join(known)}")
        ranks = per_layer(known[self.adapter], shape.num_layers)
        after = [self.after(rank) if rank else 0 for rank in ranks]
        config = copy.deepcopy(shape.config)
        config.lora_ranks = {**known, self.adapter: uniform(after)}
        sizes = {i: rank for i, rank in enumerate(after) if rank}
        params = lengthened(shape, f"rank of {self.adapter}", sizes, std=config.initializer_range)
        return Step(config, params, list(range(shape.num_layers)))
