"""Building blocks: modules know how (to compute, to be widened), and nothing above them.

    >>> from cambia.nn import ExpandableFFN
    >>> ffn = ExpandableFFN(hidden_size=256, intermediate_size=768)

Everything here is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "CausalAttention": "cambia.nn.attention",
    "ExpandableFFN": "cambia.nn.ffn",
    "RMSNorm": "cambia.nn.fused",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.nn' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
