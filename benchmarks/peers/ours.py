"""Cambia's side, on a live model.

python -m peers.ours widen_ffn CHECKPOINT GROWN --amount 43
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from cambia.growth import (
    AddKVHeads,
    AddLayers,
    AddTokens,
    Operator,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    grow,
)
from peers.process import Operation, main


def everything(amount: int) -> Sequence[Operator]:
    """All dimensions of a Llama at once; `amount` is the number of new layers."""
    return [
        WidenHidden(factor=1.5),
        AddKVHeads(factor=1.5),
        WidenHeadDim(factor=2),
        WidenFFN(factor=1.5),
        AddLayers(add=amount),
        AddTokens(add=64),
    ]


OPERATORS: dict[str, Callable[[int], Sequence[Operator]]] = {
    "widen_ffn": lambda amount: [WidenFFN(add=amount)],
    "split_ffn": lambda amount: [WidenFFN(add=amount, initial="split")],
    "add_layers": lambda amount: [AddLayers(add=amount)],
    "copy_layers": lambda amount: [AddLayers(add=amount, preserve=False)],
    "add_tokens": lambda amount: [AddTokens(add=amount)],
    "everything": everything,
}


def operation(name: str) -> Operation:
    """Grow a live model, with its optimizer if there is one."""

    def grown(model: PreTrainedModel, amount: int, optimizer: torch.optim.Optimizer | None) -> None:
        grow(model, *OPERATORS[name](amount), optimizer=optimizer)

    return grown


if __name__ == "__main__":
    main(__doc__ or "", {name: operation(name) for name in OPERATORS})
