"""PEFT's own ways to mix adapters, on the same experts as stock adapters: Arrow and X-LoRA.

Both decide token by token. Arrow is free of training. The gate of X-LoRA (Buehler and Buehler 2024, X-LoRA:
Mixture of Low-Rank Adapter Experts, https://arxiv.org/abs/2402.07148) is trained, here on text of all domains
at once, which a stream does not offer.
"""

# B batch (rows), T time

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn

from cambia.models import LoraExperts
from cambia.nn.routed import bare_copy


def written(experts: LoraExperts, folder: Path) -> list[Path]:
    """All experts as adapters of PEFT, each in a folder of its own."""
    return [experts.to_peft(name, folder / name) for name in experts.names]


def arrow(experts: LoraExperts, adapters: Sequence[Path], *, top_k: int) -> nn.Module:
    """`create_arrow_model`; each token goes through so many adapters."""
    config = ArrowConfig(top_k=top_k, router_temperature=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_arrow_model(bare_copy(experts.model), [str(path) for path in adapters], config).eval()


def xlora(
    experts: LoraExperts, adapters: Sequence[Path], batches: Iterable[Tensor], *, rate: float
) -> tuple[nn.Module, list[float]]:
    """X-LoRA with its default gate, a linear layer, trained by AdamW; and the loss of each step.

    Args:
        batches: ids (B, T).
    """
    base = bare_copy(experts.model)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(i): str(path) for i, path in enumerate(adapters)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    gate = [parameter for name, parameter in model.named_parameters() if "xlora_classifier" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in gate:
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(gate, lr=rate), []
    model.train()
    for ids in batches:
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses
