"""Sweeps: a grid of runs, taken to exactly one result per cell.

    >>> folder = run_grid({"base": "first_growth", "axes": {"training.steps": [100, 200]}, "seeds": 3})
    >>> load_sweep(folder).table("test_bits_per_byte")          # cambia.reporting

A grid has a base recipe, axes (any dotted setting, or named groups of settings), seeds and exclusions
(`cambia.sweeps.grid`). Cells run in a pool of processes or on Ray; whatever is killed is started again by the
same call, and several launchers may work on one folder (`cambia.sweepdir`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Cell": "cambia.sweeps.grid",
    "Grid": "cambia.sweeps.grid",
    "read_grid": "cambia.sweeps.grid",
    "cells_of": "cambia.sweeps.grid",
    "Limits": "cambia.sweeps.launch",
    "run_grid": "cambia.sweeps.launch",
    "Search": "cambia.sweeps.search",
}

__all__ = ["Cell", "Grid", "Limits", "Search", "cells_of", "read_grid", "run_grid"]

if TYPE_CHECKING:
    from cambia.sweeps.grid import Cell as Cell
    from cambia.sweeps.grid import Grid as Grid
    from cambia.sweeps.grid import cells_of as cells_of
    from cambia.sweeps.grid import read_grid as read_grid
    from cambia.sweeps.launch import Limits as Limits
    from cambia.sweeps.launch import run_grid as run_grid
    from cambia.sweeps.search import Search as Search


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.sweeps' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
