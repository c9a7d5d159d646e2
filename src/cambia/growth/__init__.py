"""Growth: operators change a model's shape, triggers say when, rules bind them, `grow` does it.

>>> from cambia.growth import grow, WidenFFN
>>> event = grow(model, WidenFFN(factor=1.5), optimizer=optimizer)
"""

from __future__ import annotations

from cambia.growth.barrier import grow
from cambia.growth.operators import OPERATORS, AddLayers, Contract, Operator, WidenFFN
from cambia.growth.plan import GrowthPlan, plan_growth
from cambia.growth.rewarm import SliceWarmup
from cambia.growth.rules import GrowthManager, GrowthRule
from cambia.growth.triggers import TRIGGERS, PlateauTrigger, ScheduleTrigger, Trigger
from cambia.records import GrowthEvent, Measured, Signals

__all__ = [
    "OPERATORS",
    "TRIGGERS",
    "AddLayers",
    "Contract",
    "GrowthEvent",
    "GrowthManager",
    "GrowthPlan",
    "GrowthRule",
    "Measured",
    "Operator",
    "PlateauTrigger",
    "ScheduleTrigger",
    "Signals",
    "SliceWarmup",
    "Trigger",
    "WidenFFN",
    "grow",
    "plan_growth",
]
