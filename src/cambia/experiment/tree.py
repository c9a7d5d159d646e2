"""The Experiment tree: every setting of a run in one place.

    >>> experiment = read_experiment("first_growth", {"training.steps": 100})
    >>> experiment.model.hidden_size
    128

The same tree has three doors: these classes from Python, a YAML file, and dotted flags on the command
line. The string under a field is its help. Sections that belong to a part of the library are that
part's own dataclass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from cambia.config import (
    FieldError,
    Member,
    apply_overrides,
    build,
    did_you_mean,
    dump,
    explain,
    load_yaml,
    merged,
    recipes,
)
from cambia.continual.methods import CONTINUAL_METHODS, Method, Methods, refuse
from cambia.continual.methods.experts import Experts
from cambia.continual.methods.replay import Replay
from cambia.data import SOURCES, STREAMS, TOKENIZERS
from cambia.data.orders import Order, SequenceOrder, TaskText
from cambia.data.sources import Source
from cambia.data.tokenizers import TokenizerConfig
from cambia.decoding.settings import DecodingConfig
from cambia.errors import ConfigError, DataError
from cambia.experiment.starts import MODELS, NativeModel, PretrainedModel
from cambia.files import expanded
from cambia.growth.carry import Moments
from cambia.growth.operators import PartOperator
from cambia.growth.rules import Budget, GrowthRule
from cambia.training.optim import OPTIMIZERS, AdamW, Muon
from cambia.training.settings import CheckpointConfig, EvaluationConfig, TrainingConfig
from cambia.training.tracking import TRACKERS, Tracker


@dataclass
class TaskConfig:
    """One task: a stretch of the stream with one source."""

    source: Annotated[Source, Member(SOURCES, "source")]
    """Where its text comes from."""
    name: str | None = None
    """What it is called in tables; the source's name where it is left out."""
    steps: Annotated[int, Gt(0)] | None = None
    """Optimizer steps on this task, instead of the length in `training`."""
    share: Annotated[float, Gt(0)] = 1.0
    """Length of this task as a multiple of the length in `training`."""


@dataclass
class DataConfig:
    """The text of a run."""

    tasks: list[TaskConfig] = field(default_factory=list)
    """The tasks, each with its text; left out where the stream makes its own."""
    stream: Annotated[Order, Member(STREAMS, "stream", default="sequence")] = field(
        default_factory=SequenceOrder
    )
    """How they follow each other, and whether the learner is told; docs/streams.md."""
    valid_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of the documents for validation."""
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of the documents for the final scores."""
    drop_duplicates: bool = False
    """Drop lines of your own validation and test files that also stand in the training text (they are
    reported in any case)."""
    cache_dir: str | None = None
    """Where prepared token files are kept; by default ~/.cache/cambia (or $CAMBIA_CACHE)."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.stream.MAKES_TASKS:
            raise ConfigError("tasks is empty; name at least one")
        names = [self.task_name(i) for i in range(len(self.tasks))]
        if len(set(names)) < len(names):
            raise ConfigError(f"two tasks have one name in {names}: give each its own name")

    def task_name(self, index: int) -> str:
        task = self.tasks[index]
        return task.name or task.source.name or f"task{index}"

    def texts(self) -> list[TaskText]:
        """The tasks that the stream is made of, before their text is prepared.

        Raises:
            FieldError: the stream cannot be made of them.
        """
        given = [TaskText(self.task_name(i), task.source) for i, task in enumerate(self.tasks)]
        try:
            return self.stream.expand(given)
        except (ConfigError, DataError) as error:
            raise FieldError(["data", "stream"], str(error).removeprefix("data.stream: ")) from None

    def length_of(self, stage: str) -> tuple[int | None, float]:
        """Optimizer steps of a stage, where its tasks say them, and else its share of the length.

        Of a mixture both are the mean of its tasks'; one task that a stream makes many of speaks for all.
        """
        names = stage.split("+")
        mine = [task for i, task in enumerate(self.tasks) if self.task_name(i) in names]
        mine = mine or (self.tasks if len(self.tasks) == 1 else [])
        if not mine:
            return None, 1.0
        steps = [task.steps for task in mine if task.steps is not None]
        return (
            round(fmean(steps)) if len(steps) == len(mine) else None,
            fmean(task.share for task in mine),
        )

    @property
    def cache(self) -> Path:
        default = os.environ.get("CAMBIA_CACHE", "~/.cache/cambia")
        return expanded(self.cache_dir or default)


@dataclass
class GrowthConfig:
    """When, where and how much the model grows."""

    enabled: bool = True
    """False trains at the starting size."""
    rules: list[GrowthRule] = field(default_factory=list)
    """Each says when, then what, within which limits."""
    rewarm_steps: Annotated[int, Ge(0)] = 50
    """Steps in which newborn weights come up to their full learning rate; they are not decayed meanwhile."""
    newborn_rate: Annotated[float, Gt(0)] = 1.0
    """The full learning rate of newborn weights, as a multiple of that of the others."""
    moments: Moments = "mean"
    """What becomes of the optimizer's state. mean: kept, and second moments of new weights start with the
    mean of the old ones · zero: kept, and they start with zero · reset: forgotten where a parameter grows."""
    budget: Budget = field(default_factory=Budget)
    """How large the model may become; a growth beyond it is recorded and not done."""
    approve: str | None = None
    """A function of your own, "my_module:function", asked before each growth with its plan and its reason;
    where it returns false, the growth is recorded and not done."""
    dry_run: bool = False
    """Record what would grow, and train at the starting size."""

    @property
    def in_place(self) -> bool:
        """Whether a rule changes the model's own shape."""
        return self.enabled and any(not isinstance(rule.then, PartOperator) for rule in self.rules)


@dataclass
class Experiment:
    """Everything that a run needs to know."""

    data: DataConfig
    """The text, task by task."""
    name: str = "run"
    """Name of the run directory."""
    description: str = ""
    """What it shows, in a sentence."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Of weights, order of the data, replay and growth."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: Annotated[int, Gt(0)] | None = None
    """CPU threads; all cores where it is left out. Results are equal bit by bit only at equal threads."""
    tokenizer: Annotated[TokenizerConfig, Member(TOKENIZERS, "tokenizer")] | None = None
    """How text becomes tokens. Left out: bytes for a native model, the own one of a pretrained model."""
    model: Annotated[NativeModel | PretrainedModel, Member(MODELS, "model", default="native")] = field(
        default_factory=NativeModel
    )
    """The model at the start."""
    optimizer: Annotated[AdamW | Muon, Member(OPTIMIZERS, "optimizer", default="adamw")] = field(
        default_factory=AdamW
    )
    """The optimizer."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    methods: list[Annotated[Method, Member(CONTINUAL_METHODS, "method", default="replay")]] = field(
        default_factory=lambda: [Replay()]
    )
    """What is done against forgetting, several together where they go together; [] fine-tunes naively."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    decoding: DecodingConfig | None = None
    """How the model is decoded from, which learns too; left out, it does not."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: list[Annotated[Tracker, Member(TRACKERS, "tracker")]] = field(default_factory=list)
    """Where the run's numbers are sent besides the run directory."""

    def __post_init__(self) -> None:
        # Sizes are checked here, long before the text is prepared.
        self.model.check(self.training.sequence_length)
        self.tokenizer = self.model.read_by(self.tokenizer)
        training = self.training
        given = [n for n in ("steps", "tokens", "epochs") if getattr(training, n) is not None]
        if len(given) > 1:
            raise FieldError(["training"], f"takes one length, got {' and '.join(given)}: leave one out")
        if not given and not (self.data.tasks and all(task.steps for task in self.data.tasks)):
            raise FieldError(["training"], "has no length: give --training.steps, .tokens or .epochs")
        if training.schedule.over == "task" and not self.data.stream.boundaries:
            raise FieldError(
                ["training", "schedule", "over"],
                "a rate that re-warms in each task shows the learner where tasks begin, which this stream "
                "hides: leave it out, or set --data.stream.boundaries true",
            )
        self._check_decoding()
        try:
            refuse(
                self.method,
                stages=None,
                boundaries=self.data.stream.boundaries,
                grows=self.growth.enabled and bool(self.growth.rules),
                averages=training.average_decay is not None,
            )
        except ConfigError as error:
            raise FieldError(["methods"], str(error)) from None

    def _check_decoding(self) -> None:
        decoding = self.decoding
        if not self.training.neural_steps_per_batch and not (decoding and decoding.engine_update_freq):
            raise FieldError(
                ["training", "neural_steps_per_batch"],
                "is 0 and no decoding learns, so nothing does: raise it, or --decoding.engine_update_freq",
            )
        if decoding is None:
            return
        if decoding.made_for_one_shape and self.growth.in_place:
            raise FieldError(
                ["decoding"],
                "weights of layers and heads and the head for each token have the model's shape, which this "
                "run changes: leave them out, or set --growth.enabled false",
            )
        if any(isinstance(method, Experts) for method in self.methods):
            raise FieldError(
                ["decoding"],
                "cannot learn while experts do: teach them first, then `cambia tune-decoding` on that run",
            )

    @property
    def method(self) -> Method:
        """All of `methods` as one."""
        return self.methods[0] if len(self.methods) == 1 else Methods(self.methods)


def read_tree(experiment: str | Path, *, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """The plain tree of a recipe (by name) or a YAML file, and what to call it in messages.

    A file may say `base:`, a recipe or another file beside it, and then only what differs.
    """
    known = recipes()
    if str(experiment) in known:
        path, source = known[str(experiment)], f"recipe {experiment}"
    else:
        path, source = Path(experiment), str(experiment)
        if path.suffix not in (".yaml", ".yml") and not path.exists():
            hint = did_you_mean(str(experiment), known)
            raise ConfigError(f"{str(experiment)!r} is neither a recipe nor a YAML file{hint}")
    tree = load_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree, source
    if str(path) in above:
        raise ConfigError(f"{source}: its base is, by way of others, itself: {' -> '.join(above)}")
    if not isinstance(base, str):
        raise ConfigError(f"{source}: base is {base!r}; expected a recipe's name or a YAML file")
    below, _ = read_tree(base if base in known else path.parent / base, above=(*above, str(path)))
    return merged(below, tree), source


def read_experiment(experiment: str | Path, flags: Mapping[str, Any] | None = None) -> Experiment:
    """Build an experiment from a recipe's name or a YAML file, with dotted overrides.

    Raises:
        ConfigError: something in it is unknown or out of range; the message names flag or file and place.
    """
    tree, source = read_tree(experiment)
    return experiment_from(tree, source=source, flags=flags or {})


def experiment_from(tree: Mapping[str, Any], *, source: str, flags: Mapping[str, Any]) -> Experiment:
    """Build an experiment from a plain tree with dotted overrides."""
    try:
        return build(Experiment, apply_overrides(tree, flags))
    except FieldError as error:
        raise explain(error, source=source, flags=flags) from None


def plain_tree(experiment: Experiment) -> dict[str, Any]:
    """The tree as plain values: what config.yaml and config.json hold."""
    return dump(experiment)
