"""Whole models: the native one, the tables that say how any model can grow, and ways out.

    >>> from cambia.models import CambiaConfig, CambiaForCausalLM

Everything here is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "CambiaConfig": "cambia.models.config",
    "CambiaModel": "cambia.models.causal_lm",
    "CambiaForCausalLM": "cambia.models.causal_lm",
    "LoraExperts": "cambia.models.parts.lora_experts",
    "LoraShape": "cambia.models.parts.lora_shape",
    "Router": "cambia.models.routing.router",
    "Routes": "cambia.models.routing.routes",
    "to_llama": "cambia.models.export",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
