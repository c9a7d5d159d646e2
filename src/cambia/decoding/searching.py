"""Finding decoding parameters by what they are worth: few numbers, noisy rewards, no gradient.

A search asks what candidates are worth, a round at a time; all of a round continue the same prompts with the
same noise. It works on the unit cube, into which `SPANS` maps the parameters.

    >>> found = CmaSearch().run(worth, names=("temperature", "top_p"), rounds=10, start=DecodingParameters())
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

from cambia.config import resolve
from cambia.decoding.parameters import SPANS, DecodingParameters, Span
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


@dataclass
class Search(ABC):
    """A way to look for decoding parameters."""

    population: Annotated[int, Gt(1)] = 8
    """Candidates of a round."""

    @abstractmethod
    def run(self, worth: Worth, space: Space, *, rounds: int, seed: int = 0) -> Found:
        """Look for the best parameters.

        Args:
            worth: what candidates are worth.
            rounds: of `population` candidates each.
            seed: of what is tried.
        """


@dataclass
class CmaSearch(Search):
    """Evolution of a normal distribution (CMA-ES, Hansen 2016, https://arxiv.org/abs/1604.00772), and at its
    end the best point of a quadric that is fitted to all that was tried, within where it looked."""

    sigma: Annotated[float, Gt(0)] = 0.25
    """Its spread at the start, in the unit cube."""

    def run(self, worth: Worth, space: Space, *, rounds: int, seed: int = 0) -> Found:
        try:
            from cmaes import CMA
        except ModuleNotFoundError:
            raise MissingExtraError.of("cmaes", "sweep") from None
        size = len(space.names)
        middle = np.clip(space.place(space.start), 0.1, 0.9)
        bounds = np.array([[0.0, 1.0]] * size)
        evolution = CMA(middle, self.sigma, bounds=bounds, seed=seed, population_size=self.population)
        points: list[np.ndarray] = []
        tried: list[Tried] = []
        for number in range(rounds):
            asked = [evolution.ask() for _ in range(self.population)]
            candidates = [space.at(point) for point in asked]
            values = worth(candidates, number)
            evolution.tell([(point, -value) for point, value in zip(asked, values, strict=True)])
            points += asked
            tried += [Tried(c, v, number) for c, v in zip(candidates, values, strict=True)]
        values, numbers = np.array([one.worth for one in tried]), np.array([one.round for one in tried])
        best = top_of_quadric(np.array(points), values, numbers, evolution.mean)
        return Found(space.at(best), tried)


@dataclass
class TpeSearch(Search):
    """Optuna's tree-structured Parzen estimator; the best that was tried is taken."""

    def run(self, worth: Worth, space: Space, *, rounds: int, seed: int = 0) -> Found:
        try:
            import optuna
        except ModuleNotFoundError:
            raise MissingExtraError.of("optuna", "sweep") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        )
        lines: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0, 1) for name in space.names}
        tried: list[Tried] = []
        for number in range(rounds):
            asked = [study.ask(lines) for _ in range(self.population)]
            candidates = [space.at([trial.params[name] for name in space.names]) for trial in asked]
            for trial, candidate, value in zip(asked, candidates, worth(candidates, number), strict=True):
                study.tell(trial, value)
                tried.append(Tried(candidate, value, number))
        return Found(max(tried, key=lambda one: one.worth).parameters, tried)


@dataclass
class GridSearch(Search):
    """Every point of a grid, in rounds; the best that was tried is taken."""

    points: Annotated[int, Gt(1)] = 7
    """Values of each parameter."""

    def run(self, worth: Worth, space: Space, *, rounds: int = 0, seed: int = 0) -> Found:
        """The whole grid, whatever `rounds` says; all of it counts as one round, with the same noise."""
        lines = [np.linspace(0, 1, self.points)] * len(space.names)
        every = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(space.names))
        tried: list[Tried] = []
        for first in range(0, len(every), self.population):
            candidates = [space.at(point) for point in every[first : first + self.population]]
            tried += [Tried(c, v, 0) for c, v in zip(candidates, worth(candidates, 0), strict=True)]
        return Found(max(tried, key=lambda one: one.worth).parameters, tried)


SEARCHES: dict[str, str] = {
    "cma": "cambia.decoding.searching:CmaSearch",
    "tpe": "cambia.decoding.searching:TpeSearch",
    "grid": "cambia.decoding.searching:GridSearch",
}
"""By what configurations call them."""


def top_of_quadric(
    points: np.ndarray, values: np.ndarray, rounds: np.ndarray, middle: np.ndarray
) -> np.ndarray:
    """The highest point of a quadric that is fitted to noisy values near a point.

    Response surface methodology (Box and Wilson 1951): one candidate's worth is mostly noise, all of them
    together say where the top is. Each round has a level of its own, since it has other prompts, harder or
    easier ones. Points count less the further they lie from `middle`, and it looks only between those that
    count.

    Args:
        points: (C, S) in the unit cube.
        values: (C,).
        rounds: (C,) int.
        middle: (S,).

    Returns:
        (S,); `middle` where the points are too few for a quadric.
    """
    count, size = points.shape
    terms = size + size * (size + 1) // 2
    if count < 2 * terms:
        return middle
    spread = np.maximum(points[-count // 2 :].std(0), 0.05)
    away = (points - middle) / spread
    weights = np.exp(-0.5 * ((away / _REACH) ** 2).sum(1))
    root = np.sqrt(weights)[:, None]
    levels = (rounds[:, None] == np.unique(rounds)) * root  # (C, rounds)
    columns, wanted = _quadratic(away) * root, (values / max(values.std(), 1e-12))[:, None] * root
    columns, wanted = (each - levels @ np.linalg.lstsq(levels, each)[0] for each in (columns, wanted))
    fitted = np.linalg.solve(columns.T @ columns + _RIDGE * np.eye(terms), columns.T @ wanted)[:, 0]
    near = points[weights > np.exp(-2.0)]
    low, high = near.min(0, initial=1.0), near.max(0, initial=0.0)
    looked = low + (high - low) * np.random.default_rng(0).random((4096, size))
    looked = np.concatenate([looked, middle[None]])
    return looked[int(np.argmax(_quadratic((looked - middle) / spread) @ fitted))]


_REACH = 2.0
"""Standard deviations of the later points within which a point counts fully."""
_RIDGE = 0.1


def _quadratic(x: np.ndarray) -> np.ndarray:
    """(C, S) -> (C, S + S (S + 1) / 2): the coordinates, and all products of two."""
    pairs = [x[:, i] * x[:, j] for i in range(x.shape[1]) for j in range(i, x.shape[1])]
    return np.stack([*x.T, *pairs], 1)


def search_of(kind: str, **settings: Any) -> Search:
    """A search by its short name.

    Raises:
        ConfigError: there is none of that name.
    """
    return resolve(kind, SEARCHES, "search")(**settings)
