"""Decoding parameters as tensors that gradients move: on lines without ends, within their ranges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cambia.decoding.odds import RowParameters
from cambia.decoding.parameters import DecodingParameters

_FACTORS = ("temperature", "repetition_penalty")
"""Learned as logarithms."""
_RANGES = {
    "temperature": (0.05, 5.0),
    "top_p": (0.02, 0.993),  # from 1 nothing can move it
    "repetition_penalty": (0.5, 3.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""What a learned parameter may become; one that begins outside begins at the edge."""


class LearnedParameters:
    """Some decoding parameters as leaves of a graph, and the others as they are.

    Args:
        start: where they begin.
        names: those that are learned.
        held: those that are leaves beside them without a gradient: a head for each token moves them.
    """

    def __init__(self, start: DecodingParameters, names: Sequence[str], held: Sequence[str] = ()):
        self._start = start
        self.lines = {
            name: _line(name, float(getattr(start, name))).requires_grad_(name in names)
            for name in dict.fromkeys([*names, *held])
        }
        """Each on the line that it is learned on: a logarithm, the logit of top-p, or the number itself."""

    def tensors(self) -> list[Tensor]:
        """Those with a gradient."""
        return [line for line in self.lines.values() if line.requires_grad]

    def row_parameters(self, device: torch.device | str = "cpu") -> RowParameters:
        """As they are now, with gradients, on the device of the odds that they change."""
        values = {name: _value(name, line).to(device) for name, line in self.lines.items()}
        return replace(RowParameters.of(self._start), **values)

    @torch.no_grad()
    def stay_inside(self) -> None:
        """Put those that have left their range back to its edge, where a gradient can move them again."""
        for name, line in self.lines.items():
            low, high = _RANGES[name]
            line.clamp_(_line(name, low), _line(name, high))

    def values(self) -> dict[str, float]:
        """As they are now."""
        return {name: float(_value(name, line.detach())) for name, line in self.lines.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer remembers of each of its tensors, in their order, as files can hold it."""
    state = optimizer.state_dict()["state"]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return [copy.deepcopy(state.get(number, {})) for number in range(count)]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Sequence[Mapping[str, Any]]) -> None:
    """The inverse of `optimizer_state`, for an optimizer of the same tensors."""
    known = {number: dict(each) for number, each in enumerate(state) if each}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


def _line(name: str, value: float) -> Tensor:
    low, high = _RANGES[name]
    number = torch.tensor(min(high, max(low, value)))
    if name == "top_p":
        return torch.logit(number)
    return number.log() if name in _FACTORS else number


def _value(name: str, line: Tensor) -> Tensor:
    """The inverse."""
    if name in _FACTORS:
        return line.exp()
    return torch.sigmoid(line) if name == "top_p" else line.clone()
