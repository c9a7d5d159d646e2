"""Learning without forgetting: the model before the task teaches the model that learns it."""

# B batch (rows), T time, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cambia.continual.methods.method import Contract, Method, Situation
from cambia.data.batches import IGNORED, Batch

HIDDEN = -1e4
"""In place of the logit of a token that is never predicted: of minus infinity the divergence is no number."""
_NO_SHAPE = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass
class LwF(Method):
    """Learning without forgetting (Li & Hoiem 2017, https://arxiv.org/abs/1606.09282).

    On the new task's own text the model is held to what it said before the task: the divergence from a frozen
    copy is added to the loss.
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True)

    strength: Annotated[float, Ge(0)] = 1.0
    """Of the divergence, in nats per token, beside the loss."""
    temperature: Annotated[float, Gt(0)] = 2.0
    """Both distributions are flattened by this (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""
    from_start: bool = False
    """Keep to the model as it was at the start as well: for one that has learned already."""

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._teacher: PreTrainedModel | None = None

    def begin_stage(self, stage: int) -> None:
        if self.strength and (stage or self.from_start):
            model = self.situation.model
            self._teacher = self._made(model.config, self.situation.weights() or model.state_dict())

    @property
    def needs_logits(self) -> bool:
        return self._teacher is not None

    def penalty(self, batch: Batch, rows: slice, logits: Tensor) -> Tensor | None:
        assert self._teacher is not None
        inputs = batch.input_ids[rows].to(logits.device)
        self.extra_tokens += inputs.numel() / 3  # a forward pass is a third of a training step
        with torch.no_grad(), self.situation.autocast():
            said = self._teacher(input_ids=inputs, use_cache=False).logits  # (B, T, V)
        counted = (batch.targets != IGNORED).to(logits.device)
        student, teacher = (
            nn.functional.log_softmax(x[counted[rows]].float().clamp(min=HIDDEN) / self.temperature, -1)
            for x in (logits, said)
        )
        away = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return self.strength * self.temperature**2 * away / counted.sum()

    def state_dict(self) -> dict[str, Any]:
        if self._teacher is None:
            return {}
        # With its config, since the model may have grown meanwhile; without what saving and loading add.
        config = {k: v for k, v in self._teacher.config.to_dict().items() if k not in _NO_SHAPE}
        return {"config": config, "weights": self._teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._teacher = None
        if state:
            config = type(self.situation.model.config).from_dict(state["config"])
            self._teacher = self._made(config, state["weights"])

    def _made(self, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """A frozen model of its own: a copy would keep hooks, and an adapter that goes on training."""
        model = self.situation.model
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn and thrown away
            teacher = type(model)(config)
        teacher.load_state_dict(weights)
        return teacher.to(model.device, model.dtype).eval().requires_grad_(False)
