"""Is this text new, row by row; and when is it certain enough that something new has come?

    >>> detector = NoveltyDetector()
    >>> detector.remember("english", readings_of_held_out_english)
    >>> verdict = detector.judge(readings)         # rows: which are strange to every known domain
    >>> decision = detector.observe(verdict)       # stream: is that enough to act on
    >>> decision.reason
    'novel: 48 of the last 48 windows are strange to english'

`docs` of what is guaranteed stand at `NoveltyDetector`; nothing here needs a model.
"""

# B windows, K known domains, S scores, L levels

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le, Lt
from torch import Tensor

from cambia.config import resolve_function
from cambia.continual.novelty.calibration import Ordinary
from cambia.continual.novelty.evidence import Rule, advance, log_bets, log_evidence
from cambia.continual.novelty.scores import NOVELTY_SCORES, Readings
from cambia.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the rows of a batch are."""

    domains: tuple[str, ...]
    """The known domains, in the order of the columns."""
    strangeness: Tensor
    """(B, K) float64: in standard deviations of each domain's own held-out windows."""
    p_values: Tensor
    """(B, K) float64: the conformal p-value against each domain."""
    novel: Tensor
    """(B,) bool: strange to every known domain."""
    raw: Tensor
    """(B, K, S) float64: the scores themselves."""

    @property
    def scores(self) -> Tensor:
        """(B,): how strange a row is to the domain that it is least strange to; infinite if there is none."""
        return _least(self.strangeness, math.inf, largest=False)

    @property
    def p_value(self) -> Tensor:
        """(B,): against "it is of one of the known domains"; 0 if there is none."""
        return _least(self.p_values, 0.0, largest=True)

    @property
    def least_strange(self) -> list[str | None]:
        """The domain that each row is least strange to, novel or not; None where none is known."""
        if not self.domains:
            return [None] * len(self.novel)
        return [self.domains[i] for i in self.strangeness.argmin(1).tolist()]

    @property
    def nearest(self) -> list[str | None]:
        """The same; None for novel rows."""
        found = zip(self.least_strange, self.novel.tolist(), strict=True)
        return [None if new else name for name, new in found]

    def rows(self, chosen: slice | Tensor) -> Verdict:
        """What some of the rows are."""
        parts = (self.strangeness, self.p_values, self.novel, self.raw)
        return Verdict(self.domains, *(part[chosen] for part in parts))


def _least(values: Tensor, otherwise: float, *, largest: bool) -> Tensor:
    if not values.shape[1]:
        return torch.full((len(values),), otherwise, dtype=torch.float64)
    return values.amax(1) if largest else values.amin(1)


@dataclass(frozen=True)
class Decision:
    """What the stream so far says."""

    reason: str | None
    """Why it is certain that something new has come, or None."""
    evidence: float
    """Between 0 and 1: how far the logarithm of the evidence is on its way to the threshold."""
    novel_windows: int
    """Novel windows since the evidence began to rise; 0 once it is gone, and with it the reason to keep them
    in quarantine."""


@dataclass
class NoveltyDetector:
    """Watches a stream of windows for domains that it does not know.

    Each row is compared with each known domain, by scores that are put on the scale of the domain's own
    held-out windows and averaged, and ranked among those windows: a conformal p-value. A row is strange to a
    level when its p-value is at most that against every known domain. Evidence is gathered from the shares of
    rows that are strange (`cambia.continual.novelty.evidence`).

    What is guaranteed. Suppose that every row comes from a known domain and that of each group of
    `group_windows` rows, whatever came before it, on average at most `level ** drift` are strange to each of
    the levels. Then between two growths

    * `rule="martingale"`: the probability of ever a false alarm is at most `false_alarms`, however long the
      stream is;
    * `rule="cusum"`: a false alarm comes after `run_length_windows` rows or more on average, and within n
      rows with a probability of at most n / run_length_windows.

    For rows exchangeable with the held-out ones the supposition holds, with `level` in place of
    `level ** drift`, but for bad luck in which windows were held out; `risk` is the probability of that. Rows
    of running text are not exchangeable, and the difference between `level` and `level ** drift` is there for
    them: it is how much a domain may drift and still be itself. A domain that drifts beyond it is called new.
    """

    scores: list[str] = field(default_factory=lambda: ["likelihood", "ratio", "mahalanobis"])
    """The novelty scores that are averaged: of NOVELTY_SCORES, or one's own, "my_module:function"."""
    row_level: Annotated[float, Gt(0), Lt(1)] = 0.02
    """A row whose p-value is at most this against every known domain is novel, to be put into quarantine."""
    levels: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.2])
    """The levels of strangeness at which shares are watched."""
    drift: Annotated[float, Gt(0), Le(1)] = 0.7
    """What drift is ordinary: with 1 none, with 0 all; at a level the share level ** drift is allowed."""
    stake: Annotated[float, Gt(0), Lt(1)] = 0.4
    """The share of the wealth that a bet risks. What is strange in every window is certain in two groups with
    nearly any; less of it asks what is strange in some for longer, so that an article on something unusual is
    over before it is called new."""
    rule: Rule = "martingale"
    """How evidence is gathered, and so what is guaranteed."""
    false_alarms: Annotated[float, Gt(0), Lt(1)] = 0.01
    """Of `martingale`: the probability of ever a false alarm."""
    run_length_windows: Annotated[int, Gt(0)] = 1_600_000
    """Of `cusum`: windows between false alarms, on average and at least."""
    group_windows: Annotated[int, Gt(0)] = 8
    """Windows in a row that may hang together in any way."""
    min_windows: Annotated[int, Gt(0)] = 48
    """Novel windows that there must be before anything is done about them."""
    remembered_windows: Annotated[int, Gt(3)] = 1024
    """Windows of each domain that new ones are compared with, at most; a few numbers each."""
    cooldown_windows: Annotated[int, Gt(0)] = 256
    """Windows after a growth, or after an alarm that was turned down, in which there is no alarm."""

    def __post_init__(self) -> None:
        if not self.scores or not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ConfigError(
                f"scores {self.scores} and levels {self.levels}: expected at least one of each, and levels "
                "between 0 and 1"
            )
        self._scores = [_score(name) for name in self.scores]
        self._known: dict[str, Ordinary] = {}
        self._quiet = 0  # windows of the cool-down that are left
        self._begin()

    def _begin(self) -> None:
        """No evidence of anything."""
        nothing = torch.full((len(self.levels),), -math.inf, dtype=torch.float64)
        self._wealth, self._rise = nothing, nothing.clone()
        self._groups = self._windows = self._novel = 0

    # ---- rows ------------------------------------------------------------------------------------

    @property
    def domains(self) -> tuple[str, ...]:
        """The known domains."""
        return tuple(self._known)

    def remember(self, domain: str, found: Readings | Verdict) -> None:
        """Take in what windows of a domain look like to it before it learns from them; it is known from then.

        While a domain learns, its rows are remembered batch by batch. Of one that was learned elsewhere,
        held-out windows are remembered at once, from all over its text. With few windows little is novel, as
        long as the domain learns: a p-value is never below one in their number.

        Args:
            domain: one of the columns.
            found: readings or verdict of windows of this domain, in the order of the text.
        """
        raw = found.raw if isinstance(found, Verdict) else self._raw(found)
        column = found.domains.index(domain)
        known = self._known.setdefault(domain, Ordinary(len(self.scores), self.remembered_windows))
        known.remember(raw[:, column])

    def complete(self, domain: str) -> None:
        """A domain has learned what it will learn: now few windows are enough to call others strange, by how
        far they lie outside."""
        self._known[domain].is_complete = True

    def forget(self, domain: str) -> None:
        """A domain that is no longer known, for example since its Part was merged into another."""
        del self._known[domain]

    def judge(self, readings: Readings) -> Verdict:
        """What each row is; changes nothing.

        Raises:
            ConfigError: the readings are not of exactly the known domains.
        """
        if set(readings.domains) != set(self._known):
            raise ConfigError(
                f"these readings are of the domains {list(readings.domains)}, known are {list(self._known)}: "
                "remember() each domain that is read, and forget() those that are gone"
            )
        raw = self._raw(readings)  # (B, K, S)
        known = [self._known[domain] for domain in readings.domains]
        strangeness = raw.new_empty(raw.shape[:2])
        p_values = torch.empty_like(strangeness)
        for i, ordinary in enumerate(known):
            strangeness[:, i] = ordinary.calibration.combined(raw[:, i])
            p_values[:, i] = ordinary.p_values(strangeness[:, i])
        novel = _least(p_values, 0.0, largest=True) <= self.row_level
        return Verdict(readings.domains, strangeness, p_values, novel, raw)

    def _raw(self, readings: Readings) -> Tensor:
        """(B, K, S) float64."""
        return torch.stack([score(readings).double().cpu() for score in self._scores], -1)

    # ---- the stream ------------------------------------------------------------------------------

    def observe(self, verdict: Verdict) -> Decision:
        """Take in a batch's rows; say whether it is certain that something new has come."""
        for rows in range(0, len(verdict.novel), self.group_windows):
            group = slice(rows, rows + self.group_windows)
            self._gather(verdict.p_value[group], verdict.novel[group])
        evidence = log_evidence(self._wealth).item() / self._threshold
        certain = evidence >= 1 and self._novel >= self.min_windows
        reason = None
        if certain:
            known = ", ".join(verdict.domains) or "everything"
            reason = f"novel: {self._novel} of the last {self._windows} windows are strange to {known}"
        return Decision(reason, min(max(evidence, 0.0), 1.0), self._novel)

    def _gather(self, p_values: Tensor, novel: Tensor) -> None:
        """One group of windows."""
        if self._quiet:
            self._quiet = max(0, self._quiet - len(novel))
            return
        self._groups += 1
        levels = torch.tensor(self.levels, dtype=torch.float64)
        shares = (p_values[:, None] <= levels).double().mean(0)
        bets = log_bets(shares, self.allowed, self.stake)
        self._wealth = advance(self.rule, self._wealth, bets, self._groups)
        # Whatever the rule, the rise says since when there has been something to see.
        self._rise = advance("cusum", self._rise, bets, self._groups)
        if (self._rise <= 0).all():
            self._windows = self._novel = 0
        else:
            self._windows += len(novel)
            self._novel += int(novel.sum())

    @property
    def is_suspicious(self) -> bool:
        """Whether there is any evidence at present: whatever is doubtful should wait for what comes of it."""
        return bool((self._rise > 0).any())

    @property
    def allowed(self) -> list[float]:
        """The share of a known domain's windows that may be strange, for each level."""
        return [level**self.drift for level in self.levels]

    @property
    def _threshold(self) -> float:
        """Of the logarithm of the evidence."""
        if self.rule == "martingale":
            return -math.log(self.false_alarms)
        return math.log(max(2.0, self.run_length_windows / self.group_windows))

    def risk(self) -> dict[str, float]:
        """By domain: how likely it was to hold out windows that make the guarantee void."""
        return {
            name: min(1.0, sum(map(known.calibration.risk, self.levels, self.allowed)))
            for name, known in self._known.items()
        }

    def reset(self, *, cooldown: bool = True) -> None:
        """Begin anew: after a growth, or when an alarm was turned down, with a cool-down; without one where
        somebody has said that another text begins."""
        self._begin()
        self._quiet = self.cooldown_windows if cooldown else 0

    # ---- what must survive a restart -------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "known": {name: known.state_dict() for name, known in self._known.items()},
            "wealth": self._wealth.clone(),
            "rise": self._rise.clone(),
            "counts": [self._groups, self._windows, self._novel, self._quiet],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self._known = {}
        for name, saved in state["known"].items():
            self._known[name] = Ordinary(len(self.scores), self.remembered_windows)
            self._known[name].load_state_dict(saved)
        self._wealth, self._rise = state["wealth"].clone(), state["rise"].clone()
        self._groups, self._windows, self._novel, self._quiet = state["counts"]


def _score(name: str) -> Callable[[Readings], Tensor]:
    known = NOVELTY_SCORES.get(name)
    return known or resolve_function(name, NOVELTY_SCORES, "novelty score")
