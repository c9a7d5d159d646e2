"""Continual learning: methods that keep what a model has learned while it learns more.

>>> from cambia.continual import CONTINUAL_METHODS, ReplayBuffer
"""

from __future__ import annotations

from cambia.continual.methods import CONTINUAL_METHODS, Contract, Method, Methods
from cambia.data.replay import ReplayBuffer

__all__ = ["CONTINUAL_METHODS", "Contract", "Method", "Methods", "ReplayBuffer"]
