"""One optimizer step: forward, backward, clip, update; mixed precision, accumulation, compilation.

Between these a continual-learning method may add to the loss, change the gradient, and see to the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cambia.continual.methods import Method, Naive
from cambia.data.batches import IGNORED, Batch
from cambia.errors import NonFiniteLossError
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.training.settings import TrainingConfig


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step has measured."""

    loss: float
    """Mean negative log-likelihood of the batch's targets, nats per token, no penalty in it."""
    penalty: float
    """What a method added to it."""
    grad_norm: float
    """Global norm of the gradient, as the method left it, before clipping."""


class Stepper:
    """Trains a model on one batch at a time.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        config: precision, accumulation, clipping, compilation.
        method: what it does beside training on the batch; nothing by default.
        trained: the module that holds all that trains, where that is more than the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        method: Method | None = None,
        trained: nn.Module | None = None,
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.method = method or Naive()
        self.trained = trained or model
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "float16")
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.shape_changed()

    def shape_changed(self) -> None:
        """Take the model as it is now."""
        self.forward: Any = self.model
        self._skips_logits = isinstance(self.model, CambiaForCausalLM)
        if self.config.compile:
            torch.compiler.reset()
            self.forward = torch.compile(self.model)

    def __call__(self, batch: Batch) -> Stepped:
        """Train on a batch.

        Raises:
            NonFiniteLossError: the loss or the norm is not finite; nothing was updated.
        """
        loss, penalty = self._backward(batch, self.method)
        self.scaler.unscale_(self.optimizer)
        penalty += self.method.gradients(self._add_gradient)
        norm = torch.nn.utils.clip_grad_norm_(
            self.trained.parameters(), self.config.clip_norm or math.inf
        ).item()
        # With float16 an infinite gradient is the loss scaler's daily work: it leaves the step out itself.
        broken = not math.isfinite(loss + penalty) or (
            not math.isfinite(norm) and not self.scaler.is_enabled()
        )
        # Where a method added gradients of its own, the scaler has not seen whether they are finite.
        if not broken and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.method.stepped()
        self.scaler.update()
        self.trained.zero_grad(set_to_none=True)  # also what the optimizer does not hold, which was clipped
        if broken:
            raise NonFiniteLossError(f"loss {loss}, gradient norm {norm} on a batch of {batch.source}")
        return Stepped(loss, penalty, norm)

    def _backward(self, batch: Batch, method: Method | None) -> tuple[float, float]:
        """Add the gradient of a batch's loss, and of the method's penalty on its rows; returns both."""
        device = self.model.device
        needs_logits = method is not None and method.needs_logits
        extra = {"skip_logits": not needs_logits} if self._skips_logits else {}
        count = max(1, int((batch.targets != IGNORED).sum()))
        total = penalties = 0.0
        size = math.ceil(len(batch.input_ids) / self.config.accumulation)
        for first in range(0, len(batch.input_ids), size):
            rows = slice(first, min(first + size, len(batch.input_ids)))
            inputs = batch.input_ids[rows].to(device)  # (B / accumulation, T)
            targets = batch.targets[rows].to(device)
            with self.autocast():
                outputs = self.forward(
                    input_ids=inputs,
                    labels=targets,
                    shift_labels=targets,
                    num_items_in_batch=count,
                    use_cache=False,
                    **extra,
                )
            loss = outputs.loss
            total += loss.item()
            if method is not None and needs_logits:
                penalty = method.penalty(batch, rows, outputs.logits)
                if penalty is not None:
                    penalties += penalty.item()
                    loss = loss + penalty
            self.scaler.scale(loss).backward()
        return total, penalties

    @torch.enable_grad()
    def _add_gradient(self, batch: Batch) -> float:
        """Add a batch's gradient to gradients that are unscaled already; returns its loss."""
        kept = [(p, p.grad) for p in self.trained.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        loss, _ = self._backward(batch, None)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        for parameter, before in kept:
            if parameter.grad is not None and scale != 1.0:
                parameter.grad.div_(scale)
            if before is not None:
                parameter.grad = before if parameter.grad is None else parameter.grad.add_(before)
        return loss

    def autocast(self) -> torch.autocast:
        """The precision of training, as a context."""
        return autocast(self.config, self.model.device)


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """The precision of training, as a context."""
    dtype = torch.float16 if config.precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.precision != "float32")
