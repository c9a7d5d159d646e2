"""Operators: each changes a model's shape once, and most change nothing of what it computes.

>>> from cambia.growth import AddLayers, WidenFFN
"""

from __future__ import annotations

from cambia.growth.operators.operator import (
    OLD_AMOUNTS,
    OPERATORS,
    Amount,
    Contract,
    Operator,
    PartOperator,
    Shape,
    Step,
)

__all__ = ["OLD_AMOUNTS", "OPERATORS", "Amount", "Contract", "Operator", "PartOperator", "Shape", "Step"]
