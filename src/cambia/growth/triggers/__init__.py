"""Triggers say when a model should grow.

>>> from cambia.growth import EfficiencyTrigger, PlateauTrigger
"""

from __future__ import annotations

from cambia.growth.triggers.trigger import (
    TRIGGERS,
    AllOf,
    AnyOf,
    Composite,
    Majority,
    Planned,
    ScheduleTrigger,
    Trigger,
)

__all__ = ["TRIGGERS", "AllOf", "AnyOf", "Composite", "Majority", "Planned", "ScheduleTrigger", "Trigger"]
