"""How much replay earlier tasks need, told by how far they have drifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt

from cambia.continual.methods.method import Situation
from cambia.data.batches import IGNORED, Batch
from cambia.errors import ConfigError
from cambia.nn.modes import evaluating


@dataclass
class Drift:
    """Sets the share of replay from how much worse earlier rows have become since their task ended.

    Some rows of each task are kept with the loss that they had when it ended. Where the mean loss has risen
    beyond `target`, the share is raised in proportion, and lowered where it is below: a proportional
    controller on a logarithmic scale.
    """

    target: Annotated[float, Gt(0)] = 0.05
    """Nats per token that earlier rows may lose."""
    least: Annotated[float, Ge(0), Lt(1)] = 0.02
    """The share never falls below this."""
    most: Annotated[float, Gt(0), Lt(1)] = 0.5
    """The share never rises above this."""
    every_steps: Annotated[int, Gt(0)] = 25
    """Steps between measurements."""
    rows: Annotated[int, Gt(0)] = 4
    """Rows kept of each task."""
    gain: Annotated[float, Gt(0), Lt(1)] = 0.5
    """1 would follow each measurement at once."""

    def __post_init__(self) -> None:
        if self.least >= self.most:
            raise ConfigError(f"drift.least {self.least} is not below drift.most {self.most}")
        self.begin()

    def begin(self) -> None:
        """Remember nothing."""
        self._probes: list[Batch] = []
        self._losses: list[float] = []
        self._steps = 0
        self.extra_tokens = 0.0

    def keep(self, situation: Situation, probe: Batch) -> None:
        """Remember rows of a task that has just ended, and how well the model knows them."""
        self._losses.append(self._loss(situation, probe))
        self._probes.append(probe)

    def share(self, situation: Situation, now: float) -> float:
        """The share of replay from now on, measured anew once in a while."""
        self._steps += 1
        if not self._probes or self._steps % self.every_steps:
            return now
        drift = fmean(
            self._loss(situation, p) - was for p, was in zip(self._probes, self._losses, strict=True)
        )
        wanted = max(now, self.least, 1e-3) * (max(drift, 0.1 * self.target) / self.target) ** self.gain
        return min(max(wanted, self.least), self.most)

    def spent(self) -> float:
        """Tokens' worth of training steps since this was asked last."""
        extra, self.extra_tokens = self.extra_tokens, 0.0
        return extra

    @torch.no_grad()
    def _loss(self, situation: Situation, probe: Batch) -> float:
        model, targets = situation.model, probe.targets.to(situation.device)
        self.extra_tokens += targets.numel() / 3  # a forward pass is a third of a training step
        with evaluating(model), situation.autocast():
            logits = model(input_ids=probe.input_ids.to(situation.device), use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
        ).item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "losses": list(self._losses),
            "probes": [[p.input_ids, p.targets] for p in self._probes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._losses = state["steps"], list(state["losses"])
        self._probes = [Batch(inputs, targets, 0, "replay") for inputs, targets in state["probes"]]
