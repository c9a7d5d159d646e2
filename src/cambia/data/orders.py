"""Orders: how the tasks of a run are laid out in stages, and which tasks there are.

`expand` works on names and sources before any text is prepared, `lay_out` on prepared tasks afterwards.
What is drawn is drawn from the run's seed.

    >>> order = SequenceOrder(order=["english", "python", "english"])
    >>> texts = order.expand([TaskText("english", EmbeddedSource("english")), TaskText("python", ...)])
    >>> tasks, stages = order.lay_out([Task(text.name, prepare(text.source, ...)) for text in texts], seed=0)
    >>> stream = Stream(tasks, stages, batch_size=8, sequence_length=256, seed=0, boundaries=order.boundaries)
    >>> [stage.name for stage in stream.stages]
    ['english', 'python', 'english']
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from cambia.config import FieldError, did_you_mean
from cambia.data.filters import FieldFilter
from cambia.data.generated import GeneratedSource
from cambia.data.sources import TRAIN, Source
from cambia.data.streams import Stage, Task, check_names
from cambia.data.textfiles import ROW_SUFFIXES, FilesSource, list_files, read_rows
from cambia.errors import ConfigError, DataError

# V token ids, P permutations


@dataclass(frozen=True)
class TaskText:
    """A task before its text is prepared."""

    name: str
    source: Source


@dataclass(frozen=True, kw_only=True)
class Order(ABC):
    """How the tasks of a run follow each other."""

    boundaries: bool = True
    """The learner is told where a task begins and ends. False: methods that need to know are refused."""

    FEWEST: ClassVar[int] = 2
    """Tasks that it needs."""
    MAKES_TASKS: ClassVar[bool] = False
    """Whether `expand` makes the tasks, and none may be given."""

    def expand(self, tasks: list[TaskText]) -> list[TaskText]:
        """The tasks whose text is prepared; by default those that were given.

        Raises:
            ConfigError, DataError: this order cannot be made of them; the path of a `FieldError` begins here.
        """
        self._check([task.name for task in tasks])
        return tasks

    @abstractmethod
    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        """The tasks of the stream, which are the columns of the task matrix, and its stages.

        Raises:
            ConfigError: this order cannot be made of them.
        """

    def _check(self, names: Sequence[str]) -> None:
        if len(names) < self.FEWEST:
            raise ConfigError(
                f"this order takes {self.FEWEST} tasks or more, there are {len(names)}: name "
                "more in data.tasks"
            )
        check_names(names)


def _check_one(kind: str, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise ConfigError(
            f"a stream of type {kind} is made of one text, and data.tasks names {len(names)}: "
            "leave one, or make one of them by a source of `type: mixture`"
        )


# ---- one task at a time --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SequenceOrder(Order):
    """One task after another, in any order, as often as one likes.

    First comes the sequence; `block` then makes of each of its tasks so many stages in a row, and `rounds`
    repeats the whole.
    """

    order: list[str] = dataclasses.field(default_factory=list)
    """Names of tasks, one for each stage; a task may come again (A, B, A, C, B), and one that is left out is
    scored and never trained. Empty: each task once, as given."""
    rounds: Annotated[int, Gt(0)] = 1
    """Go through the sequence so many times (round robin)."""
    block: Annotated[int, Gt(0)] = 1
    """Each task of the sequence is so many stages in a row."""
    order_by_seed: bool = False
    """Begin with the task whose number is the seed modulo the number of tasks, and go on from there, round to
    the one before it: over as many seeds as there are tasks, each task stands once at each place."""

    FEWEST: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.order and self.order_by_seed:
            raise FieldError(["order_by_seed"], "`order` names the sequence already: leave one of them out")

    def _check(self, names: Sequence[str]) -> None:
        super()._check(names)
        for name in self.order:
            if name not in names:
                raise FieldError(["order"], f"there is no task {name!r}{did_you_mean(name, names)}")

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        self._check([task.name for task in tasks])
        first = seed % len(tasks) if self.order_by_seed else 0
        tasks = [*tasks[first:], *tasks[:first]]
        names = [task.name for task in tasks]
        once = [name for name in self.order or names for _ in range(self.block)]
        return tasks, [Stage.only(names, names.index(name)) for name in once * self.rounds]


@dataclass(frozen=True, kw_only=True)
class StationaryOrder(Order):
    """One text for all stages: nothing changes, and whoever sees a change is mistaken."""

    stages: Annotated[int, Gt(0)] = 4
    """How many stages the text is trained on."""
    order: Literal["shuffled", "contiguous"] = "shuffled"
    """shuffled: windows in a random order · contiguous: in the order of the text, which then drifts as the
    text itself does."""
    boundaries: bool = False
    """The learner is told where a stage begins and ends. False: methods that need to know are refused."""

    FEWEST: ClassVar[int] = 1

    def _check(self, names: Sequence[str]) -> None:
        super()._check(names)
        _check_one("stationary", names)

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        self._check([task.name for task in tasks])
        task = dataclasses.replace(tasks[0], shuffle=self.order == "shuffled")
        return [task], [Stage.only([task.name], 0)] * self.stages


# ---- several tasks at a time ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MixturesOrder(Order):
    """Each stage mixes some of the tasks at equal shares; which ones is drawn by the seed.

    Every task is drawn equally often, up to one.
    """

    domains: Annotated[int, Gt(0)] = 2
    """Tasks in each stage."""
    stages: Annotated[int, Gt(0)] = 8
    """How many stages there are."""

    def _check(self, names: Sequence[str]) -> None:
        super()._check(names)
        if self.domains > len(names):
            raise FieldError(
                ["domains"],
                f"each stage mixes {self.domains} tasks, there are {len(names)}: name more in data.tasks, or "
                f"mix at most {len(names)}",
            )

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        names = [task.name for task in tasks]
        self._check(names)
        rng = np.random.default_rng(seed)
        drawn = np.zeros(len(names), dtype=np.int64)
        stages = []
        for _ in range(self.stages):
            by_chance = rng.permutation(len(names))
            chosen = by_chance[np.argsort(drawn[by_chance], kind="stable")][: self.domains]
            drawn[chosen] += 1
            stages.append(Stage.of(names, [(i in chosen) / self.domains for i in range(len(names))]))
        return tasks, stages


@dataclass(frozen=True, kw_only=True)
class GradualOrder(Order):
    """Each task once, in order, and each passes over to the next at the end of its stage, row by row.

    A stage is called after the task that it begins with.
    """

    overlap: Annotated[float, Gt(0), Le(1)] = 0.5
    """The share of a stage, its last, over which the next task's text takes the place of its own."""
    boundaries: bool = False
    """The learner is told where a stage begins and ends. False: methods that need to know are refused."""

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        names = [task.name for task in tasks]
        self._check(names)
        pure = [Stage.only(names, index) for index in range(len(names))]
        passing = [
            dataclasses.replace(stage, until=after.weights, hold=1 - self.overlap)
            for stage, after in itertools.pairwise(pure)
        ]
        return tasks, [*passing, pure[-1]]


# ---- a benchmark made of one corpus --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PermutedVocabularyOrder(Order):
    """Tasks made of one corpus by giving its token ids other meanings, as TG-SMN's benchmark does.

    Each task reads the text through a permutation of the ids; special ones stay as they are. What one task
    teaches about an id is wrong in another, while the text stays as hard as it was.

    Tasks are called after their permutations, perm0, perm1, ... Where permutations repeat, each task still
    is its own, with its share of the training text and a column of the task matrix: the second one that reads
    through the first permutation is perm0.2. All are scored on the whole validation and test text of the
    corpus, each through its permutation.
    """

    tasks: Annotated[int, Gt(1)] = 10
    """How many tasks to make."""
    mode: Literal["unique", "repeat", "drift"] = "unique"
    """unique: each task has a permutation of its own · repeat: `period` permutations take turns · drift: the
    first task is the text as it is, and each further one swaps some more ids."""
    period: Annotated[int, Gt(0)] = 4
    """With repeat: how many permutations take turns."""
    swaps: Annotated[int, Ge(0)] = 150
    """With drift: how many random pairs of ids are swapped from one task to the next."""
    chunks: bool = True
    """Each task trains on its own stretch of the training text; false: each on all of it."""

    FEWEST: ClassVar[int] = 1

    def _check(self, names: Sequence[str]) -> None:
        super()._check(names)
        _check_one("permuted_vocabulary", names)

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        self._check([task.name for task in tasks])
        (whole,) = tasks
        documents = whole.corpus.splits[TRAIN].num_documents
        if self.chunks and documents < self.tasks:
            raise ConfigError(
                f"data.stream.tasks: {whole.name!r} has {documents} training documents for {self.tasks} "
                "tasks: give more text, make fewer tasks, or set chunks to false"
            )
        free = _free_ids(whole)
        used = _permutations(self, whole.corpus.vocab_size, free, np.random.default_rng(seed))
        made = [self._task(whole, number, permutation) for number, permutation in enumerate(used)]
        names = [task.name for task in made]
        return made, [Stage.only(names, number) for number in range(self.tasks)]

    def _task(self, whole: Task, number: int, permutation: np.ndarray) -> Task:
        visit, which = divmod(number, self.period) if self.mode == "repeat" else (0, number)
        splits = dict(whole.corpus.splits)
        if self.chunks:
            splits[TRAIN] = splits[TRAIN].chunk(number, self.tasks)
        return dataclasses.replace(
            whole,
            name=f"perm{which}" + (f".{visit + 1}" if visit else ""),
            corpus=dataclasses.replace(whole.corpus, splits=splits),
            permutation=permutation,
        )


def _free_ids(task: Task) -> np.ndarray:
    """The ids that a permutation may move, ascending."""
    if task.special_ids is None:
        raise ConfigError(
            f"the task {task.name!r} does not say which ids are special, and a permutation must leave them "
            "alone: Task(..., special_ids=special_ids(tokenizer))"
        )
    return np.setdiff1d(np.arange(task.corpus.vocab_size), task.special_ids)


def _permutations(
    order: PermutedVocabularyOrder, size: int, free: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The permutation of each task, (V,); only the `free` ids move."""
    if order.mode == "drift":
        yield from itertools.islice(_drifting(size, free, order.swaps, rng), order.tasks)
        return
    different = min(order.period, order.tasks) if order.mode == "repeat" else order.tasks
    drawn = np.tile(np.arange(size), (different, 1))  # (P, V)
    for permutation in drawn:
        permutation[free] = rng.permutation(free)
    yield from (drawn[number % different] for number in range(order.tasks))


def _drifting(size: int, free: np.ndarray, swaps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    permutation = np.arange(size)
    while True:
        yield permutation.copy()
        for _ in range(swaps):
            pair = rng.choice(free, size=2, replace=False)
            permutation[pair] = permutation[pair[::-1]]


# ---- orders that bring their own tasks -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _OwnTasks(Order):
    """One task after another, all of them made by the order itself."""

    MAKES_TASKS: ClassVar[bool] = True

    @abstractmethod
    def _made(self) -> list[TaskText]:
        """The tasks."""

    def expand(self, tasks: list[TaskText]) -> list[TaskText]:
        if tasks:
            raise ConfigError(
                f"this order makes its own tasks, and data.tasks names {tasks[0].name!r} beside them: leave "
                "data.tasks out, or take `type: sequence`"
            )
        return super().expand(self._made())

    def lay_out(self, tasks: list[Task], seed: int) -> tuple[list[Task], list[Stage]]:
        names = [task.name for task in tasks]
        self._check(names)
        return tasks, [Stage.only(names, index) for index in range(len(names))]


@dataclass(frozen=True, kw_only=True)
class SkillsOrder(_OwnTasks):
    """Instructions sorted by skill: each skill of one file is a task, in the order of first appearance.

    Answers are trained on, instructions are shown. Tasks are called after their skills, with p for a plus
    sign: c++ is called cpp.
    """

    path: str | list[str] = ""
    """A jsonl, JSON or parquet file, a folder of such, or a list of them."""
    skill_field: str = "skill"
    """The field of a row that names its skill; every row must have it."""
    instruction_field: str = "instruction"
    """The field with the instruction, shown and not trained on."""
    input_field: str | None = None
    """The field with the instruction's input, where there is one; shown and not trained on."""
    output_field: str = "output"
    """The field with the answer, which is trained on."""

    def __post_init__(self) -> None:
        if not self.path:
            raise FieldError(
                ["path"], "missing: a file of rows that have a skill, an instruction and an answer"
            )

    def _made(self) -> list[TaskText]:
        return [TaskText(skill.replace("+", "p"), self._source(skill)) for skill in self._skills()]

    def _source(self, skill: str) -> FilesSource:
        return FilesSource(
            path=self.path,
            instruction_field=self.instruction_field,
            input_field=self.input_field,
            output_field=self.output_field,
            filters=[FieldFilter(self.skill_field, skill)],
        )

    def _skills(self) -> list[str]:
        skills: dict[str, None] = {}  # in the order of first appearance
        without: list[str] = []
        rows = 0
        for row, place in self._rows():
            rows += 1
            value = row.get(self.skill_field) if isinstance(row, Mapping) else None
            if isinstance(value, str | int) and str(value).strip():
                skills.setdefault(str(value))
            else:
                without.append(place)
        if without:
            raise DataError(
                f"{len(without)} of {rows} rows have no skill in their field {self.skill_field!r}, the first "
                f"is {without[0]}: give each row one, take such rows out, or set data.stream.skill_field"
            )
        if len(skills) < self.FEWEST:
            raise DataError(
                f"the field {self.skill_field!r} names {len(skills)} skills in {rows} rows "
                f"({', '.join(skills)}); expected at least {self.FEWEST}: set data.stream.skill_field"
            )
        return list(skills)

    def _rows(self) -> Iterator[tuple[Any, str]]:
        for name, file in list_files(self.path):
            if not name.removesuffix(".gz").lower().endswith(ROW_SUFFIXES):
                raise DataError(f"{file} has no rows with fields; expected {', '.join(ROW_SUFFIXES)}")
            yield from read_rows(file)


@dataclass(frozen=True, kw_only=True)
class CountingOrder(_OwnTasks):
    """Counting by 1, by 2, ... and down: generated skills that can be told apart, one task per step."""

    skills: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, -1])
    """The step of each task, in order; a negative one counts down."""
    difficulty: Annotated[int, Ge(1), Le(3)] = 1
    """How long the numbers are: they begin below 1000, 10,000 or 100,000."""
    size_bytes: Annotated[int, Gt(0)] = 500_000
    """How much text to write for each task, in bytes."""

    def __post_init__(self) -> None:
        if len(self.skills) < 2 or 0 in self.skills or len(set(self.skills)) < len(self.skills):
            raise FieldError(
                ["skills"], f"expected two steps or more that differ, none of them 0, got {self.skills}"
            )

    def _made(self) -> list[TaskText]:
        return [
            TaskText(
                f"{'up' if step > 0 else 'down'}_{abs(step)}",
                GeneratedSource(
                    task="counting", step=step, difficulty=self.difficulty, size_bytes=self.size_bytes
                ),
            )
            for step in self.skills
        ]
