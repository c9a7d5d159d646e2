"""Continual-learning methods by name."""

from __future__ import annotations

CONTINUAL_METHODS: dict[str, str] = {
    "naive": "cambia.continual.methods.method:Naive",
    "joint": "cambia.continual.methods.mixing:Joint",
    "cumulative": "cambia.continual.methods.mixing:Cumulative",
    "replay": "cambia.continual.methods.replay:Replay",
    "derpp": "cambia.continual.methods.derpp:DERPlusPlus",
    "agem": "cambia.continual.methods.agem:AGem",
    "ewc": "cambia.continual.methods.ewc:EWC",
    "lwf": "cambia.continual.methods.lwf:LwF",
    "lora": "cambia.continual.methods.lora:SharedLora",
    "lora_per_task": "cambia.continual.methods.per_task:LoraPerTask",
    "full_per_task": "cambia.continual.methods.per_task:FullPerTask",
    "olora": "cambia.continual.methods.olora:OLora",
    "osf": "cambia.continual.methods.osf:OrthogonalSubspace",
    "freeze": "cambia.continual.methods.freezing:Freeze",
    "experts": "cambia.continual.methods.experts:Experts",
    "masks": "cambia.continual.methods.masks:ElementMasks",
}
"""Name in a configuration -> class."""
