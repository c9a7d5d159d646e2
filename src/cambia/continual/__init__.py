"""Continual learning: methods that keep what a model has learned while it learns more.

>>> from cambia.continual import CONTINUAL_METHODS, NoveltyDetector, ReplayBuffer
"""

from __future__ import annotations

from cambia.continual.methods import CONTINUAL_METHODS, Contract, Method, Methods
from cambia.continual.novelty import NoveltyDetector
from cambia.continual.two_phase import TwoPhaseLRScheduler
from cambia.data.replay import ReplayBuffer
from cambia.models.routing.hybrid import DynamicHybridRouter

__all__ = [
    "CONTINUAL_METHODS",
    "Contract",
    "DynamicHybridRouter",
    "Method",
    "Methods",
    "NoveltyDetector",
    "ReplayBuffer",
    "TwoPhaseLRScheduler",
]
