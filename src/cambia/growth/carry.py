"""What an optimizer remembers goes along when its parameters grow.

Moments of old entries are kept bit by bit (or divided where growth multiplied the weight). New entries
start with a first moment of zero. Their second moment is the mean of the old ones by default: with a
zero there and a large step count Adam has no bias correction left, and the first updates would be many
times larger than the learning rate says (up to 6.6 times for a steady gradient, measured).

Tensors are exchanged one after another, and each old one is let go of before the next new one is made, so
that growing takes hardly more memory than the grown model does. Should anything fail, the old ones are read
back from the new (`let_go`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cambia.errors import GrowthError
from cambia.nn.param_map import Lineage

STATE_POWERS = {
    "exp_avg": -1,  # Adam's first moment
    "momentum_buffer": -1,  # SGD, Muon
    "exp_avg_sq": -2,  # Adam's second moment
    "max_exp_avg_sq": -2,  # its maximum, with amsgrad
}
"""How a state behaves when the weight is multiplied by c: it is multiplied by c to this power."""


Moments = Literal["mean", "zero", "reset"]
"""What becomes of an optimizer's state when parameters grow."""


@dataclass(frozen=True, eq=False)
class Change:
    """One parameter of the grown model that is not simply the old one."""

    name: str
    lineage: Lineage
    new: nn.Parameter
    source: nn.Parameter | None
    """The old parameter whose values it takes; None where all are new."""
    sibling: nn.Parameter
    """The old parameter that it is trained like."""
    seed: int
    """Of its random values: `lineage.values(..., seed=seed)` draws the same again."""

    @property
    def old(self) -> nn.Parameter | None:
        """The parameter it replaces; None if it is a new one, or a copy."""
        return self.source if self.lineage.inherits else None


Undo = ExitStack
"""What takes a growth back, last first; forgotten when it succeeds."""

Commit = Callable[[Undo], None]


class Holder(Protocol):
    """Something that keeps state per parameter: an optimizer, averaged weights, a Fisher matrix."""

    def prepare(self, changes: Sequence[Change]) -> Commit:
        """Look at what is about to change, before anything is touched, and refuse it or take part.

        The parameters in `changes` have their shapes but no values yet. The returned call is made when all
        of them stand in the model and it says what it said before. It exchanges the state, and tells `undo`
        how to take that back.
        """
        ...


def husk(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of the same type and shape, or of another shape, that takes no memory."""
    return like.new_zeros(()).expand(like.shape if shape is None else tuple(shape))


def let_go(old: Tensor, new: Tensor, lineage: Lineage, undo: Undo, *, power: int = 1) -> None:
    """Free an old tensor whose values the new one holds; `undo` reads them back from there.

    Where growth multiplies old values they could not be read back bit by bit. Then the old tensor stays in
    memory until the whole growth has succeeded.
    """
    if lineage.is_reversible(old.shape, power=power):
        undo.callback(lambda: setattr(old, "data", lineage.take_back(new.detach())))
        old.data = husk(old.detach())


class OptimizerHolder:
    """Hands an optimizer's state over to grown parameters, and gives new ones a place in its groups.

    Works inside the existing parameter groups: `add_param_group` would break learning-rate schedulers.

    Args:
        optimizer: any whose per-element state is named in `STATE_POWERS`.
        moments: "mean" and "zero" keep what is known of old entries, and second moments of new ones start
            with the mean of the old, or with zero; "reset" forgets all of a parameter that grows.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, moments: Moments = "mean"):
        self.optimizer = optimizer
        self.moments = moments

    def prepare(self, changes: Sequence[Change]) -> Commit:
        """Check that all of the state can grow.

        Raises:
            GrowthError: the optimizer lacks a parameter that grows, or keeps a state of unknown kind.
        """
        managed = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for change in changes:
            if change.sibling.requires_grad and id(change.sibling) not in managed:
                raise GrowthError(
                    f"the optimizer does not train {change.name!r} or what it grows from: build it with all "
                    "of model.parameters(), or freeze that parameter (requires_grad=False)"
                )
            if change.old is not None and self.moments != "reset":
                self._check(change.old)
        return lambda undo: self._commit(changes, undo)

    def _check(self, old: nn.Parameter) -> None:
        for key, value in self.optimizer.state.get(old, {}).items():
            if _is_per_element(value) and (key not in STATE_POWERS or value.shape != old.shape):
                raise GrowthError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(old.shape)} and how that grows is not known; known, "
                    f"in the parameter's own shape, are {', '.join(STATE_POWERS)}: use AdamW or SGD"
                )

    def _commit(self, changes: Sequence[Change], undo: Undo) -> None:
        replaced = {id(change.old): change.new for change in changes if change.old is not None}
        for group in self.optimizer.param_groups:
            here = {id(p) for p in group["params"]}
            born = [c.new for c in changes if c.old is None and id(c.sibling) in here]
            undo.callback(group.__setitem__, "params", group["params"])
            group["params"] = [replaced.get(id(p), p) for p in group["params"]] + born
        order = dict(self.optimizer.state)
        undo.callback(self._put_back, order)
        for change in changes:
            if change.old is not None:
                self._exchange(change, undo)

    def _exchange(self, change: Change, undo: Undo) -> None:
        """Move one parameter's state to the parameter that takes its place."""
        states = self.optimizer.state
        old = states.pop(change.old, None)
        if not old or self.moments == "reset":
            return
        grown: dict[str, Any] = {}
        for key, value in old.items():
            if not _is_per_element(value):
                grown[key] = value  # the step count
                continue
            power = STATE_POWERS[key]
            seeded = power == -2 and self.moments == "mean"
            new = value.mean().item() if seeded else 0.0
            grown[key] = change.lineage.carry(value, power=power, new=new)
            let_go(value, grown[key], change.lineage, undo, power=power)
        states[change.new] = grown

    def _put_back(self, states: dict[Any, Any]) -> None:
        self.optimizer.state.clear()
        self.optimizer.state.update(states)


def in_model_order(optimizer: torch.optim.Optimizer, model: nn.Module, changes: Sequence[Change]) -> None:
    """Put new parameters where the model lists them, in groups that are in the model's order.

    A state dict of an optimizer knows parameters by their place in the groups. An optimizer that is built for
    the grown model when it is loaded again has them in the model's order.
    """
    place = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    born = {id(change.new) for change in changes if change.old is None}
    for group in optimizer.param_groups:
        kept = [place.get(id(parameter), -1) for parameter in group["params"] if id(parameter) not in born]
        if kept == sorted(kept):  # otherwise it is somebody's own order, which nobody could guess
            group["params"] = sorted(group["params"], key=lambda parameter: place.get(id(parameter), -1))


def _is_per_element(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
