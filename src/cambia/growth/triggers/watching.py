"""Triggers that watch measurements: losses, perplexity, gradient norms.

They see symptoms. A loss that has stopped falling, or has risen, may lack capacity, or data, or a lower
learning rate: docs/triggers.md has how often each is fooled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from cambia.errors import ConfigError
from cambia.growth.triggers.trigger import Trigger
from cambia.records import Signals


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass
class PlateauTrigger(Trigger):
    """Fires when a measured loss has stopped improving.

    It needs a measurement (`evaluation.every_steps`); between measurements it waits. For saving compute
    in pretraining it fires too late by construction: use it on streams.

    Without `window` an improvement is a new best. With it the mean of the last `window` measurements is
    compared with the mean of those before, which is steadier where measurements are noisy.
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {
        "window_steps": "patience",
        "eps": "min_improvement",
        "threshold": "min_improvement",
    }

    patience: Annotated[int, Gt(0)] = 10
    """Measurements in a row without improvement."""
    min_improvement: float = 0.002
    """An improvement is a loss lower than the best so far by at least this, in the loss's own unit."""
    metric: str = "validation_loss"
    """Name of the measurement to watch."""
    window: Annotated[int, Gt(0)] | None = None
    """Compare means of this many measurements instead of single ones with the best."""
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)
    recent: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience={self.patience} must be at least 1 measurement")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window} must be at least 1 measurement")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.metric})

    def update(self, signals: Signals) -> str | None:
        value = _finite(signals.fresh(self.metric))
        if value is None:
            return None
        if self._improved(value):
            self.waited = 0
            return None
        if self.window is not None and len(self.recent) < 2 * self.window:
            return None
        self.waited += 1
        if self.waited < self.patience:
            return None
        told = f"not below {self.best:.4f}" if self.window is None else f"flat over 2 x {self.window}"
        return f"plateau: {self.metric} {told} for {self.waited} measurements"

    def _improved(self, value: float) -> bool:
        if self.window is not None:
            self.recent = [*self.recent, value][-2 * self.window :]
            if len(self.recent) < 2 * self.window:
                return False
            before, now = fmean(self.recent[: self.window]), fmean(self.recent[self.window :])
            return now <= before - self.min_improvement
        if self.best is None or value <= self.best - self.min_improvement:
            self.best = value
            return True
        return False

    def reset(self) -> None:
        # The best so far stays: the grown model must beat it, not start from nothing.
        self.waited = 0
        self.recent = []


@dataclass
class PerplexityTrigger(Trigger):
    """Fires when perplexity no longer falls by a share of itself.

    A plateau in relative terms: the same setting fits an early and a late stretch of training, and any
    tokenizer.
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {"threshold": "min_improvement"}

    min_improvement: Annotated[float, Gt(0)] = 0.002
    """An improvement is a perplexity lower than the best so far by this share of it."""
    patience: Annotated[int, Gt(0)] = 10
    """Measurements in a row without improvement."""
    metric: str = "validation_loss"
    """Name of the measurement, in nats per token; perplexity is its exponential."""
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.min_improvement < 1:
            raise ConfigError(f"min_improvement={self.min_improvement} is a share, between 0 and 1")
        if self.patience < 1:
            raise ConfigError(f"patience={self.patience} must be at least 1 measurement")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.metric})

    def update(self, signals: Signals) -> str | None:
        value = _finite(signals.fresh(self.metric))
        if value is None:
            return None
        if self.best is None or value <= self.best + math.log1p(-self.min_improvement):
            self.best, self.waited = value, 0
            return None
        self.waited += 1
        if self.waited < self.patience:
            return None
        share = f"{100 * self.min_improvement:g} %"
        return f"perplexity: not {share} below {math.exp(self.best):.4g} for {self.waited} measurements"

    def reset(self) -> None:
        self.waited = 0


@dataclass
class GradientNormTrigger(Trigger):
    """Fires when the gradient has become too small or too large and stayed so.

    It watches the global norm before clipping, once per optimizer step, as the median of a window, so
    that single bursts do not count. `below` and `above` are multiples of the norm that the run itself
    had in its first window (after the start, and again after each growth of its own rule), or with
    `relative=False` plain norms. A norm depends on the learning rate, the batch size and the loss: a plain
    one fits one run.
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {"threshold": "below", "window": "window_steps"}

    below: Annotated[float, Gt(0)] | None = None
    """Fire when the median norm is lower than this."""
    above: Annotated[float, Gt(0)] | None = None
    """Fire when the median norm is higher than this."""
    window_steps: Annotated[int, Gt(0)] = 30
    """Optimizer steps whose median is taken."""
    settle_steps: Annotated[int, Ge(0)] = 100
    """Steps after the start and after each growth that are left out: the rate warms up in them."""
    relative: bool = True
    """Measure in multiples of the first window instead of in norms."""
    skipped: int = field(default=0, init=False)
    reference: float | None = field(default=None, init=False)
    recent: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.below is None and self.above is None:
            raise ConfigError("a gradient norm trigger takes below=, above= or both")
        if self.below is not None and self.above is not None and self.below >= self.above:
            raise ConfigError(f"below={self.below} must be lower than above={self.above}")
        if self.relative and ((self.below or 0) >= 1 or (self.above or 2) <= 1):
            raise ConfigError(
                "with relative=True the first window is 1: below= is less than 1 and above= more than 1"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"grad_norm"})

    def update(self, signals: Signals) -> str | None:
        norm = _finite(signals.fresh("grad_norm"))
        if norm is None:
            return None
        if self.skipped < self.settle_steps:
            self.skipped += 1
            return None
        self.recent = [*self.recent, norm][-self.window_steps :]
        if len(self.recent) < self.window_steps:
            return None
        if self.relative and self.reference is None:
            self.reference, self.recent = median(self.recent), []
            return None
        scale = self.reference if self.relative and self.reference is not None else 1.0
        now = median(self.recent)
        compared = f" ({now / scale:.3g} of the first window's)" if self.relative and scale else ""
        told = f"gradient norm: median {now:.3g}{compared} over {self.window_steps} steps is"
        if self.below is not None and now < self.below * scale:
            return f"{told} below {self.below:g}"
        if self.above is not None and now > self.above * scale:
            return f"{told} above {self.above:g}"
        return None

    def reset(self) -> None:
        self.skipped, self.reference, self.recent = 0, None, []


@dataclass
class LossSpikeTrigger(Trigger):
    """Fires when a loss stands above its own recent past, and stays there.

    The median of the last `patience` values is compared with the median of the `window` values before
    them. A burst shorter than half of `patience` is not seen; a shift to harder data is.
    """

    ratio: Annotated[float, Gt(1)] = 1.3
    """Fire when the loss is more than this many times what it was."""
    window: Annotated[int, Gt(0)] = 100
    """Values of the past that are compared with."""
    patience: Annotated[int, Gt(0)] = 20
    """Values of the present."""
    metric: str = "loss"
    """What to watch: the training loss of each step, or the name of a measurement."""
    recent: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.ratio <= 1:
            raise ConfigError(f"ratio={self.ratio} must be above 1: a loss of 1 times itself is no spike")
        if self.window < 1 or self.patience < 1:
            raise ConfigError(f"window={self.window} and patience={self.patience} must be at least 1 value")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.metric})

    def update(self, signals: Signals) -> str | None:
        value = _finite(signals.fresh(self.metric))
        if value is None:
            return None
        self.recent = [*self.recent, value][-(self.window + self.patience) :]
        if len(self.recent) < self.window + self.patience:
            return None
        past, now = median(self.recent[: self.window]), median(self.recent[self.window :])
        if now <= self.ratio * past:
            return None
        return f"loss spike: median {self.metric} of {self.patience} is {now:.4f}, before it was {past:.4f}"

    def reset(self) -> None:
        self.recent = []


@dataclass
class SliceSpikeTrigger(Trigger):
    """Fires when a slice of the data has become harder for the model than the rest, and stays so.

    What is watched is the slice's loss over that of the rest. Some slices are harder than others for good
    (digits, first words), so the median of the last `patience` measurements is compared with the median of
    the `window` before them; `relative=False` compares it with `ratio` itself. The slice is one of
    `evaluation.slices`, whose probe measures "slice_loss/NAME" and "rest_loss/NAME", or anything that a loop
    of one's own measures under these names.
    """

    slice: str
    """Name of the slice."""
    ratio: Annotated[float, Gt(0)] = 1.2
    """Fire when the slice's share of difficulty is more than this many times what it was."""
    patience: Annotated[int, Gt(0)] = 3
    """Measurements of the present."""
    window: Annotated[int, Gt(0)] = 10
    """Measurements of the past that are compared with."""
    relative: bool = True
    """Compare with the slice's own past; False: with the rest alone."""
    recent: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.ratio <= 0 or (self.relative and self.ratio <= 1):
            raise ConfigError(
                f"ratio={self.ratio} must be above 1 where a slice is compared with its own past, and above "
                "0 with relative=False"
            )
        if self.window < 1 or self.patience < 1:
            raise ConfigError(f"window={self.window} and patience={self.patience} must be at least 1 value")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"slice_loss/{self.slice}", f"rest_loss/{self.slice}"})

    def update(self, signals: Signals) -> str | None:
        inside = _finite(signals.fresh(f"slice_loss/{self.slice}"))
        rest = _finite(signals.fresh(f"rest_loss/{self.slice}"))
        if inside is None or rest is None or rest <= 0:
            return None
        past = self.window if self.relative else 0
        self.recent = [*self.recent, inside / rest][-(past + self.patience) :]
        if len(self.recent) < past + self.patience:
            return None
        now, before = median(self.recent[past:]), median(self.recent[:past]) if past else 1.0
        if now <= self.ratio * before:
            return None
        was = f", before it was {before:.2f}" if past else ""
        return f"slice spike: loss on {self.slice} is {now:.2f} times that on the rest{was}"

    def reset(self) -> None:
        self.recent = []


@dataclass
class NoveltyTrigger(Trigger):
    """Fires when the text that comes is none of what the model knows.

    It only reads; what is new, and how certain that is, is decided where novelty is measured, with a stated
    rate of false alarms (`cambia.continual.NoveltyDetector`).
    """

    threshold: Annotated[float, Gt(0)] = 1.0
    """Of the evidence; 1 is where its own false-alarm rate is kept."""
    metric: str = "novelty"
    """Name of the measurement."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.metric})

    def update(self, signals: Signals) -> str | None:
        value = _finite(signals.fresh(self.metric))
        if value is None or value < self.threshold:
            return None
        return f"novelty: evidence {value:.3g}, {self.threshold:g} is enough"
