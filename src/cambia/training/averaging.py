"""A moving average of a model's weights, which grows with the model.

The average often scores better than the weights it follows, above all while their learning rate is high
(Polyak and Juditsky 1992). It is a holder of state per parameter like an optimizer: growth maps it as it
maps the weights, so that the averaged model, too, says the same before and after.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cambia.errors import CheckpointError
from cambia.growth.carry import Change, Commit, Undo, let_go


class WeightAverage:
    """Keeps average = decay x average + (1 - decay) x weight for every parameter.

        average = WeightAverage(model, decay=0.999)
        manager = GrowthManager(rules, model=model, optimizer=optimizer, holders=[average])
        ...                              # optimizer.step(), then
        average.update()
        with average.applied():
            ...                          # the model has its averaged weights here

    Args:
        model: whose weights are followed; the average starts as a copy of them.
        decay: how much of the average stays at each update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self._mix = get_ema_multi_avg_fn(decay)
        self._averages: dict[nn.Parameter, Tensor] = {p: p.detach().clone() for p in model.parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average, after an optimizer step."""
        self._mix(list(self._averages.values()), [p.detach() for p in self._averages], 0)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model has its averaged weights inside the block, and the trained ones again after it."""
        trained = {parameter: parameter.data for parameter in self._averages}
        try:
            for parameter, average in self._averages.items():
                parameter.data = average
            yield
        finally:
            for parameter, data in trained.items():
                parameter.data = data

    def prepare(self, changes: Sequence[Change]) -> Commit:
        """Grow the average as the weights grow."""
        return lambda undo: self._commit(changes, undo)

    def _commit(self, changes: Sequence[Change], undo: Undo) -> None:
        before = self._averages
        undo.callback(setattr, self, "_averages", before)
        grown: dict[nn.Parameter, Tensor] = {}
        for change in changes:
            old = None if change.source is None else before[change.source]
            value = change.lineage.values(old, seed=change.seed)
            grown[change.new] = value.to(change.new.device, change.new.dtype)
            if old is not None and change.old is not None:
                let_go(old, grown[change.new], change.lineage, undo)
        # The model has its new parameters by now: what it lacks has gone.
        self._averages = {p: grown[p] if p in grown else before[p] for p in self.model.parameters()}

    def state_dict(self) -> dict[str, Any]:
        """The averages by the names of their parameters."""
        return {name: self._averages[p] for name, p in self.model.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with averages of the same model.

        Raises:
            CheckpointError: they are of a model of another shape.
        """
        for name, parameter in self.model.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                raise CheckpointError(f"the checkpoint holds no average of {name!r} in the model's shape")
        self._averages = {p: state[name].to(p.device, p.dtype) for name, p in self.model.named_parameters()}
