"""When a larger model would learn more from the next operation than this one: the run's own curve says.

The loss of a model with N parameters in its layers after n tokens at a constant rate is taken to be

    L(N, n) = E + A N^-alpha + b n^-a

(Hoffmann et al. 2022, arXiv:2203.15556, equation 2). Embeddings do not count (Kaplan et al. 2020,
arXiv:2001.08361): depth does not change them, and of a small model they are a large part. The run's own
losses give the last term, what can still be learned, and its exponent. Of the middle term only differences
count. Where the sizes of models and texts are chosen best, at 20 tokens a parameter there, alpha times the
middle term is a times the last, so that

    d = (a / alpha) b (20 N)^-a (1 - (N / N')^alpha)

is what N' parameters are better by in the long run. A grown model has the loss of the small one, and goes
on as a large one would that has come to that loss, after fewer tokens n' < n. So growth is due when

    a r / (n f)  <  a (r + d) / (n' f')      r = b n^-a,  n' = (b / (r + d))^(1 / a)

with f and f' operations a token: loss per operation, small against large (the rule of Shen et al. 2022,
Staged Training, arXiv:2203.06211, with a curve that is the run's own).

Of the run's curve E and b cancel here, and what is left is a. For exponents of 0.2 and more a doubling of
layers is due after 11 to 16 tokens for each parameter of the layers, later where a is small. So alpha, the 20
and the sizes say more about when to grow than the curve does (docs/log.md, 2026-11-23).
"""

# P points of a curve

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le

from cambia.errors import ConfigError
from cambia.growth.triggers.trigger import Planned, Trigger
from cambia.records import Signals

ALPHA = 0.34
"""By which the loss falls with parameters (Hoffmann et al. 2022, the parametric fit)."""
BALANCED = 20.0
"""Tokens a parameter at which a model and its text are of sizes that fit each other."""
FEWEST = 8
"""Points of a curve that is fitted."""


@dataclass(frozen=True)
class LossCurve:
    """``floor + scale n^-exponent``: loss in nats per token after n tokens."""

    floor: float
    scale: float
    exponent: float

    @classmethod
    def of(cls, tokens: Sequence[float], losses: Sequence[float], counts: Sequence[float]) -> LossCurve:
        """Fitted by least squares: for each exponent of a list the best floor and scale.

        Args:
            tokens: (P,) ascending.
            losses: (P,) means.
            counts: (P,) of how many losses each is the mean.

        Raises:
            ConfigError: there are fewer than `FEWEST` points, or the loss does not fall.
        """
        if len(tokens) < FEWEST:
            raise ConfigError(
                f"a curve of {len(tokens)} points is too short to fit: expected {FEWEST} at least, each for "
                "a tenth more tokens than the one before, at the full learning rate; train longer"
            )
        n, y, w = (np.asarray(each, dtype=np.float64) for each in (tokens, losses, counts))
        root, best = np.sqrt(w), None
        for exponent in _EXPONENTS:
            sides = np.stack([np.ones_like(n), (n / n[-1]) ** -exponent], 1)
            (floor, scale), *_ = np.linalg.lstsq(sides * root[:, None], y * root, rcond=None)
            if floor < 0:  # a loss has a floor of nothing at least
                floor, scale = 0.0, (w * sides[:, 1] * y).sum() / (w * sides[:, 1] ** 2).sum()
            error = (w * (sides @ [floor, scale] - y) ** 2).sum()
            if scale > 0 and (best is None or error < best[0]):
                best = error, cls(float(floor), float(scale * n[-1] ** exponent), exponent)
        level = (w * y).sum() / w.sum()
        flat = (w * (y - level) ** 2).sum()
        least = w.sum() * (_LEAST_FALL * level) ** 2
        if best is None or flat - best[0] < max(least, _LEAST_F * best[0] / (len(n) - 2)):
            raise ConfigError("the loss of this curve does not fall, so nothing can be expected from it")
        return best[1]

    def learnable(self, tokens: float) -> float:
        """What can still be learned after so many tokens, nats per token."""
        return self.scale * tokens**-self.exponent

    def gain(self, parameters: int, more: int) -> float:
        """What a model of `more` parameters is better by in the long run, nats per token."""
        balanced = self.learnable(BALANCED * parameters)
        return self.exponent / ALPHA * balanced * (1 - (parameters / more) ** ALPHA)

    def advantage(self, tokens: float, planned: Planned) -> float:
        """Loss per operation of the grown model, as a multiple of that of the model as it is."""
        earlier = self.as_grown(tokens, planned)
        costs = planned.flops_per_token_after / planned.flops_per_token_before
        return self.learnable(earlier) / self.learnable(tokens) * tokens / earlier / costs

    def as_grown(self, tokens: float, planned: Planned) -> float:
        """Tokens after which a model that was large from the start would have come to the same loss."""
        larger = self.learnable(tokens) + self.gain(planned.parameters_before, planned.parameters_after)
        return (self.scale / larger) ** (1 / self.exponent)


_EXPONENTS = tuple(np.linspace(0.05, 1.2, 47).tolist())
_LEAST_F = 16.0
"""The F statistic from which a curve counts as one that falls and not as noise; 13.7 is met once in a hundred
times by 8 points without a fall."""
_LEAST_FALL = 1e-3
"""Standard deviation of the fitted losses from which it does, as a share of the loss."""
_SPACING = 1.1
"""Tokens of a point of the curve, as a multiple of those of the one before."""
_HIGHEST = 0.999
"""The rate counts as full from this share of the highest so far."""


@dataclass
class EfficiencyTrigger(Trigger):
    """Fires when the grown model is expected to lose more per operation than the model as it is.

    It reads the training loss at the full learning rate and what the rule's growth would cost. Meant for
    pretraining with a warm-up-stable-decay schedule. A curve knows of no end, so in a run that knows its
    length growth is due at the latest while enough is left for the grown model to learn.

    A second growth is decided by the curve of the first: the grown model is one that is younger (n' above),
    whichever rule has grown it. One that would be due after `latest` does not come.

    Raises:
        ConfigError: `advantage` is no number above 0, or `latest` no share of a run.
    """

    advantage: Annotated[float, Gt(0)] = 1.0
    """How many times the grown model's expected loss per operation has to be that of the model as it is."""
    latest: Annotated[float, Gt(0), Le(1)] = 0.7
    """Share of the run after which it no longer waits for that, where the run knows its length; 1: never.
    Let the rate fall no earlier."""
    costs: dict[str, Any] | None = field(default=None, init=False)
    """What the growth would come to, as in `Planned`."""
    began: float | None = field(default=None, init=False)
    """Share of the run at the first loss since the last growth."""
    highest_rate: float = field(default=0.0, init=False)
    points: list[list[float]] = field(default_factory=list, init=False)
    """Of the curve: [tokens, sum of losses, how many]."""
    curve: dict[str, float] | None = field(default=None, init=False)
    """The last that was fitted, as in `LossCurve`."""
    age: float = field(default=0.0, init=False)
    """Tokens after which a model of this size would have come to its loss."""
    younger: float = field(default=0.0, init=False)
    """By how many tokens that is less than were seen."""
    asked: bool = field(default=False, init=False)
    """Whether it has fired for the model as it is."""

    def __post_init__(self) -> None:
        if not self.advantage > 0:
            raise ConfigError(f"advantage={self.advantage} must be above 0")
        if not 0 < self.latest <= 1:
            raise ConfigError(f"latest={self.latest} is a share of the run, above 0 and at most 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"tokens"})

    @property
    def needs_plan(self) -> bool:
        return True

    def plan(self, planned: Planned) -> None:
        before = Planned(**self.costs) if self.costs is not None else planned
        if planned.parameters_before > before.parameters_before:
            self._has_grown(replace(before, parameters_after=planned.parameters_before))
        self.costs = asdict(planned)

    def _has_grown(self, done: Planned) -> None:
        if self.curve is not None:
            self.younger += self.age - LossCurve(**self.curve).as_grown(self.age, done)
        self.points, self.began, self.asked = [], None, False

    def update(self, signals: Signals) -> str | None:
        if signals.loss is None or not math.isfinite(signals.loss):
            return None
        if signals.tokens is None or signals.tokens <= 0:
            raise ConfigError(
                "an efficiency trigger reads losses over tokens: manager.step(loss=..., tokens=...) with all "
                "that were trained on so far"
            )
        is_full = self._at_full_rate(signals.learning_rate)
        if not is_full and (self.began is None or self.asked):
            return None
        self.began = signals.progress if self.began is None else self.began
        self.age = signals.tokens - self.younger
        has_whole_point = is_full and self._added(signals.tokens, signals.loss)
        if self.costs is None or (self.asked and not has_whole_point):
            return None
        if self.began < self.latest <= signals.progress < 1:
            over = f"{signals.progress:.0%} of the run is over"
            return f"efficiency: {over}, and the grown model needs the rest"
        if not is_full:
            return None
        if not self.younger:  # a grown model goes on by the curve that it grew by
            if not has_whole_point:
                return None
            try:
                self.curve = asdict(self.fitted())
            except ConfigError:  # not yet
                return None
        assert self.curve is not None
        curve = LossCurve(**self.curve)
        found = curve.advantage(self.age, Planned(**self.costs))
        if found < self.advantage:
            return None
        return (
            f"efficiency: what can still be learned falls with the power {curve.exponent:.2f} of tokens; per "
            f"operation a grown model is expected to lose {found:.2f} times as much"
        )

    def fitted(self) -> LossCurve:
        """The curve so far.

        Raises:
            ConfigError: it is too short, or does not fall.
        """
        whole = self.points[:-1]  # the last is not full yet
        begins, sums, counts = zip(*whole, strict=True) if whole else ((), (), ())
        tokens = [_SPACING**0.5 * begin for begin in begins]
        return LossCurve.of(tokens, [total / n for total, n in zip(sums, counts, strict=True)], counts)

    def _at_full_rate(self, rate: float | None) -> bool:
        """Whether the rate is the highest so far; what came before it rose is forgotten."""
        if rate is None:  # nobody who tells none warms up or decays
            return True
        if rate * _HIGHEST > self.highest_rate:
            self.highest_rate, self.points = rate, []
        return rate >= _HIGHEST * self.highest_rate

    def _added(self, tokens: int, loss: float) -> bool:
        """Add a loss to the curve; returns whether a point has become full."""
        begins = not self.points or tokens > _SPACING * self.points[-1][0]
        if begins:
            self.points.append([float(tokens), 0.0, 0.0])
        self.points[-1][1] += loss
        self.points[-1][2] += 1
        return begins

    def reset(self) -> None:
        self.asked = True  # if nobody grows it now, it asks again after as much text as makes a point
