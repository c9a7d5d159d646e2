"""What an optimizer remembers goes along when its parameters grow.

Moments of old entries are kept bit by bit (or divided where growth multiplied the weight). New entries
start with a first moment of zero. Their second moment is the mean of the old ones by default: with a
zero there and a large step count Adam has no bias correction left, and the first updates would be many
times larger than the learning rate says (up to 6.6 times for a steady gradient, measured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Holder(Protocol):
    """Something that keeps state per parameter: an optimizer, averaged weights, a Fisher matrix."""

    def prepare(self, changes: Sequence[Change]) -> Callable[[], None]:
        """Build the new state beside the old and return what puts it in place.

        All that can fail happens here; the returned call only assigns.
        """
        ...


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

    def prepare(self, changes: Sequence[Change]) -> Callable[[], None]:
        """Build the grown state; the returned call puts it in place.

        Raises:
            GrowthError: the optimizer lacks a parameter that grows, or keeps a state of unknown kind.
        """
        managed = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        grown: list[tuple[Change, dict[str, Any]]] = []
        for change in changes:
            if change.sibling.requires_grad and id(change.sibling) not in managed:
                raise GrowthError(
                    f"the optimizer does not train {change.name!r} or what it grows from: build it with all "
                    "of model.parameters(), or freeze that parameter (requires_grad=False)"
                )
            if change.old is not None:
                grown.append((change, self._grown_state(change)))
        return lambda: self._commit(changes, grown)

    def _grown_state(self, change: Change) -> dict[str, Any]:
        assert change.old is not None
        if self.moments == "reset":
            return {}
        result: dict[str, Any] = {}
        for key, value in self.optimizer.state.get(change.old, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                result[key] = value  # the step count
                continue
            if key not in STATE_POWERS or value.shape != change.old.shape:
                raise GrowthError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(change.old.shape)} and how that grows is not known; known, "
                    f"in the parameter's own shape, are {', '.join(STATE_POWERS)}: use AdamW or SGD"
                )
            power = STATE_POWERS[key]
            seeded = power == -2 and self.moments == "mean"
            new = value.mean().item() if seeded else 0.0
            result[key] = change.lineage.carry(value, power=power, new=new)
        return result

    def _commit(self, changes: Sequence[Change], grown: Sequence[tuple[Change, dict[str, Any]]]) -> None:
        replaced = {id(change.old): change.new for change in changes if change.old is not None}
        for group in self.optimizer.param_groups:
            here = {id(p) for p in group["params"]}
            born = [c.new for c in changes if c.old is None and id(c.sibling) in here]
            group["params"] = [replaced.get(id(p), p) for p in group["params"]] + born
        for change, state in grown:
            assert change.old is not None
            self.optimizer.state.pop(change.old, None)
            if state:
                self.optimizer.state[change.new] = state
