"""Continual-learning methods, by name.

>>> method = EWC(strength=100.0)
>>> Trainer(model, method=method).train(stream)
"""

from __future__ import annotations

from cambia.continual.methods.method import Contract, Method, Naive, Parameters, Situation
from cambia.continual.methods.registry import CONTINUAL_METHODS
from cambia.continual.methods.together import Methods, refuse

__all__ = ["CONTINUAL_METHODS", "Contract", "Method", "Methods", "Naive", "Parameters", "Situation", "refuse"]
