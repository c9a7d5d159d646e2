"""What a side does in its process: load a checkpoint, grow it, save it, and say what became of it.

It prints one line of JSON: the seconds that growing took without loading and saving, and, where it was asked
to train a little before (`--with-optimizer`), what became of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

Operation = Callable[[PreTrainedModel, int, "torch.optim.Optimizer | None"], None]


def arguments(description: str, operations: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a side."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", choices=list(operations))
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--amount", type=int, required=True)
    parser.add_argument("--with-optimizer", action="store_true")
    return parser.parse_args()


def main(description: str, operations: Mapping[str, Operation]) -> None:
    """Do one operation to a live model."""
    options = arguments(description, operations)
    model = AutoModelForCausalLM.from_pretrained(options.source)
    result: dict[str, Any] = {}
    optimizer = None
    if options.with_optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(2):
            _step(model, optimizer)
    began = time.perf_counter()
    operations[options.operation](model, options.amount, optimizer)
    result["grow_seconds"] = time.perf_counter() - began
    if optimizer is not None:
        result["optimizer"] = fate(model, optimizer)
    model.save_pretrained(options.target)
    print(json.dumps(result))


def fate(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> str:
    """What growth made of an optimizer that trained the model before."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in model.parameters()):
        return "lost"
    try:
        _step(model, optimizer)
    except RuntimeError:
        return "fails"
    return "kept"


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(64)[None] % model.config.vocab_size
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
