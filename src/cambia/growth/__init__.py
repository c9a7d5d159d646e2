"""Growth: operators change a model's shape, triggers say when, rules bind them, `grow` does it.

>>> from cambia.growth import grow, WidenFFN
>>> event = grow(model, WidenFFN(factor=1.5), optimizer=optimizer)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cambia.growth.barrier import grow
from cambia.growth.operators import OPERATORS, Contract, Operator
from cambia.growth.operators.adapters import WidenLoraRank
from cambia.growth.operators.attention import AddHeads, AddKVHeads, WidenHeadDim
from cambia.growth.operators.depth import AddLayers
from cambia.growth.operators.hidden import WidenHidden
from cambia.growth.operators.tokens import AddTokens
from cambia.growth.operators.widen import WidenFFN
from cambia.growth.parts import AddLoraExpert
from cambia.growth.plan import GrowthPlan, plan_growth
from cambia.growth.prune import prune
from cambia.growth.rewarm import SliceWarmup
from cambia.growth.rules import Budget, GrowthManager, GrowthRule
from cambia.growth.triggers import TRIGGERS, AllOf, AnyOf, Majority, ScheduleTrigger, Trigger
from cambia.growth.triggers.efficiency import EfficiencyTrigger, LossCurve
from cambia.growth.triggers.watching import (
    GradientNormTrigger,
    LossSpikeTrigger,
    NoveltyTrigger,
    PerplexityTrigger,
    PlateauTrigger,
    SliceSpikeTrigger,
)
from cambia.records import GrowthEvent, Measured, Signals

if TYPE_CHECKING:
    from cambia.growth.callback import GrowthCallback

__all__ = [
    "OPERATORS",
    "TRIGGERS",
    "AddHeads",
    "AddKVHeads",
    "AddLayers",
    "AddLoraExpert",
    "AddTokens",
    "AllOf",
    "AnyOf",
    "Budget",
    "Contract",
    "EfficiencyTrigger",
    "GradientNormTrigger",
    "GrowthCallback",
    "GrowthEvent",
    "GrowthManager",
    "GrowthPlan",
    "GrowthRule",
    "LossCurve",
    "LossSpikeTrigger",
    "Majority",
    "Measured",
    "NoveltyTrigger",
    "Operator",
    "PerplexityTrigger",
    "PlateauTrigger",
    "ScheduleTrigger",
    "Signals",
    "SliceSpikeTrigger",
    "SliceWarmup",
    "Trigger",
    "WidenFFN",
    "WidenHeadDim",
    "WidenHidden",
    "WidenLoraRank",
    "grow",
    "plan_growth",
    "prune",
]


def __getattr__(name: str) -> Any:
    # Only who trains with transformers.Trainer has accelerate, which the callback needs.
    if name != "GrowthCallback":
        raise AttributeError(f"module 'cambia.growth' has no attribute {name!r}")
    from cambia.growth.callback import GrowthCallback

    return GrowthCallback
