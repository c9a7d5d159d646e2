"""Hashes of tensors and of whole models: whether something is what it was, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def sha256(tensor: Tensor) -> str:
    """The hash of a tensor: its type, its shape and its bytes; of a quantised one, those of its tensors."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        inside = {name: getattr(tensor, name) for name in flatten()[0]}
        return hashlib.sha256(f"{type(tensor).__name__} {fingerprint(inside)}".encode()).hexdigest()
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(tensors: nn.Module | Mapping[str, Tensor]) -> str:
    """One hash of many tensors and their names, or of a module's parameters; tied ones count once."""
    named = dict(tensors.named_parameters()) if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.sha256()
    for name in sorted(named):
        digest.update(f"{name} {sha256(named[name])} ".encode())
    return digest.hexdigest()
