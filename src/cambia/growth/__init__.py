"""Growth: operators change a model's shape, triggers say when, rules bind them, `grow` does it.

>>> from cambia.growth import grow, WidenFFN
>>> event = grow(model, WidenFFN(factor=1.5), optimizer=optimizer)
"""

from __future__ import annotations

from cambia.growth.barrier import grow
from cambia.growth.depth import AddLayers
from cambia.growth.operators import OPERATORS, Contract, Operator
from cambia.growth.plan import GrowthPlan, plan_growth
from cambia.growth.prune import prune
from cambia.growth.rewarm import SliceWarmup
from cambia.growth.rules import Budget, GrowthManager, GrowthRule
from cambia.growth.triggers import TRIGGERS, AllOf, AnyOf, Majority, ScheduleTrigger, Trigger
from cambia.growth.watching import (
    GradientNormTrigger,
    LossSpikeTrigger,
    PerplexityTrigger,
    PlateauTrigger,
    SliceSpikeTrigger,
)
from cambia.growth.widen import WidenFFN
from cambia.records import GrowthEvent, Measured, Signals

__all__ = [
    "OPERATORS",
    "TRIGGERS",
    "AddLayers",
    "AllOf",
    "AnyOf",
    "Budget",
    "Contract",
    "GradientNormTrigger",
    "GrowthEvent",
    "GrowthManager",
    "GrowthPlan",
    "GrowthRule",
    "LossSpikeTrigger",
    "Majority",
    "Measured",
    "Operator",
    "PerplexityTrigger",
    "PlateauTrigger",
    "ScheduleTrigger",
    "Signals",
    "SliceSpikeTrigger",
    "SliceWarmup",
    "Trigger",
    "WidenFFN",
    "grow",
    "plan_growth",
    "prune",
]
