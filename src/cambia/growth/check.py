"""What a model says to a fixed batch, right before a growth and right after."""

# B rows, T tokens, V vocabulary

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.nn.modes import evaluating


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """(B, T, V), without dropout."""
    # Compiling for this batch would not pay; and accelerate puts a forward pass in half precision before the
    # model's own, while growth is verified in the precision of the weights.
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    eagerly = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    wrapped = vars(model).pop("forward", None)
    try:
        with evaluating(model), eagerly:
            return model(input_ids=batch.to(model.device), use_cache=False).logits
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped


def relative_error(before: Tensor, after: Tensor) -> float:
    """The largest difference of a logit as a share of the largest logit."""
    # Tokens that a native model hides have a logit of minus infinity before and after.
    difference = (after - before).masked_fill_(after == before, 0.0)
    scale = before.masked_fill(before.isinf(), 0.0).abs().max().item()
    return difference.abs().max().item() / (scale or 1.0)


def check_loss(logits: Tensor, batch: Tensor) -> float:
    """Mean negative log-likelihood of the check batch, nats per token."""
    flat = logits[:, :-1].flatten(0, 1).float()  # (B (T - 1), V)
    return nn.functional.cross_entropy(flat, batch[:, 1:].flatten().to(flat.device)).item()
