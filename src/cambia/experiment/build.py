"""From an `Experiment` to a run: data, tokenizer, model, optimizer, growth, and then the loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from cambia import rundir
from cambia.config import resolve_function, to_yaml
from cambia.data.batches import refuse_short
from cambia.data.corpus import special_ids
from cambia.data.prepare import prepare, train_texts
from cambia.data.sources import TEST, VALID, Splits
from cambia.data.streams import Stream, Task
from cambia.data.tokenizers import Tokenizer, build_tokenizer
from cambia.errors import CheckpointError, ConfigError, OutOfMemoryError, RunError
from cambia.experiment.continued import go_on, refuse_few
from cambia.experiment.decoding import policy_learner
from cambia.experiment.learned import learned, totals
from cambia.experiment.machine import find_device, provenance
from cambia.experiment.results import results_of
from cambia.experiment.starts import model_folder
from cambia.experiment.tree import Experiment, experiment_from, plain_tree, read_experiment
from cambia.growth import GrowthEvent, GrowthManager
from cambia.models.bodies import count_parameters
from cambia.models.saved import load_model
from cambia.rundir import RunReader, RunWriter
from cambia.training import Trainer
from cambia.training.checkpoint import load_state
from cambia.training.engine import Engine

RESUMABLE = (
    "device",
    "threads",
    "model.path",
    "tokenizer.path",
    "optimizer.learning_rate",
    "training.on_nonfinite",
    "checkpoint.",
    "growth.enabled",
    "tracking.",
)
"""Settings that may change when a run goes on; the others are what the run *is*."""


def train(
    experiment: str | Path | Experiment,
    *,
    name: str | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Train an experiment, or go on with a run.

    Args:
        experiment: a recipe's name, a YAML file, or an `Experiment`; not looked at when resuming.
        name: of the run. Left out, the experiment's own, numbered where that is taken.
        resume: go on with the run `name`.
        overrides: dotted settings.

    Returns:
        The run directory; its summary.json tells whether the run finished or was interrupted.

    Raises:
        CambiaError: whatever the user can repair.
    """
    flags = dict(overrides or {})
    if resume:
        folder, experiment = _resumed(name, flags)
    else:
        if not isinstance(experiment, Experiment):
            experiment = read_experiment(experiment, flags)
        elif flags:
            experiment = experiment_from(plain_tree(experiment), source="experiment", flags=flags)
        folder = rundir.run_folder(name) if name else rundir.free_folder(experiment.name)
    _train_into(RunWriter(folder, resume=resume), experiment)
    return folder


def train_in(folder: Path, experiment: Experiment) -> bool:
    """Train in a folder of one's own choice, or go on with what was begun there with the same settings.

    Returns:
        Whether the run has finished; False where it was interrupted.

    Raises:
        CambiaError: whatever the user can repair.
    """
    begun = (folder / rundir.CONFIG_JSON).exists()
    if not begun or not is_finished(RunReader(folder)):
        _train_into(RunWriter(folder, resume=begun), experiment)
    return is_finished(RunReader(folder))


def is_finished(run: RunReader) -> bool:
    """Whether a run was trained to its end."""
    return (run.summary() or {}).get("status") == "finished"


def load(path: str | Path) -> PreTrainedModel:
    """The model of a run (its latest checkpoint), of a checkpoint, or of a Hugging Face folder.

    Raises:
        CheckpointError, RunError: there is none.
    """
    return load_model(model_folder(path))


# ---- putting a run together ----------------------------------------------------------------------


@dataclass
class Assembly:
    """The parts of a run, put together."""

    tokenizer: Tokenizer
    stream: Stream
    stage_steps: list[int]
    trainer: Trainer
    resumed: bool


def _train_into(run: RunWriter, experiment: Experiment) -> None:
    try:
        with one_line_when_out_of_memory(experiment):
            _train(experiment, run)
    finally:
        run.close()


def _train(experiment: Experiment, run: RunWriter) -> None:
    began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    run.recover()
    parts = assemble(experiment, run)
    tree = plain_tree(experiment)
    run.write_config(tree, to_yaml(tree))
    before = RunReader(run.folder).summary() or {}
    base = {
        **provenance(experiment),
        "name": run.folder.name,
        "started": before.get("started", started),
        "parameters_start": before.get("parameters_start", count_parameters(parts.trainer.model)),
        **_data_summary(parts.stream),
    }
    finished = parts.trainer.train(parts.stream, run=run, stage_steps=parts.stage_steps)
    progress, reader = parts.trainer.progress, RunReader(run.folder)
    experts = learned(parts.trainer, parts.stream, reader) if finished else {}
    run.write_summary(
        {
            **base,
            **experts,
            "status": "finished" if finished else "interrupted",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(before.get("wall_seconds", 0.0) + time.perf_counter() - began, 2),
            "parameters_end": count_parameters(parts.trainer.model),
            "steps": progress.step,
            "tokens": progress.tokens,
            "flops": progress.flops,
            "flops_grown": progress.flops_grown,
            "flops_scored": progress.flops_scored,
            "skipped_steps": progress.skipped,
            "optimizer_covers_all_parameters": _covers(parts.trainer),
            **_cost(parts.trainer),
            "results": {**results_of(reader), **_kept(parts.trainer), **totals(experts)} if finished else {},
        }
    )


def _kept(trainer: Trainer) -> dict[str, float]:
    """What the method needs to answer for every task, in parameters and in bytes of earlier text."""
    counts = {f"{name}_parameters": float(n) for name, n in asdict(trainer.method.parameters()).items()}
    return {**counts, "replay_bytes": float(trainer.method.replay_bytes)}


def _cost(trainer: Trainer) -> dict[str, Any]:
    """What an answer costs; a clock, so no result."""
    return {"scoring_ms_per_token": trainer.scorer.ms_per_token}


def assemble(experiment: Experiment, run: RunWriter) -> Assembly:
    """Everything that the loop calls, fresh or as the run's latest checkpoint left it."""
    if experiment.threads:
        torch.set_num_threads(experiment.threads)
    torch.manual_seed(experiment.seed)
    device = find_device(experiment.device)
    tokenizer, stream = open_stream(experiment)
    latest = run.folder / rundir.LATEST
    resumed = latest.exists()
    if not resumed and ((run.folder / rundir.SUMMARY).exists() or any(run.folder.glob("ckpt_*"))):
        raise RunError(
            f"{run.folder} has been trained and has no {rundir.LATEST}/ to go on from: start it again under "
            "another --name"
        )
    if resumed:
        model = load_model(latest)
    else:
        model = experiment.model.build(tokenizer, sequence_length=experiment.training.sequence_length)
    model = model.to(device)
    model.train()
    growth = None
    settings = experiment.growth
    if settings.enabled and settings.rules:
        growth = GrowthManager(
            settings.rules,
            check_batch=_check_batch(stream, experiment.training.sequence_length),
            rewarm_steps=settings.rewarm_steps,
            newborn_rate=settings.newborn_rate,
            moments=settings.moments,
            seed=experiment.seed,
            context=experiment.training.sequence_length,
            budget=settings.budget,
            approve=resolve_function(settings.approve, (), "function") if settings.approve else None,
            dry_run=settings.dry_run,
        )
    engine = None
    if experiment.decoding is not None:
        learner = policy_learner(experiment, model, tokenizer, stream)
        engine = Engine(learner, experiment.decoding.engine_update_freq)
    trainer = Trainer(
        model,
        optimizer=experiment.optimizer,
        config=experiment.training,
        evaluation=experiment.evaluation,
        checkpoint=experiment.checkpoint,
        growth=growth,
        method=experiment.method,
        tokenizer=tokenizer.hf,
        tracking=experiment.tracking,
        seed=experiment.seed,
        engine=engine,
    )
    trainer.begin(stream)
    if resumed:
        _take_up(run, trainer, stream)
    else:
        run.cut_logs(dict.fromkeys(rundir.LOGS, 0))
        if not go_on(trainer, experiment.model, experiment.training.sequence_length):
            refuse_few(trainer, sum(stage_steps(experiment, stream)) * stream.batch_size)
    return Assembly(tokenizer, stream, stage_steps(experiment, stream), trainer, resumed)


def _take_up(run: RunWriter, trainer: Trainer, stream: Stream) -> None:
    """Go on where the run's latest checkpoint was written."""
    latest = run.folder / rundir.LATEST
    state = load_state(latest)
    run.cut_logs(state["log_lengths"])
    grown = [GrowthEvent.from_dict(line) for line in RunReader(run.folder).growth()]
    try:
        trainer.load_state_dict(state, grown)
        stream.load_state_dict(state["stream"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{latest} is of another version of Cambia ({type(error).__name__}: {error}): go on with "
            "that one, or begin a new run under another --name; its weights can be read, --model.path"
        ) from error


def open_stream(experiment: Experiment) -> tuple[Tokenizer, Stream]:
    """Tokenizer and prepared tasks; what is prepared already is only opened."""
    chosen = experiment.model.ready(experiment.tokenizer)
    if experiment.growth.in_place:
        experiment.model.can_grow()
    data = experiment.data
    texts = data.texts()
    splits = Splits(valid_fraction=data.valid_fraction, test_fraction=data.test_fraction)
    readers = [train_texts(text.source, splits) for text in texts]
    tokenizer = build_tokenizer(chosen, texts=lambda: _in_turns([read() for read in readers]))
    experiment.model.fit(tokenizer)
    tasks = []
    console = Console(stderr=True)
    for i, text in enumerate(texts):
        with console.status(f"preparing text {i + 1} of {len(texts)}: {text.name}"):
            corpus = prepare(
                text.source,
                tokenizer,
                cache_dir=data.cache,
                splits=splits,
                drop_duplicates=data.drop_duplicates,
            )
        for split in (VALID, TEST):
            refuse_short(corpus.splits[split], experiment.evaluation.context_tokens, f"{text.name} ({split})")
        tasks.append(Task(text.name, corpus, special_ids=special_ids(tokenizer)))
    tasks, stages = data.stream.lay_out(tasks, experiment.seed)
    stream = Stream(
        tasks,
        stages,
        batch_size=experiment.training.batch_size,
        sequence_length=experiment.training.sequence_length,
        seed=experiment.seed,
        boundaries=data.stream.boundaries,
    )
    return tokenizer, stream


def _in_turns(readers: Sequence[Iterator[str]]) -> Iterator[str]:
    """One text of each in turn, so that a tokenizer that stops early has learned from every domain."""
    for texts in itertools.zip_longest(*readers):
        yield from (text for text in texts if text is not None)


def stage_steps(experiment: Experiment, stream: Stream) -> list[int]:
    """Optimizer steps of each stage, from whichever length was given."""
    lengths = [experiment.data.length_of(stage.name) for stage in stream.stages]
    return [
        steps or experiment.training.steps_of(num_tokens, stream.tokens_per_batch, share=share)
        for (steps, share), num_tokens in zip(lengths, stream.lengths, strict=True)
    ]


def _check_batch(stream: Stream, sequence_length: int) -> torch.Tensor:
    """(B, T) ids of validation text of the first task: the fixed batch on which growth is verified."""
    tokens = stream.tasks[0].corpus.splits["valid"].tokens
    length = min(sequence_length, 128, len(tokens))
    rows = max(1, min(4, len(tokens) // length))
    flat = torch.tensor(tokens[: rows * length].astype("int64"))
    return flat.view(rows, length)


# ---- names, records, and what can go wrong -------------------------------------------------------


def _resumed(name: str | None, flags: Mapping[str, Any]) -> tuple[Path, Experiment]:
    if name is None:
        raise ConfigError("--resume needs the name of a run; `cambia runs list` shows them")
    reader = RunReader(name)
    fixed = [flag for flag in flags if not flag.startswith(RESUMABLE)]
    if fixed:
        raise ConfigError(
            f"--{fixed[0]} cannot change while the run {reader.name!r} goes on: start a new run with it, "
            f"or leave it out (these may change: {', '.join(RESUMABLE)})"
        )
    return reader.folder, experiment_from(reader.config(), source=str(reader.folder), flags=flags)


@contextmanager
def one_line_when_out_of_memory(experiment: Experiment) -> Generator[None]:
    """Turn what PyTorch says where memory is full into `OutOfMemoryError`, with the settings that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(
            sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
        ):
            raise
        training = experiment.training
        raise OutOfMemoryError(
            f"out of memory with --training.batch_size {training.batch_size}, --training.accumulation "
            f"{training.accumulation}, --training.sequence_length {training.sequence_length}: raise "
            "accumulation, lower batch size or length, or set --training.gradient_checkpointing true"
        ) from error


def _covers(trainer: Trainer) -> bool:
    managed = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return all(id(p) in managed for p in trainer.model.parameters() if p.requires_grad)


def _data_summary(stream: Stream) -> dict[str, Any]:
    rows, notes = [], []
    for task, batches in zip(stream.tasks, stream.batches, strict=True):
        splits = task.corpus.splits
        rows.append(
            {
                "name": task.name,
                "source": _described(task),
                **{f"{split}_bytes": file.num_bytes for split, file in splits.items()},
                "documents": sum(file.num_documents for file in splits.values()),
            }
        )
        if batches.packed is not None:
            rows[-1]["longer_than_a_sequence"] = batches.packed.cut
        if batches.packed is not None and batches.packed.cut:
            notes.append(
                f"{task.name}: {batches.packed.cut:,} of {splits['train'].num_documents:,} examples are "
                f"longer than {stream.sequence_length} tokens: their answers are trained on whole, and see "
                "only as much of their instructions as fits (--training.sequence_length)"
            )
        fallback = task.corpus.summary["configuration"]["source"].get("fallback")
        if fallback:
            notes.append(f"{task.name}: {fallback}")
    return {"tasks": [task.name for task in stream.tasks], "data": rows, "notes": notes}


def _described(task: Task) -> str:
    """A source in a few words: its type and what it was given."""
    source = task.corpus.summary["configuration"]["source"]
    known = ("type", "domain", "task", "dataset", "path")
    return " ".join(str(source[key]) for key in known if isinstance(source.get(key), str))
