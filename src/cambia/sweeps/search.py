"""Values that are searched for beside a grid: for each combination of its axes a study of its own.

    search:
      trials: 20
      space:
        optimizer.learning_rate: {low: 1e-4, high: 1e-2, log: true}
        model.num_hidden_layers: [4, 6, 8]
      metric: validation_bits_per_byte

Each trial is run with every seed of the grid and judged by the mean, so arms that are compared get the same
number of trials. The studies are Optuna's; they live in the sweep's folder and go on where they stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt

from cambia.config import FieldError
from cambia.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage

STORAGE = "search.log"


@dataclass
class Range:
    """Numbers between two bounds."""

    low: float
    """The smallest."""
    high: float
    """The largest."""
    log: bool = False
    """Search evenly in the logarithm."""
    integer: bool = False
    """Whole numbers only."""

    def __post_init__(self) -> None:
        for bound, value in (("low", self.low), ("high", self.high)):
            if not math.isfinite(value):
                raise FieldError([bound], f"expected a finite number, got {value!r}")
            if self.integer and not float(value).is_integer():
                raise FieldError([bound], f"expected a whole number with integer: true, got {value!r}")
        if not self.low < self.high or (self.log and self.low <= 0):
            raise FieldError(
                ["low"], f"expected low < high, above 0 with log, got {self.low} and {self.high}"
            )


@dataclass
class Search:
    """What is searched for, how and how long."""

    space: dict[str, Range | list[Any]]
    """A dotted setting -> a range of numbers, or a list to choose from."""
    trials: Annotated[int, Gt(0)] = 20
    """For each combination of the axes."""
    metric: str = "validation_bits_per_byte"
    """What is judged by, the mean over seeds; never choose by the test text."""
    maximize: bool = False
    """Whether more of it is better."""
    sampler: Literal["tpe", "cmaes", "random"] = "tpe"
    """How the next values are thought of: tree-structured Parzen estimator, CMA-ES, or at random."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the sampler."""

    def __post_init__(self) -> None:
        if not self.space:
            raise FieldError(["space"], "is empty; name at least one setting and its range")
        for key, room in self.space.items():
            if isinstance(room, list):
                _check_choices(key, room)


def _check_choices(key: str, room: list[Any]) -> None:
    """Refuse what Optuna's storage cannot hold, which it says late or never."""
    if not room:
        raise FieldError(["space", key], "is empty; give it at least one value, or leave it out")
    for value in room:
        if not isinstance(value, str | int | float | None):  # true and false are whole numbers
            raise FieldError(
                ["space", key],
                f"expected numbers, words, true, false or null, got {value!r}: make such values an axis",
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise FieldError(["space", key], f"expected finite numbers, got {value!r}")


@dataclass
class Running:
    """A trial that waits for its cells."""

    trial: Trial
    waiting: set[str]
    """Hashes of cells without a result."""
    values: list[float] = field(default_factory=list)


class Studies:
    """Optuna studies in a sweep's folder, one for each combination of the axes.

    Raises:
        MissingExtraError: Optuna is not installed.
    """

    def __init__(self, search: Search, folder: Path, combinations: Sequence[str]):
        storage = _storage(folder)
        import optuna

        self.search = search
        self.studies: dict[str, Study] = {
            name: optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize" if search.maximize else "minimize",
                load_if_exists=True,
            )
            for name in combinations
        }
        for i, name in enumerate(combinations):
            # A search that goes on must not think of its first values again.
            self.studies[name].sampler = _sampler(search, [search.seed, i, self.begun(name)])

    def unfinished(self, combination: str) -> list[Trial]:
        """Trials that were begun and not judged: by a launcher that was killed, or by another one."""
        from optuna import Trial
        from optuna.trial import TrialState

        study = self.studies[combination]
        waiting = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # A trial that died before it chose all its values chooses the rest now.
        return [Trial(study, trial._trial_id) for trial in waiting]

    def begun(self, combination: str) -> int:
        """Trials so far, judged or not."""
        return len(self.studies[combination].get_trials(deepcopy=False))

    def ask(self, combination: str) -> Trial:
        """A new trial."""
        return self.studies[combination].ask()

    def values(self, trial: Trial) -> dict[str, Any]:
        """What a trial has chosen: setting -> value; equal whenever it is asked."""
        return {key: _suggested(trial, key, room) for key, room in self.search.space.items()}

    def tell(self, combination: str, trial: Trial, values: Sequence[float]) -> None:
        """Judge a trial by its cells' values; without any, it has failed."""
        from optuna.trial import TrialState

        study = self.studies[combination]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if values:
                study.tell(trial.number, sum(values) / len(values), skip_if_finished=True)
            else:
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def refuse_changed(search: Search, folder: Path) -> None:
    """Refuse a search that is not the one that a sweep's folder began with, as far as its studies know.

    Optuna takes back neither a list's values nor what is better, and says the former in mid-run, the latter
    never. Bounds may change.

    Raises:
        ConfigError: it was changed.
        MissingExtraError: Optuna is not installed.
    """
    if not (folder / STORAGE).exists():
        return
    storage = _storage(folder)
    from optuna import load_study
    from optuna.distributions import check_distribution_compatibility
    from optuna.study import StudyDirection, get_all_study_names

    other = f"the sweep in {folder} began otherwise: change it back, or choose another --name"
    wanted = StudyDirection.MAXIMIZE if search.maximize else StudyDirection.MINIMIZE
    for name in get_all_study_names(storage):
        study = load_study(study_name=name, storage=storage)
        if study.direction != wanted:
            raise ConfigError(f"search.maximize {str(search.maximize).lower()}: {other}")
        for trial in study.get_trials(deepcopy=False):
            for key in trial.distributions.keys() & search.space.keys():
                try:
                    check_distribution_compatibility(
                        trial.distributions[key], _distribution(search.space[key])
                    )
                except ValueError:
                    raise ConfigError(f"search.space.{key}: {other}") from None


def _storage(folder: Path) -> JournalStorage:
    try:
        import optuna
    except ImportError:
        raise MissingExtraError.of("optuna", "sweep") from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(folder / STORAGE)))


def _distribution(room: Range | Sequence[Any]) -> BaseDistribution:
    from optuna import distributions

    if not isinstance(room, Range):
        return distributions.CategoricalDistribution(list(room))
    if room.integer:
        return distributions.IntDistribution(int(room.low), int(room.high), log=room.log)
    return distributions.FloatDistribution(room.low, room.high, log=room.log)


def _suggested(trial: Trial, key: str, room: Range | Sequence[Any]) -> Any:
    if not isinstance(room, Range):
        return trial.suggest_categorical(key, list(room))
    if room.integer:
        return trial.suggest_int(key, int(room.low), int(room.high), log=room.log)
    return trial.suggest_float(key, room.low, room.high, log=room.log)


def _sampler(search: Search, entropy: Sequence[int]) -> BaseSampler:
    from optuna import samplers

    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=seed)
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise MissingExtraError.of("cmaes", "sweep") from None
    return samplers.CmaEsSampler(seed=seed)


def said(choice: Mapping[str, Any]) -> str:
    """A combination of the axes, as the name of its study."""
    return ", ".join(f"{axis}={value}" for axis, value in choice.items() if axis != "seed") or "all"
