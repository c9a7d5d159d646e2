"""Newborn slices start slowly: their own learning-rate warm-up, inside parameters that train at full rate.

New units are random or zero while everything around them is in tune, so for some steps after their
birth they move at a rising fraction of the learning rate and are not decayed; decay would only shrink
readers that nobody hears yet. The old entries beside them train on unchanged. (SPARKLING,
arXiv:2602.02472, re-warms the new part alone.)

They may also keep a rate of their own for good (`factor`).

Silent copies of layers that are faded in come up to what their originals write: each step of the warm-up adds
an equal part of the original's weights, as they are at that step, to what the copy learns by itself.

It works through two hooks of the optimizer, so it works in anybody's loop: before a step the newborn
entries are put aside, after it they are moved only part of the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cambia.errors import GrowthError
from cambia.growth.carry import Change, Commit, Holder, Undo
from cambia.growth.plan import GrowthPlan


@dataclass(eq=False)
class _Newborn:
    """The entries of one parameter that were born at one growth event."""

    parameter: nn.Parameter
    index: Tensor | None
    """Flat positions of the new entries; None means all of them."""
    age: int = 0
    """Optimizer steps since birth."""
    original: nn.Parameter | None = None
    """What it is faded in from: all of its entries come up to those of this one."""
    fade_in: float = 0.0
    """The share of the original's values that it comes up to."""
    aside: Tensor | None = None

    def entries(self) -> Tensor:
        flat = self.parameter.detach().view(-1)
        return flat.clone() if self.index is None else flat[self.index]

    def of_original(self) -> Tensor:
        """The original's values in the place of these entries."""
        assert self.original is not None
        flat = self.original.detach().reshape(-1)
        return flat if self.index is None else flat[self.index]


class SliceWarmup:
    """Warms up the learning rate of whatever growth adds to an optimizer's parameters.

    Pass it to `grow` among the `holders`; it then follows its slices through later growth as well.

    Args:
        optimizer: the optimizer to hook into.
        steps: optimizer steps until newborn entries move at their full rate; 0 is at once.
        factor: what their full rate is, as a multiple of that of the entries beside them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, steps: int, factor: float = 1.0):
        self.optimizer = optimizer
        self.steps = steps
        self.factor = factor
        self.newborns: list[_Newborn] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._put_aside()),
            optimizer.register_step_post_hook(lambda *_: self._hold_back()),
        ]

    def remove(self) -> None:
        """Take the hooks out of the optimizer; newborn entries then move at the rate of the others."""
        for hook in self._hooks:
            hook.remove()

    def prepare(self, changes: Sequence[Change]) -> Commit:
        """Follow the slices that are warming up and add the new ones."""
        if not self.steps and self.factor == 1.0:
            return lambda undo: None
        by_old = {id(change.old): change for change in changes if change.old is not None}
        grown = {old: change.new for old, change in by_old.items()}
        followed = [self._followed(newborn, by_old.get(id(newborn.parameter))) for newborn in self.newborns]
        born = []
        for change in changes:
            reference = change.new if change.old is None else change.old
            mask = change.lineage.new_mask(reference.detach()).expand(change.new.shape)
            if bool(mask.any()):
                original = change.sibling if change.lineage.fade_in else None
                one = _Newborn(change.new, _positions(mask), 0, original, change.lineage.fade_in)
                born.append(one)
        everyone = followed + born
        for newborn in everyone:
            newborn.original = grown.get(id(newborn.original), newborn.original)
            # Growth that made only one of the two larger parts them.
            if newborn.original is not None and newborn.original.shape != newborn.parameter.shape:
                newborn.original = None
        return lambda undo: self._commit(everyone, undo)

    def _commit(self, newborns: list[_Newborn], undo: Undo) -> None:
        undo.callback(setattr, self, "newborns", self.newborns)
        self.newborns = newborns

    def _followed(self, newborn: _Newborn, change: Change | None) -> _Newborn:
        if change is None:
            return replace(newborn)
        assert change.old is not None
        mask = torch.zeros_like(change.old.detach(), dtype=torch.float32)
        if newborn.index is None:
            mask.fill_(1.0)
        else:
            mask.view(-1)[newborn.index] = 1.0
        carried = change.lineage.carry(mask, power=0).bool()
        return replace(newborn, parameter=change.new, index=_positions(carried))

    @torch.no_grad()
    def _put_aside(self) -> None:
        for newborn in self.newborns:
            newborn.aside = newborn.entries()

    @torch.no_grad()
    def _hold_back(self) -> None:
        # A loss scaler tells a fused optimizer to leave a step out by this attribute: then nobody moved.
        found_inf = vars(self.optimizer).get("found_inf")
        if found_inf is not None and bool(found_inf):
            return
        decay = self._decay_by_parameter()
        for newborn in self.newborns:
            assert newborn.aside is not None
            warming = newborn.age < self.steps
            share = self.factor * ((newborn.age + 1) / (self.steps + 1) if warming else 1.0)
            moved = newborn.entries() - newborn.aside
            if warming:  # the decay is taken back
                moved += newborn.aside * decay.get(id(newborn.parameter), 0.0)
            kept = newborn.aside.add_(moved, alpha=share)
            if warming and newborn.original is not None and newborn.parameter.requires_grad:
                kept.add_(newborn.of_original(), alpha=newborn.fade_in / self.steps)
            flat = newborn.parameter.detach().view(-1)
            if newborn.index is None:
                flat.copy_(kept)
            else:
                flat[newborn.index] = kept
            newborn.aside = None
            newborn.age += 1
        if self.factor == 1.0:
            self.newborns = [newborn for newborn in self.newborns if newborn.age < self.steps]

    def _decay_by_parameter(self) -> dict[int, float]:
        """The share of a weight that one step's decoupled weight decay takes away, by parameter."""
        if not self.newborns:
            return {}
        return {
            id(parameter): float(group["lr"]) * float(group["weight_decay"])
            for group in self.optimizer.param_groups
            if group.get("decoupled_weight_decay")  # AdamW and Muon say so
            for parameter in group["params"]
            if parameter.grad is not None  # the others are left alone
        }

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Slices by the name of their parameter, so that a rebuilt model can take them up."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Where an earlier, smaller model was taken up again, some are gone.
        here = [newborn for newborn in self.newborns if id(newborn.parameter) in names]
        return {
            "newborns": [
                {
                    "name": names[id(n.parameter)],
                    "age": n.age,
                    "index": n.index,
                    "original": names.get(id(n.original)),
                    "fade_in": n.fade_in,
                }
                for n in here
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self.newborns = [
            _Newborn(
                parameters[item["name"]],
                None if item["index"] is None else item["index"].to(parameters[item["name"]].device),
                item["age"],
                parameters[item["original"]] if item.get("original") else None,
                item.get("fade_in", 0.0),
            )
            for item in state["newborns"]
        ]


def refuse_unwarmed(plan: GrowthPlan, holders: Sequence[Holder]) -> None:
    """Refuse a growth that fades layers in where nothing warms them up.

    Raises:
        GrowthError: saying what to give.
    """
    if plan.fades_in and not any(isinstance(each, SliceWarmup) and each.steps for each in holders):
        raise GrowthError(
            "fade_in brings new layers in while they warm up: give rewarm_steps above 0, or to grow() a "
            "SliceWarmup among its holders"
        )


def _positions(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
