"""Learned decoding: how a model's next token is drawn, as parameters that are fitted."""

from cambia.decoding.exporting import Exported, exported, generation_config
from cambia.decoding.mixing import with_heads_folded
from cambia.decoding.parameters import PRESETS, DecodingParameters
from cambia.decoding.policy import DecodingPolicy, InferenceEngine

__all__ = [
    "PRESETS",
    "DecodingParameters",
    "DecodingPolicy",
    "Exported",
    "InferenceEngine",
    "exported",
    "generation_config",
    "with_heads_folded",
]
