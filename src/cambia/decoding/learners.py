"""A policy that learns a step at a time: by search, by the score function, or from the likelihood of text.

    >>> learner = DecodingFit(by="search").learner(rollouts, reward)
    >>> learner.step()          # writes behind some prompts, asks the reward, learns
    Update(number=1, reward=0.12, ...)
    >>> learner.chosen          # the policy that has come of it so far

`DecodingFit.run` takes steps until its tokens are spent; the training loop takes one every so many batches.
"""

# N prompts, G texts behind each, T time

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cambia.decoding.drawing import seed_of
from cambia.decoding.likelihood import LikelihoodFit, Text
from cambia.decoding.parameters import DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import parted
from cambia.decoding.rewards.reward import Material, Reward, Score
from cambia.decoding.rewards.sums import refuse_constant
from cambia.decoding.rollouts import Rollouts, text_features
from cambia.decoding.score_function import ScoreFunction
from cambia.decoding.searching import Search, Space, Tried
from cambia.errors import ConfigError, DataError, RewardError

_CALIBRATION = 0.5
"""Of the prompts that rewards are calibrated on; a policy learns on the others."""
_HELD = 0.25
"""Of the text that a policy learns from, by which is decided when it is best."""
_PATIENCE = 10
"""Steps beside the weights without a reward that tells anything apart."""


@dataclass(frozen=True)
class Update:
    """What came of one step of a policy."""

    number: int
    """From 1."""
    reward: float
    """The mean over what was written; of likelihood, less the nats per token of held-out text."""
    parameters: DecodingParameters
    """As they are now."""
    drift: Mapping[str, float]
    """How far each part has moved from where it began; of weights, the one that moved furthest."""
    tokens: int
    """Written so far, or read."""
    processed: int
    """Tokens that have gone through the model for it so far, one way; the way back counts as one more."""
    measured: Mapping[str, float]
    """Parts of the reward, and what else there is to know."""


class PolicyLearner(ABC):
    """A policy that learns.

    Args:
        start: where it begins; it stays as it is.
    """

    def __init__(self, start: DecodingPolicy):
        self._start = start
        self.updates = 0
        self.tokens = 0
        """Written so far, or read; what a reward is calibrated on does not count."""
        self.processed = 0
        """Tokens that have gone through the model, one way: prompts, looks and calibration too; the way back
        counts as one more."""
        self.tried: list[Tried] = []
        """What was found out about parameters, in order."""

    @property
    @abstractmethod
    def chosen(self) -> DecodingPolicy:
        """The policy that has come of it so far: the best where that can be told, or where it stands."""

    @property
    @abstractmethod
    def step_tokens(self) -> int:
        """That a step writes at most, or reads."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to learn."""
        return False

    def step(self) -> Update:
        """Learn from some prompts.

        Raises:
            RewardError: the reward is constant or not a number; the learner stands where it stood.
        """
        reward, measured = self._step()
        self.updates += 1
        now = self.chosen
        moved = drift(self._start, now)
        return Update(
            self.updates, reward, now.parameters, moved, self.tokens, self.processed, dict(measured)
        )

    @abstractmethod
    def _step(self) -> tuple[float, Mapping[str, float]]:
        """Learn; returns the reward and what else was measured."""

    # ---- what must survive a restart -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("updates", "tokens", "processed")}
        return {"kind": type(self).__name__, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, from a learner that has just been made.

        Raises:
            ConfigError: another kind of learner was there.
        """
        if state["kind"] != type(self).__name__:
            raise ConfigError(
                f"this run's policy was learned by a {state['kind']}, here is a {type(self).__name__}: go "
                "on with the settings and the packages that it began with"
            )
        self.updates, self.tokens, self.processed = state["updates"], state["tokens"], state["processed"]


class _RewardLearner(PolicyLearner):
    """One that writes, and is told what that was worth."""

    def __init__(self, rollouts: Rollouts, reward: Reward, *, prompts: int):
        super().__init__(rollouts.policy)
        self.rollouts, self.reward = rollouts, reward
        self._calibrated: list[list[int]] | None = None
        self._constant = 0  # first steps in which the reward told nothing apart
        self._shown, self._places = parted(rollouts.prompts.documents, _CALIBRATION)
        if not self._shown or len(self._places) < 2:
            count = len(rollouts.prompts)
            raise DataError(f"{count} prompts are too few to calibrate and to learn on: give more text")
        self._size = min(prompts, len(self._places))

    def _some(self, number: int) -> list[int]:
        """Prompts of a round, others each time."""
        generator = torch.Generator().manual_seed(seed_of(self.rollouts.seed, number))
        order = torch.randperm(len(self._places), generator=generator)[: self._size]
        return [self._places[i] for i in order.tolist()]

    def _begin(self) -> None:
        """Show the reward what people wrote, and what the model wrote by itself when all this began."""
        if self._calibrated is None:
            self._calibrated = calibrate(self.reward, self.rollouts, self._shown)

    def _refuse_constant(self, scores: Sequence[Score]) -> None:
        """Stop where the reward has never told anything apart: at once, or after some steps where the model
        still changes, since all that a beginner writes may be equally bad."""
        if self._constant < self.updates:
            return
        try:
            refuse_constant(scores)
        except RewardError:
            self._constant += 1
            if self.rollouts.is_frozen or self._constant >= _PATIENCE:
                raise

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calibrated": self._calibrated, "constant": self._constant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._calibrated, self._constant = state["calibrated"], state["constant"]
        if self._calibrated is not None:
            calibrate(self.reward, self.rollouts, self._shown, self._calibrated)


class SearchLearner(_RewardLearner):
    """Parameters as a whole, by what they are worth; a step is a round of candidates behind the same prompts.

    Args:
        rollouts: that writes; its policy is where the search begins.
        reward: what is maximised.
        search: how it looks.
        names: of the parameters that are searched.
        prompts: that each candidate continues.

    Raises:
        DataError: the prompts are too few.
        MissingExtraError: the search needs a package.
    """

    def __init__(
        self, rollouts: Rollouts, reward: Reward, search: Search, names: Sequence[str], *, prompts: int
    ):
        super().__init__(rollouts, reward, prompts=prompts)
        self._names = tuple(names)
        space = Space(self._names, rollouts.policy.parameters)
        self._search = search.begin(space, seed=rollouts.seed, moving=not rollouts.is_frozen)
        self.tried = self._search.tried
        self._population = search.population

    @property
    def chosen(self) -> DecodingPolicy:
        best = self._search.best
        return self.rollouts.policy.with_parameters(**{name: getattr(best, name) for name in self._names})

    @property
    def finished(self) -> bool:
        return not self._search.ask()

    @property
    def step_tokens(self) -> int:
        return self._population * self._size * self.rollouts.new_tokens

    def _step(self) -> tuple[float, Mapping[str, float]]:
        self._begin()
        rollouts, candidates, number = self.rollouts, self._search.ask(), self._search.round
        begun = rollouts.tokens
        scores = scored(self.reward, rollouts, candidates, self._some(number), number)
        self._refuse_constant(scores)
        values = [score.value for score in scores]
        self._search.tell(values)
        self.tokens += rollouts.tokens - begun
        self.processed += rollouts.taken()
        return sum(values) / len(values), {"best": max(values), **_mean_parts(scores)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "search": self._search.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._search.load_state_dict(state["search"])


class GradientLearner(_RewardLearner):
    """Parameters and the head for each token, by the score function.

    Args:
        rollouts: that writes; its policy is where it begins.
        reward: what is maximised.
        settings: of the score function.
        prompts: texts of a step, several behind each prompt.
    """

    def __init__(self, rollouts: Rollouts, reward: Reward, settings: ScoreFunction, *, prompts: int):
        super().__init__(rollouts, reward, prompts=prompts)
        self._learner = settings.learner(rollouts.policy, rollouts.model, seed=rollouts.seed)
        self._start = self._learner.policy
        self._copies = settings.texts
        self._size = max(1, self._size // self._copies)

    @property
    def chosen(self) -> DecodingPolicy:
        return self._learner.policy

    @property
    def step_tokens(self) -> int:
        return self._size * self._copies * self.rollouts.new_tokens

    def _step(self) -> tuple[float, Mapping[str, float]]:
        self._begin()
        places = self._some(self.updates)
        repeated = [place for place in places for _ in range(self._copies)]
        scores: list[Score] = []
        ids, mask = (each.to(self.rollouts.model.device) for each in self.rollouts.prompts.batch(places))

        def worth(rows: Tensor) -> Tensor:
            new: list[list[int]] = rows[:, ids.shape[1] :].tolist()
            scores.append(self.reward.score(self.rollouts.read(new, repeated)))
            return scores[0].each

        update = self._learner.step(ids, worth, new_tokens=self.rollouts.new_tokens, mask=mask)
        self._refuse_constant([scores[0]] * 2)
        self.tokens += update.tokens
        prompts = self._copies * int(mask.sum())
        self.processed += self.rollouts.taken() + 2 * (prompts + update.tokens)  # written, and read again
        self.tried.append(Tried(self.chosen.parameters, scores[0].value, self.updates))
        found = {"divergence": update.divergence, "entropy": update.entropy, **_mean_parts(scores)}
        return scores[0].value, found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learner": self._learner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._learner.load_state_dict(state["learner"])


class TextLearner(PolicyLearner):
    """Temperature, penalties, weights of layers and heads, from the likelihood of what people wrote.

    Args:
        rollouts: whose prompts and continuations are read; its policy is where it begins.
        settings: how it learns.

    Raises:
        ConfigError: a parameter has no gradient, or the policy cuts tokens off.
        DataError: the text is too little.
    """

    def __init__(self, rollouts: Rollouts, settings: LikelihoodFit):
        super().__init__(rollouts.policy)
        text = text_of(rollouts)
        held, some = (text.chosen(places) for places in parted(rollouts.prompts.documents, _HELD))
        self._learner = settings.learner(rollouts.policy, rollouts.model, some, held, seed=rollouts.seed)
        self._start = self._learner.policy
        self._settings, self._row_tokens = settings, rollouts.new_tokens
        self._is_frozen = rollouts.is_frozen

    @property
    def chosen(self) -> DecodingPolicy:
        # What a model that has changed since made of the held-out text tells nothing about this one.
        return self._learner.best if self._is_frozen else self._learner.policy

    @property
    def finished(self) -> bool:
        return self.updates >= self._settings.steps

    @property
    def step_tokens(self) -> int:
        return self._settings.batch_size * self._row_tokens

    def _step(self) -> tuple[float, Mapping[str, float]]:
        self.tokens += self._learner.step()
        self.processed = self._learner.processed
        return -self._learner.curve[-1], {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learner": self._learner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._learner.load_state_dict(state["learner"])


def drift(start: DecodingPolicy, now: DecodingPolicy) -> dict[str, float]:
    """How far each part of a policy has moved: parameters that differ, and the weight that moved furthest."""
    before, after = vars(start.parameters), vars(now.parameters)
    found = {name: float(after[name] - before[name]) for name in before if after[name] != before[name]}
    for name, one, other in (
        ("layer_weights", start.layer_weights, now.layer_weights),
        ("head_weights", _joined(start.head_weights), _joined(now.head_weights)),
        ("context", _head(start), _head(now)),
    ):
        if one is not None and other is not None:
            found[name] = float((other.detach() - one.detach()).abs().max())
    return found


def _joined(scales: Sequence[Tensor] | None) -> Tensor | None:
    return None if scales is None else torch.cat(list(scales))


def _head(policy: DecodingPolicy) -> Tensor | None:
    return None if policy.context is None else _joined([p.flatten() for p in policy.context.parameters()])


def _mean_parts(scores: Sequence[Score]) -> dict[str, float]:
    return {name: sum(score.parts[name] for score in scores) / len(scores) for name in scores[0].parts}


def calibrate(
    reward: Reward, rollouts: Rollouts, places: Sequence[int], written: Sequence[list[int]] | None = None
) -> list[list[int]]:
    """Show a reward what people wrote behind some prompts, and what the model writes by itself.

    Args:
        places: of the prompts.
        written: tokens that it wrote there before; left out, it writes now.

    Returns:
        The tokens that it has written.
    """
    if written is None:
        (plain,) = rollouts.write([DecodingParameters()], places, -1)
    else:
        plain = rollouts.read(written, places)

    def features(texts: Sequence[str]) -> Tensor:
        if not rollouts.is_frozen:
            raise ConfigError(
                "this reward compares what the model makes of texts, and the model is being trained: leave "
                "that part out, {type: match, mauve_share: 0}, or take another reward"
            )
        return text_features(rollouts.model, rollouts.tokenizer, texts)

    documents = [rollouts.prompts.documents[place] for place in places]
    reward.begin(Material(rollouts.human(places), plain, features, documents))
    return [list(row) for row in plain.tokens]


def scored(
    reward: Reward,
    rollouts: Rollouts,
    candidates: Sequence[DecodingParameters],
    places: Sequence[int],
    round_: int,
) -> list[Score]:
    """What candidates are worth behind the same prompts, with the same noise."""
    return [reward.score(samples) for samples in rollouts.write(candidates, places, round_)]


def text_of(rollouts: Rollouts, places: Sequence[int] | None = None) -> Text:
    """Prompts and how they really go on, as rows whose continuations count."""
    prompts = rollouts.prompts
    chosen = list(range(len(prompts))) if places is None else list(places)
    ids, mask = prompts.batch(chosen)
    rest = torch.zeros(len(chosen), max(len(prompts.human[i]) for i in chosen), dtype=ids.dtype)
    real = torch.zeros_like(rest, dtype=torch.bool)
    for row, place in enumerate(chosen):
        human = prompts.human[place]
        rest[row, : len(human)] = torch.tensor(list(human))
        real[row, : len(human)] = True
    return Text(torch.cat([ids, rest], 1), ids.shape[1], torch.cat([mask.bool(), real], 1))
