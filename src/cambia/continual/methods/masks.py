"""Element masks: single weights freeze, task by task, inside the tensors that train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from cambia.continual.methods.method import (
    AnyStream,
    Backward,
    Contract,
    Method,
    Parameters,
    Situation,
)

FREE = 32_767
"""In place of a stage: this weight trains."""


@dataclass
class ElementMasks(Method):
    """After each task the most important of the weights that are still free freeze for good.

    The idea of PackNet (Mallya & Lazebnik 2018, https://arxiv.org/abs/1711.05769) without pruning, so that
    nobody has to say at test time which task a text is of. What is frozen is put back inside the optimizer's
    step: a gradient of zero would not hold it against momentum and weight decay.
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, seals_weights=True, grows=False)

    share: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the free weights of each tensor that freezes at the end of a task."""
    by: Literal["movement", "magnitude"] = "movement"
    """What makes a weight important: how far the task moved it, or its size."""

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._stage = 0
        self._since: dict[str, Tensor] = {}  # after which stage a weight froze; FREE where it trains
        self._kept: dict[str, Tensor] = {}  # the values of frozen weights, at their places
        self._begun: dict[str, Tensor] = {}
        situation.optimizer.register_step_post_hook(lambda *_: self._put_back())

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Freeze by masks of one's own, by parameter name: True where a weight trains on."""
        parameters = self._parameters()
        for name, mask in masks.items():
            parameter = parameters[name]
            free = self._free(name, parameter)
            freezing = free & ~mask.to(parameter.device, torch.bool)
            if not bool(freezing.any()):
                continue
            since = self._since.setdefault(name, torch.full_like(parameter, FREE, dtype=torch.int16))
            since[freezing] = self._stage
            self._kept[name] = parameter.detach().clone()

    def begin_stage(self, stage: int) -> None:
        self._stage = stage
        if self.by == "movement":
            self._begun = {name: p.detach().clone() for name, p in self._parameters().items()}

    def gradients(self, backward: Backward) -> float:
        for name, parameter in self._masked():
            if parameter.grad is not None:  # clipping is not to count what will not move
                parameter.grad.mul_(self._free(name, parameter))
        return 0.0

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, parameter in self._masked():
            free = self._free(name, parameter)
            torch.where(free, parameter, self._kept[name], out=parameter.data)

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        masks = {}
        for name, parameter in self._parameters().items():
            value = parameter.detach()
            importance = (value - self._begun[name] if self.by == "movement" else value).abs()
            free = self._free(name, parameter)
            count = round(self.share * int(free.sum()))
            chosen = importance.masked_fill(~free, -1.0).flatten().topk(count).indices
            masks[name] = torch.ones_like(free).flatten().index_fill(0, chosen, False).view_as(free)
        self._begun = {}
        self.set_masks(masks)

    def parameters(self) -> Parameters:
        plain = super().parameters()
        frozen = sum(int((since != FREE).sum()) for since in self._since.values())
        return replace(plain, trained=plain.trained - frozen)

    def promised(self) -> Mapping[str, Tensor]:
        # More freeze later: what each stage has frozen is a promise of its own.
        return {
            f"{name} since stage {stage}": torch.where(self._since[name] == stage, parameter.detach(), 0.0)
            for name, parameter in self._masked()
            for stage in self._since[name].unique().tolist()
            if stage != FREE
        }

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "since": self._since, "kept": self._kept, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stage = state["stage"]
        for mine, name in ((self._since, "since"), (self._kept, "kept"), (self._begun, "begun")):
            mine.update({key: value.to(self.situation.device) for key, value in state[name].items()})

    def _free(self, name: str, parameter: nn.Parameter) -> Tensor:
        """True where a weight trains."""
        since = self._since.get(name)
        return torch.ones_like(parameter, dtype=torch.bool) if since is None else since == FREE

    def _masked(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of which something is frozen."""
        parameters = self._parameters()
        return ((name, parameters[name]) for name in self._since)

    def _parameters(self) -> dict[str, nn.Parameter]:
        # What another method has frozen since is held all the same.
        every = (self.situation.trained or self.situation.model).named_parameters()
        return {name: p for name, p in every if p.requires_grad or name in self._since}
