"""Finding decoding parameters by what they are worth: few numbers, noisy rewards, no gradient.

A search asks what candidates are worth, a round at a time; all of a round continue the same prompts with the
same noise. It works on the unit cube, into which `SPANS` maps the parameters.

    >>> space = Space(("temperature", "top_p"), DecodingParameters())
    >>> found = ProcessSearch().run(worth, space, rounds=10)
    >>> found.best
    DecodingParameters(temperature=0.71, ...)
"""

# S parameters that are searched, C candidates of a round

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt

from cambia.decoding.parameters import SPANS, DecodingParameters, Span
from cambia.decoding.process import Process, by_round, spread
from cambia.errors import ConfigError, MissingExtraError

Worth = Callable[[Sequence[DecodingParameters], int], Sequence[float]]
"""(candidates of a round, its number) -> what each is worth."""


@dataclass(frozen=True)
class Tried:
    """One candidate."""

    parameters: DecodingParameters
    worth: float
    round: int


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    best: DecodingParameters
    tried: Sequence[Tried]
    """All candidates, in their order."""


@dataclass(frozen=True)
class Space:
    """The unit cube of the parameters that are searched."""

    names: Sequence[str]
    start: DecodingParameters
    """Where it begins, and all that is not searched."""
    spans: Mapping[str, Span] = field(default_factory=lambda: dict(SPANS))

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in self.spans]
        if unknown or not self.names:
            what = repr(unknown[0]) if unknown else "nothing"
            raise ConfigError(f"{what} cannot be searched; known are {', '.join(self.spans)}")

    def at(self, place: Sequence[float] | np.ndarray) -> DecodingParameters:
        """The parameters at a point of the cube, (S,)."""
        values = {name: self.spans[name].at(float(x)) for name, x in zip(self.names, place, strict=True)}
        return DecodingParameters.of({**asdict(self.start), **values})

    def place(self, parameters: DecodingParameters) -> np.ndarray:
        """Where parameters lie, (S,)."""
        return np.array([self.spans[name].place(getattr(parameters, name)) for name in self.names])


class Ongoing(ABC):
    """A search at work: ask for candidates, find out what they are worth, tell it.

    What it has been told is all its state: told the same again, it stands where it stood.

    Args:
        space: where it looks.
        moving: what candidates are worth changes from round to round.
    """

    def __init__(self, space: Space, *, moving: bool = False):
        self.space, self.moving = space, moving
        self.tried: list[Tried] = []
        """All candidates, in their order."""
        self._told: list[list[float]] = []
        self._asked: list[DecodingParameters] | None = None

    @property
    def round(self) -> int:
        """The number of the round: candidates of one round are compared behind the same prompts."""
        return len(self._told)

    @property
    @abstractmethod
    def best(self) -> DecodingParameters:
        """The best, by all that it was told."""

    @abstractmethod
    def _ask(self) -> list[DecodingParameters]: ...

    @abstractmethod
    def _tell(self, values: Sequence[float]) -> None: ...

    def ask(self) -> list[DecodingParameters]:
        """The candidates of this round; none where nothing is left to try."""
        if self._asked is None:
            self._asked = self._ask()
        return self._asked

    def tell(self, values: Sequence[float]) -> None:
        """What the candidates of this round are worth; the next round begins."""
        candidates, number = self.ask(), self.round
        self._tell(values)
        self.tried += [Tried(c, v, number) for c, v in zip(candidates, values, strict=True)]
        self._told.append([float(value) for value in values])
        self._asked = None

    def state_dict(self) -> dict[str, Any]:
        tried = [[getattr(one.parameters, name) for name in self.space.names] for one in self.tried]
        return {"told": [list(values) for values in self._told], "tried": tried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, from a search that has just begun.

        Raises:
            ConfigError: it would not have asked for what was tried.
        """
        for values in state["told"]:
            self.tell(values)
        tried = self.state_dict()["tried"]
        if len(tried) != len(state["tried"]) or not np.allclose(tried, state["tried"], rtol=1e-6, atol=0):
            raise ConfigError(
                "this search tried other decoding parameters than its settings would have: go on with the "
                "settings that it began with, or begin anew"
            )


@dataclass
class Search(ABC):
    """A way to look for decoding parameters."""

    population: Annotated[int, Gt(1)] = 8
    """Candidates of a round."""

    @abstractmethod
    def begin(self, space: Space, *, seed: int = 0, moving: bool = False) -> Ongoing:
        """One at work.

        Args:
            space: where it looks.
            seed: of what is tried.
            moving: what candidates are worth changes meanwhile, as beside weights that learn.

        Raises:
            MissingExtraError: it needs a package.
        """

    def rounds(self, space: Space) -> int | None:
        """In which it has tried everything; None: it goes on for as long as it may."""
        return None

    def run(self, worth: Worth, space: Space, *, rounds: int, seed: int = 0) -> Found:
        """Look for the best parameters.

        Args:
            worth: what candidates are worth.
            rounds: of `population` candidates each, at most.
            seed: of what is tried.
        """
        ongoing = self.begin(space, seed=seed)
        for _ in range(rounds):
            if not (candidates := ongoing.ask()):
                break
            ongoing.tell(worth(candidates, ongoing.round))
        return Found(ongoing.best, ongoing.tried)


class _OnePlace(Ongoing):
    """All candidates are compared behind the same prompts with the same noise, unless their worth moves."""

    @property
    def round(self) -> int:
        return super().round if self.moving else 0


@dataclass
class ProcessSearch(Search):
    """A Gaussian process of what is worth how much, fitted to all that was tried.

    Each candidate of a round is the top of a function that is drawn from the process (Thompson 1933, On the
    likelihood that one unknown probability exceeds another, Biometrika 25; in parallel Kandasamy et al. 2018,
    Parallelised Bayesian Optimisation via Thompson Sampling, arXiv:1705.09236); the first are spread over the
    cube, and where it began is among them. All are compared behind the same prompts with the same noise. It
    comes to what is most surely better than where it began, or stays there (`Process.surest`). Beside weights
    that learn each round has prompts and a level of its own.
    """

    def begin(self, space: Space, *, seed: int = 0, moving: bool = False) -> Ongoing:
        return _ProcessOngoing(self, space, seed, moving)


class _ProcessOngoing(_OnePlace):
    def __init__(self, search: ProcessSearch, space: Space, seed: int, moving: bool):
        super().__init__(space, moving=moving)
        self._population = search.population
        self._start = space.place(space.start)
        self._generator = np.random.default_rng(seed)
        self._points: list[np.ndarray] = []

    def _ask(self) -> list[DecodingParameters]:
        if self.tried:
            points = self._drawn()
        else:
            others = spread(self._population - 1, len(self._start), self._generator)
            points = np.concatenate([self._start[None], others])
        self._points += [*points]
        candidates = [self.space.at(point) for point in points]
        if not self.tried:
            candidates[0] = self.space.start  # itself, which may lie outside the cube
        return candidates

    def _tell(self, values: Sequence[float]) -> None:
        pass

    def _drawn(self) -> np.ndarray:
        """The tops of functions that are drawn from the process, (C, S)."""
        points, values, rounds = self._known()
        best = points[np.argsort(values - by_round(values, rounds, 0.5))[-_BEST:]]
        parents = best[self._generator.integers(len(best), size=_PLACES)]
        near = parents + 0.1 * self._generator.normal(size=parents.shape)
        places = np.unique(np.concatenate([self._generator.random(parents.shape), near.clip(0, 1)]), axis=0)
        if not self.moving:  # the same again would only get the same value
            places = places[~(places[:, None] == points).all(2).any(1)]
        drawn = Process.of(points, values, rounds).draw(places, self._population, self._generator)
        chosen: list[int] = []
        for each in drawn.T:
            each[chosen] = -np.inf
            chosen.append(int(each.argmax()))
        return places[chosen]

    def _known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points, what they are worth, and their rounds; of a worth that moves the latest."""
        first = max(0, len(self.tried) - _STAYS * self._population) if self.moving else 0
        tried = self.tried[first:]
        points = np.array(self._points[first : len(self.tried)])
        return points, np.array([one.worth for one in tried]), np.array([one.round for one in tried])

    @property
    def best(self) -> DecodingParameters:
        if not self.tried:
            return self.space.start
        process = Process.of(*self._known())
        left_out = len(self.tried) - len(process.points)
        # Where it began is the first point, for as long as it is among those that are looked at.
        return self.tried[left_out + process.surest(None if left_out else 0)].parameters


_BEST, _PLACES = 6, 500
"""Tops are looked for all over the cube and near the best."""
_STAYS = 8
"""Rounds for which a worth that moves is taken for what it was."""


@dataclass
class CmaSearch(Search):
    """Evolution of a normal distribution (CMA-ES, Hansen 2016, https://arxiv.org/abs/1604.00772), which
    comes to its mean."""

    sigma: Annotated[float, Gt(0)] = 0.25
    """Its spread at the start, in the unit cube."""

    def begin(self, space: Space, *, seed: int = 0, moving: bool = False) -> Ongoing:
        return _CmaOngoing(self, space, seed, moving)


class _CmaOngoing(Ongoing):
    def __init__(self, search: CmaSearch, space: Space, seed: int, moving: bool):
        super().__init__(space, moving=moving)
        try:
            from cmaes import CMA
        except ModuleNotFoundError:
            raise MissingExtraError.of("cmaes", "sweep") from None
        size = len(space.names)
        self._population = search.population
        self._evolution = CMA(
            np.clip(space.place(space.start), 0.1, 0.9),
            search.sigma,
            bounds=np.array([[0.0, 1.0]] * size),
            seed=seed,
            population_size=search.population,
        )
        self._points: list[np.ndarray] = []
        """Of this round."""

    def _ask(self) -> list[DecodingParameters]:
        self._points = [self._evolution.ask() for _ in range(self._population)]
        return [self.space.at(point) for point in self._points]

    def _tell(self, values: Sequence[float]) -> None:
        self._evolution.tell([(point, -value) for point, value in zip(self._points, values, strict=True)])

    @property
    def best(self) -> DecodingParameters:
        return self.space.at(self._evolution.mean) if self.tried else self.space.start


class _BestTried(_OnePlace):
    """The best that was tried is taken."""

    def __init__(self, space: Space, *, moving: bool = False):
        super().__init__(space, moving=moving)
        if moving:
            raise ConfigError(
                "grids and TPE compare candidates of different times, and beside weights that learn their "
                "worth changes meanwhile: --decoding.fit.search.type process or cma"
            )

    @property
    def best(self) -> DecodingParameters:
        if not self.tried:
            return self.space.start
        return max(self.tried, key=lambda one: one.worth).parameters


@dataclass
class TpeSearch(Search):
    """Optuna's tree-structured Parzen estimator, all candidates behind the same prompts; the best that was
    tried is taken."""

    def begin(self, space: Space, *, seed: int = 0, moving: bool = False) -> Ongoing:
        return _TpeOngoing(self, space, seed, moving)


class _TpeOngoing(_BestTried):
    def __init__(self, search: TpeSearch, space: Space, seed: int, moving: bool):
        super().__init__(space, moving=moving)
        try:
            import optuna
        except ModuleNotFoundError:
            raise MissingExtraError.of("optuna", "sweep") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._lines: dict[str, Any] = {n: optuna.distributions.FloatDistribution(0, 1) for n in space.names}
        self._population = search.population
        self._trials: list[Any] = []

    def _ask(self) -> list[DecodingParameters]:
        self._trials = [self._study.ask(self._lines) for _ in range(self._population)]
        names = self.space.names
        return [self.space.at([trial.params[name] for name in names]) for trial in self._trials]

    def _tell(self, values: Sequence[float]) -> None:
        for trial, value in zip(self._trials, values, strict=True):
            self._study.tell(trial, value)


@dataclass
class GridSearch(Search):
    """Every point of a grid, all behind the same prompts; the best that was tried is taken."""

    points: Annotated[int, Gt(1)] = 7
    """Values of each parameter."""

    def begin(self, space: Space, *, seed: int = 0, moving: bool = False) -> Ongoing:
        return _GridOngoing(self, space, moving)

    def rounds(self, space: Space) -> int:
        return -(-(self.points ** len(space.names)) // self.population)


class _GridOngoing(_BestTried):
    def __init__(self, search: GridSearch, space: Space, moving: bool):
        super().__init__(space, moving=moving)
        lines = [np.linspace(0, 1, search.points)] * len(space.names)
        self._every = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(space.names))
        self._population = search.population

    def _ask(self) -> list[DecodingParameters]:
        done = len(self.tried)
        return [self.space.at(point) for point in self._every[done : done + self._population]]

    def _tell(self, values: Sequence[float]) -> None:
        pass


SEARCHES: dict[str, str] = {
    "process": "cambia.decoding.searching:ProcessSearch",
    "cma": "cambia.decoding.searching:CmaSearch",
    "tpe": "cambia.decoding.searching:TpeSearch",
    "grid": "cambia.decoding.searching:GridSearch",
}
"""By what configurations call them."""
