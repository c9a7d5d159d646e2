"""Learned decoding: how a model's next token is drawn, as parameters that are fitted."""

from cambia.decoding.parameters import PRESETS, DecodingParameters
from cambia.decoding.policy import DecodingPolicy, InferenceEngine

__all__ = ["PRESETS", "DecodingParameters", "DecodingPolicy", "InferenceEngine"]
