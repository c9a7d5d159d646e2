"""Nested states as files hold them: the tensors on one side, all the rest as JSON on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR, _FLOAT = "__tensor__", "__float__"


def take_out_tensors(state: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested dictionaries and lists without their tensors, which are put into `tensors` by their place."""
    return _taken_out(state, "", tensors)


def _taken_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}  # JSON has no word for it
    if isinstance(value, Mapping):
        return {
            str(key): _taken_out(item, f"{path}/{_escaped(str(key))}", tensors) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_taken_out(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _escaped(key: str) -> str:
    """A key as one part of a path (JSON Pointer, RFC 6901), so that no two places share a name."""
    return key.replace("~", "~0").replace("/", "~1")


def put_in_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `take_out_tensors`."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]].clone()  # aligned, as `align_memory` says
        if _FLOAT in value:
            return float(value[_FLOAT])
        return {key: put_in_tensors(item, tensors) for key, item in value.items()}
    return [put_in_tensors(item, tensors) for item in value] if isinstance(value, list) else value
