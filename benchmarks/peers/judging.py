"""What became of a checkpoint: exact, alive, stock; and whether clones part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peers.llama import adamw, relative_error, train

STEPS = 2


def judge(source: Path, grown: Path, *, stream: Iterator[Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """A grown checkpoint, opened by the stock class, against the one that it came from.

    Args:
        layers: places of new layers.
    """
    before = AutoModelForCausalLM.from_pretrained(source)
    after, loading = AutoModelForCausalLM.from_pretrained(grown, output_loading_info=True)
    result = {
        "class": type(after).__name__,
        "stock": type(after).__module__.startswith("transformers.") and not any(loading.values()),
        "parameters": after.num_parameters(),
        "weights_sha256": fingerprint(after),
        "logit_error": relative_error(before, after, next(stream)),
    }
    masks = new_entries(before, after, layers)
    if masks is not None:
        result["alive"] = alive(after, masks, stream)
    return result


def fingerprint(model: nn.Module) -> str:
    """The same for models with the same names and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def new_entries(before: nn.Module, after: nn.Module, layers: Sequence[int]) -> dict[str, Tensor] | None:
    """Which entries of each parameter are new; None where the old ones do not stand in a corner together."""
    old = {name: parameter.shape for name, parameter in before.named_parameters()}
    wider = {
        name for name, parameter in after.named_parameters() if name in old and parameter.shape != old[name]
    }
    if wider and layers:
        return None
    masks = {}
    for name, parameter in after.named_parameters():
        mask = torch.zeros(parameter.shape, dtype=torch.bool)
        place = re.match(r"model\.layers\.(\d+)\.", name)
        if place and int(place[1]) in layers:
            mask[:] = True
        elif name in wider:
            mask[:] = True
            mask[tuple(slice(size) for size in old[name])] = False
        if mask.any():
            masks[name] = mask
    return masks


def alive(model: nn.Module, new: dict[str, Tensor], stream: Iterator[Tensor]) -> float:
    """Share of new entries whose gradient is not zero after two steps of AdamW."""
    train(model, adamw(model), stream, STEPS)
    ids = next(stream)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    hit = total = 0
    for name, parameter in model.named_parameters():
        if name in new:
            assert parameter.grad is not None
            hit += int((parameter.grad[new[name]] != 0).sum())
            total += int(new[name].sum())
    return hit / total


class Clones:
    """Pairs of a new unit and the old one that it reads like, and how like they still are.

    Args:
        model: right after growth.
        size: units of a feed-forward layer before.
    """

    def __init__(self, model: nn.Module, size: int):
        self.size = size
        self.origin = []
        for rows in self._rows(model):
            likeness = rows[size:] @ rows[:size].T
            self.origin.append(likeness.argmax(dim=1))

    def likeness(self, model: nn.Module) -> float:
        """Mean cosine of what the two of a pair read with."""
        found = [
            (rows[self.size :] * rows[origin]).sum(dim=1)
            for rows, origin in zip(self._rows(model), self.origin, strict=True)
        ]
        return torch.cat(found).mean().item()

    @staticmethod
    @torch.no_grad()
    def _rows(model: nn.Module) -> list[Tensor]:
        """For each layer (F, 2 C): what each unit reads with, of length one."""
        weights = dict(model.named_parameters())
        gates = [name for name in weights if name.endswith("gate_proj.weight")]
        both = [torch.cat([weights[n], weights[n.replace("gate", "up")]], dim=1) for n in gates]
        return [nn.functional.normalize(rows, dim=1) for rows in both]
