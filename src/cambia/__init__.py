"""Cambia: language models that keep growing.

    >>> import cambia
    >>> run = cambia.run("first_growth")        # trains, grows, scores; returns the run directory
    >>> model = cambia.load(run)                # the model of a run or of a checkpoint folder

Everything here is imported when it is first used, so that `import cambia` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "run": "cambia.reporting.entry",
    "load": "cambia.experiment",
    "CambiaConfig": "cambia.models.config",
    "CambiaForCausalLM": "cambia.models.causal_lm",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from cambia.experiment import load as load
    from cambia.models.causal_lm import CambiaForCausalLM as CambiaForCausalLM
    from cambia.models.config import CambiaConfig as CambiaConfig


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
