"""Growth beside a model: a new Part, and the model itself stays as it is, to the last bit.

    >>> event = grow(model, AddLoraExpert(rank=16), optimizer=optimizer)
    >>> LoraExperts.of(model).names
    ['expert_0']

A Part has tensors of its own, so nothing is exchanged and nothing has to be carried over: the optimizer takes
its tensors up, those of sealed Parts are let go of, and whatever else keeps state per parameter is not asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth.check import check_loss, logits_of, relative_error
from cambia.growth.operators import Operator, PartOperator
from cambia.growth.plan import plan_growth
from cambia.models.bodies import count_parameters
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.parts.lora_experts import LoraExperts
from cambia.models.parts.lora_shape import LoraShape, new_deltas
from cambia.models.parts.optimizing import take_up
from cambia.records import GrowthEvent


@dataclass(frozen=True)
class AddLoraExpert(PartOperator):
    """A LoRA expert beside a frozen model (see `cambia.models.LoraExperts`)."""

    rank: Annotated[int, Gt(0)] | None = None
    """Of its matrices; by default what all experts of the model have."""
    name: str | None = None
    """Its id; expert_0, expert_1, ... by default."""

    def sizes(self, model: PreTrainedModel) -> tuple[int, int]:
        experts = LoraExperts.of(model)
        if experts is None:
            return count_parameters(model), _size(model, self._shape(LoraShape()))
        if self.like is not None:
            return count_parameters(experts), experts[self.like].num_parameters
        return count_parameters(experts), _size(model, self._shape(experts.shape))

    def add(self, beside: LoraExperts) -> LoraExpert:
        return beside.add(self.name, like=self.like, shape=self._shape(beside.shape))

    def _shape(self, common: LoraShape) -> LoraShape:
        return common if self.rank is None else replace(common, rank=self.rank)


def _size(model: PreTrainedModel, shape: LoraShape) -> int:
    return count_parameters(nn.ModuleList(new_deltas(model, shape).values()))


def add_part(
    model: PreTrainedModel,
    *operators: Operator,
    optimizer: torch.optim.Optimizer | None,
    batch: Tensor,
    reason: str,
    context: int,
) -> GrowthEvent:
    """`grow` for a Part: the model with it says what it said before, to the last bit.

    Args:
        operators: one.
        batch: (B, T) token ids on which that is checked.

    Raises:
        GrowthError: there are several operators; or it says something else, which is a bug, and the Part is
            taken away again.
    """
    began = time.perf_counter()
    operator = operators[0]
    if len(operators) > 1 or not isinstance(operator, PartOperator):
        raise GrowthError(
            f"{operator} stands beside the model and is an event of its own: call grow() for it"
        )
    plan = plan_growth(model, operator, context=context)
    experts = LoraExperts.of(model)
    if experts is None:
        experts = LoraExperts(model)
    with experts.using(operator.like):
        before = logits_of(model, batch)
    part = operator.add(experts)
    with experts.using(part.name):
        after = logits_of(model, batch)
    if not torch.equal(before, after):
        experts.drop(part.name)
        raise GrowthError(
            f"{operator} changed the model's logits by {relative_error(before, after):.1e} (relative); "
            "it was rolled back. This is a bug"
        )
    if optimizer is not None:
        take_up(optimizer, part)
    measured = {
        "logit_error": 0.0,
        "loss_before": check_loss(before, batch),
        "loss_after": check_loss(after, batch),
        "check_flops": plan.check_flops(batch.numel()),
        "seconds": time.perf_counter() - began,
    }
    return plan.event(reason, measured)
