"""What can be checked of a continuation: by a regular expression, or by a function of one's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from cambia.config import resolve_function
from cambia.decoding.rewards.reward import Reward, Samples, Score, mean_of
from cambia.errors import ConfigError


@dataclass
class PatternReward(Reward):
    """The share of continuations that match a regular expression: 0 to 1."""

    pattern: str
    """Looked for anywhere in the text (`re.search`); begin with ^ or end with $ to tie it down."""

    def __post_init__(self) -> None:
        try:
            self._compiled = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern {self.pattern!r} is no regular expression: {error}") from None

    def measure(self, samples: Samples) -> Score:
        found = [float(self._compiled.search(text) is not None) for text in samples.texts]
        return mean_of(torch.tensor(found, dtype=torch.float64))


@dataclass
class FunctionReward(Reward):
    """What a function of one's own says, on its own scale."""

    function: str
    """Its name, "my_module:function"; of (prompt, text), which returns a number."""
    together: bool = False
    """Whether it takes (prompts, texts), all at once, and returns as many numbers."""

    def measure(self, samples: Samples) -> Score:
        function = resolve_function(self.function, (), "function")
        pairs = zip(samples.prompts, samples.texts, strict=True)
        if self.together:
            found = function(list(samples.prompts), list(samples.texts))
        else:
            found = [function(prompt, text) for prompt, text in pairs]
        return mean_of(self._numbers(found, len(samples)))

    def _numbers(self, found: Any, number: int) -> torch.Tensor:
        """(N,) float64."""
        try:
            numbers = torch.tensor([float(each) for each in found], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the function {self.function} returned no number: {error}") from None
        if len(numbers) != number:
            raise ConfigError(
                f"the function {self.function} returned {len(numbers)} numbers for {number} continuations"
            )
        return numbers
