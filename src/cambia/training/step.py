"""One optimizer step: forward, backward, clip, update; mixed precision, accumulation, compilation."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from cambia.data.batches import IGNORED, Batch
from cambia.errors import NonFiniteLossError
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.training.settings import TrainingConfig


class Stepper:
    """Trains a model on one batch at a time.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        config: precision, accumulation, clipping, compilation.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, config: TrainingConfig):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "float16")
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.shape_changed()

    def shape_changed(self) -> None:
        """Take the model as it is now."""
        self.forward: Any = self.model
        self._extra = {"skip_logits": True} if isinstance(self.model, CambiaForCausalLM) else {}
        if self.config.compile:
            torch.compiler.reset()
            self.forward = torch.compile(self.model)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        """Train on a batch.

        Returns:
            The mean loss (nats per token) and the global gradient norm before clipping.

        Raises:
            NonFiniteLossError: the loss or the norm is not finite; nothing was updated.
        """
        device = self.model.device
        count = int((batch.targets != IGNORED).sum())
        total = 0.0
        rows = math.ceil(len(batch.input_ids) / self.config.accumulation)
        for first in range(0, len(batch.input_ids), rows):
            inputs = batch.input_ids[first : first + rows].to(device)  # (B / accumulation, T)
            targets = batch.targets[first : first + rows].to(device)
            with self.autocast():
                loss = self.forward(
                    input_ids=inputs,
                    labels=targets,
                    shift_labels=targets,
                    num_items_in_batch=count,
                    use_cache=False,
                    **self._extra,
                ).loss
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.clip_norm or math.inf
        ).item()
        # With float16 an infinite gradient is the loss scaler's daily work: it leaves the step out itself.
        broken = not math.isfinite(total) or (not math.isfinite(norm) and not self.scaler.is_enabled())
        if not broken:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if broken:
            raise NonFiniteLossError(f"loss {total}, gradient norm {norm} on a batch of {batch.source}")
        return total, norm

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.precision == "float16" else torch.bfloat16
        return torch.autocast(self.model.device.type, dtype, enabled=self.config.precision != "float32")
