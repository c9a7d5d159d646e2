"""The one training loop.

It reads from top to bottom: a batch, what it trains, a step, what was measured, growth, records. It
calls its parts by name and broadcasts nothing.

    trainer = Trainer(model=model, growth=GrowthManager(rules), config=TrainingConfig(steps=500))
    trainer.train(dataloader)

Everything that a resumed run needs to go on bit by bit is in `state_dict`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cambia import rundir
from cambia.continual.methods import Method, Naive, Situation, refuse
from cambia.continual.methods.method import AnyStream
from cambia.data.batches import Batch
from cambia.data.loaders import LoaderStream
from cambia.data.streams import Stream
from cambia.errors import ConfigError, NonFiniteLossError
from cambia.growth import GrowthManager
from cambia.models.bodies import count_parameters, flops_per_token
from cambia.probes import Likelihood
from cambia.records import Allocation, Allocator, Knobs, Measured, Signals
from cambia.rundir import RunWriter
from cambia.training.allocation import PlainAllocator
from cambia.training.audit import record_stage
from cambia.training.averaging import WeightAverage
from cambia.training.checkpoint import save_checkpoint
from cambia.training.described import described, summary
from cambia.training.display import Display
from cambia.training.engine import Engine
from cambia.training.interrupts import Interrupts
from cambia.training.journal import Journal
from cambia.training.optim import AdamW, Optimizer, check_covered
from cambia.training.scoring import Scorer
from cambia.training.settings import CheckpointConfig, EvaluationConfig, Progress, TrainingConfig
from cambia.training.state import Stateful
from cambia.training.step import Stepped, Stepper
from cambia.training.tracking import Tracker, tracked


class Trainer(Stateful):
    """Trains a model on a stream or on a data loader of one's own, growing it on the way.

    Args:
        model: trained in place.
        optimizer: the settings of one, AdamW's by default, or one of the model's parameters.
        config, evaluation, checkpoint: see there. Without a length in `config` it is one pass over the data.
        growth: asked after every step; None never grows. One without a model takes this one.
        allocator: decides what a batch trains.
        method: what is done against forgetting; nothing by default.
        tokenizer: saved beside the model, and with it a loader's text is counted in bytes.
        tracking: who is told what the run directory is told.
        seed: of what the method draws.
        engine: lets how the model is decoded from learn too; None: it does not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        optimizer: torch.optim.Optimizer | Optimizer | None = None,
        config: TrainingConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        checkpoint: CheckpointConfig | None = None,
        growth: GrowthManager | None = None,
        allocator: Allocator | None = None,
        method: Method | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tracking: Sequence[Tracker] = (),
        seed: int = 0,
        engine: Engine | None = None,
    ):
        self.model = model
        self.method = method or Naive()
        self.trained = self.method.prepare(model)
        ready = isinstance(optimizer, torch.optim.Optimizer)
        self.optimizer = optimizer if ready else (optimizer or AdamW()).build(self.trained)
        check_covered(self.optimizer, self.trained, self.model)
        self.config = config or TrainingConfig()
        self.evaluation = evaluation or EvaluationConfig()
        self.checkpoint = checkpoint or CheckpointConfig()
        self.growth = growth
        if growth is not None:
            growth.join(model, self.optimizer)
        decay = self.config.average_decay
        self.average = WeightAverage(model, decay) if decay else None
        if growth is not None and self.average is not None:
            growth.holders.append(self.average)
        self.allocator = allocator or PlainAllocator()
        self.tokenizer, self.engine = tokenizer, engine
        self.tracking = list(tracking)
        self.knobs = Knobs()
        self.progress = Progress()
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.context = self.config.sequence_length
        self.seed = seed
        self._stream: AnyStream | None = None
        self.values: dict[str, Measured] = {}
        self.step = Stepper(self.model, self.optimizer, self.config, self.method, self.trained)
        self.scorer = Scorer(
            model,
            self.evaluation,
            autocast=self.step.autocast,
            average=self.average,
            method=self.method,
        )
        self._shape_changed()

    # ---- the loop --------------------------------------------------------------------------------

    def train(
        self,
        data: Stream | LoaderStream | Iterable[Any],
        *,
        run: RunWriter | None = None,
        stage_steps: list[int] | None = None,
        validation: Iterable[Any] | None = None,
    ) -> bool:
        """Train until every task has had its steps.

        Args:
            data: a stream, or any iterable of batches: tensors (B, T) of token ids, or mappings with
                input_ids and, where it differs from them, labels (see `cambia.data.loaders`).
            run: where everything is recorded; a new run directory named "training" by default.
            stage_steps: optimizer steps of each task; by default what `config` says.
            validation: batches to measure the validation loss on, where `data` is no stream.

        Returns:
            False if it was interrupted (the run is saved and can be resumed), else True.

        Raises:
            NonFiniteLossError: the loss broke and `on_nonfinite` is "stop".
        """
        if not isinstance(data, Stream | LoaderStream):
            data = LoaderStream(data, validation=validation, tokenizer=self.tokenizer)
        self.begin(data)
        if self.growth is not None and not self.progress.step:
            measured = self.evaluation.measured if data.has_validation else []
            self.growth.check({"loss", "grad_norm", "learning_rate", *measured, *self.method.measures})
        lengths = stage_steps or [self.config.steps_of(n, data.tokens_per_batch) for n in data.lengths]
        if run is not None:
            return self._train(data, run, lengths)
        run = RunWriter(rundir.free_folder("training"))
        try:
            run.write_config(described(self.config, self.evaluation, self.checkpoint, self.growth), "")
            finished = self._train(data, run, lengths)
            run.write_summary(summary(self.progress, self.parameters, finished=finished))
            return finished
        finally:
            run.close()

    def begin(self, stream: AnyStream) -> None:
        """Take up a stream; `train` does it, unless a state was loaded before.

        Raises:
            ConfigError: the method cannot work on it, or with what else was asked for.
        """
        if self._stream is stream:
            return
        if self._stream is not None:
            raise ConfigError("this trainer has a stream already: make a new Trainer for another")
        self._stream = stream
        self.context = stream.sequence_length
        if self.growth is not None and self.growth.context is None:
            self.growth.context = self.context
        self._shape_changed()
        refuse(
            self.method,
            stages=len(stream.stages),
            boundaries=stream.boundaries,
            grows=self.growth is not None,
            averages=self.average is not None,
        )
        self.method.check(sequence_length=stream.sequence_length, vocab_size=self.model.config.vocab_size)
        self.method.attach(
            Situation(
                self.model,
                self.optimizer,
                stream,
                self.seed,
                trained=self.trained,
                weights=self.method.saved_weights,
                autocast=self.step.autocast,
            )
        )
        self.allocator = self.method.allocator() or self.allocator

    def _train(self, stream: AnyStream, run: RunWriter, stage_steps: list[int]) -> bool:
        p, config, names = self.progress, self.config, [stage.name for stage in stream.stages]
        ends = self.earlier_ends(stream, stage_steps)
        with (
            tracked(self.tracking, run.folder) as trackers,
            Interrupts() as interrupts,
            Display(names, stage_steps, p.step) as display,
        ):
            journal = Journal(run, [*self.evaluation.measured, *self.method.measures], trackers)
            if p.matrix_rows == 0:
                self._score(stream, journal, task_trained="none")
                self._save(stream, journal, rundir.LATEST)
            while p.stage < len(names):
                if p.stage_step == 0 and stream.boundaries:
                    self.method.begin_stage(p.stage)
                told = stream.boundaries or p.stage + 1 == len(names)
                while p.stage_step < stage_steps[p.stage] or (told and self.method.owes):
                    if not self._decayed(ends.get(p.stage_step), stream, journal, interrupts):
                        self._save(stream, journal, rundir.LATEST)
                        return False
                    began = time.perf_counter()
                    batch, allocation, stepped = self._one_step(stream, stage_steps, run.folder)

                    # Once in a while: the validation loss, and what else is asked for.
                    if self._due(self.evaluation.every_steps):
                        self._validate(stream, journal)

                    # Once in a while, how it is decoded from learns too.
                    if self.engine is not None:
                        self._count_flops(self.engine.step(p, journal, display))

                    # Signals up; the rules may answer with growth.
                    self._measured(allocation.measured)
                    signals = self._signals(stepped, stage_steps)
                    events = self.growth.step(signals) if self.growth is not None else []
                    for event in events:
                        p.flops_grown += event.check_flops
                        journal.grew(event)
                        display.grew(event)
                    journal.told(p, self.method.told())
                    if events:
                        self._shape_changed()

                    # Records, and once in a while a checkpoint.
                    if self._due(config.log_every_steps) or events:
                        journal.stepped(
                            signals,
                            task=names[p.stage],
                            penalty=stepped.penalty if stepped else None,
                            parameters=self.parameters,
                            skipped=p.skipped,
                        )
                        if allocation.use is not None:
                            journal.used(p, allocation.use, len(batch.input_ids))
                        journal.clocked(
                            p.step,
                            seconds=time.perf_counter() - began,
                            tokens=batch.input_ids.numel(),
                            events=events,
                            device=self.model.device,
                        )
                    display.stepped(signals)
                    if self._due(self.checkpoint.every_steps) or interrupts.requested:
                        self._save(stream, journal, rundir.LATEST)
                    if self._due(self.checkpoint.named_every_steps):
                        self._save(stream, journal, rundir.checkpoint_step_name(p.step))
                        run.keep_only(self.checkpoint.keep)
                    if interrupts.requested:
                        return False

                # The end of a task: score every task, so that the matrix has a whole row.
                if stream.boundaries:
                    self.method.end_stage(stream, p.stage)
                    self._count_flops(0)
                journal.told(p, self.method.told())
                p.stage += 1
                p.stage_step = 0
                self._score(stream, journal, task_trained=names[p.stage - 1])
                record_stage(run, p.stage - 1, stream, self.method, self.model)
                if self.checkpoint.keep_tasks:
                    self._save(stream, journal, rundir.checkpoint_task_name(p.stage - 1))
                self._save(stream, journal, rundir.LATEST)
        return True

    # ---- its parts -------------------------------------------------------------------------------

    def _one_step(
        self, stream: AnyStream, stage_steps: list[int], folder: Path
    ) -> tuple[Batch, Allocation, Stepped | None]:
        """Which batch, what of it trains, at which rate; and the step."""
        p = self.progress
        batch = self.method.batch(stream, p.stage, at=p.stage_step / stage_steps[p.stage])
        allocation = self.allocator.allocate(batch, self._signals(None, stage_steps))
        factor = self._rate_factor(stage_steps, allocation, hidden=not stream.boundaries)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor * self.knobs.learning_rate_factor
        taught = batch if allocation.rows is None else batch.rows(allocation.rows)
        stepped = self._step(taught, allocation, folder)
        p.step += 1
        p.stage_step += batch.fresh
        p.tokens += batch.input_ids.numel()
        return batch, allocation, stepped

    def _decayed(self, end: int | None, stream: AnyStream, journal: Journal, interrupts: Interrupts) -> bool:
        """Score the run as if it ended at a step, where it would begin to decay now.

        Returns:
            False where it was interrupted; then nothing was recorded.
        """
        if end is None:
            return True
        with self.kept(stream):
            p = self.progress
            while p.stage_step < end:
                if interrupts.requested:
                    return False
                self._one_step(stream, [end], journal.run.folder)
            journal.decayed(p, {split: self.scorer.row(stream, split) for split in ("valid", "test")})
        return True

    def _step(self, batch: Batch, allocation: Allocation, folder: Path) -> Stepped | None:
        stepped, steps = None, self.config.neural_steps_per_batch if allocation.train else 0
        for _ in range(steps):
            try:
                with self.method.teaching(allocation.parts):
                    stepped = self.step(batch)
            except NonFiniteLossError as error:
                if self.config.on_nonfinite == "skip":
                    self.progress.skipped += 1
                    continue
                raise NonFiniteLossError(
                    f"{error}, at step {self.progress.step + 1}; the last good checkpoint is "
                    f"{folder / rundir.LATEST}: lower --optimizer.learning_rate, or leave such steps out "
                    "with --training.on_nonfinite skip"
                ) from None
            if self.average is not None:
                self.average.update()
        self._count_flops(steps * batch.input_ids.numel())
        return stepped

    def _count_flops(self, tokens: int) -> None:
        """Count a batch, and what the method has computed beside it."""
        cost = tokens * self.method.cost + self.method.spent()
        self.progress.flops += cost * self.flops_per_token

    def _rate_factor(self, stage_steps: list[int], allocation: Allocation, *, hidden: bool) -> float:
        p, schedule = self.progress, self.config.schedule
        if allocation.rate is not None:
            return allocation.rate
        if schedule.over == "run" or hidden:
            return schedule.factor(p.step, sum(stage_steps))
        return schedule.factor(p.stage_step, stage_steps[p.stage])

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _signals(self, stepped: Stepped | None, stage_steps: list[int]) -> Signals:
        p = self.progress
        return Signals(
            step=p.step,
            tokens=p.tokens,
            flops=p.flops,
            progress=p.step / max(1, sum(stage_steps)),
            loss=stepped.loss if stepped else None,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            grad_norm=stepped.grad_norm if stepped else None,
            values=self.values,
        )

    def _measured(self, values: Mapping[str, float]) -> None:
        # A new dictionary each time: signals that were handed out keep what they said.
        new = {name: Measured(value, self.progress.step) for name, value in values.items()}
        self.values = {**self.values, **new}

    def _shape_changed(self) -> None:
        """What depends on the model's shape."""
        self.flops_per_token = flops_per_token(self.model, self.context)
        self.parameters = count_parameters(self.model)
        self.step.shape_changed()

    # ---- scores ----------------------------------------------------------------------------------

    def _validate(self, stream: AnyStream, journal: Journal) -> None:
        before = self.scorer.read
        likelihood, values = self.scorer.validation(stream, self.progress.stage)
        # Forward only, a third of a training step.
        self.progress.flops_scored += (self.scorer.read - before) * self.flops_per_token / 3
        self._measured(values)
        if likelihood is not None and len(stream.names) == 1:
            self._keep_best([likelihood], stream, journal)

    def _score(self, stream: AnyStream, journal: Journal, *, task_trained: str) -> None:
        """Score every task and write a whole row of the task matrix, split by split."""
        valid: list[Likelihood] = []
        for split in ("valid", "test"):
            for route in self.scorer.routes:
                scores = self.scorer.row(stream, split, route)
                journal.scored(
                    scores,
                    split=split,
                    task_trained=task_trained,
                    route=route,
                    progress=self.progress,
                )
                valid = valid or list(scores.values())
        self.progress.matrix_rows += 1
        if self.progress.step:
            self._keep_best(valid, stream, journal)

    def _keep_best(self, valid: Sequence[Likelihood], stream: AnyStream, journal: Journal) -> None:
        if not valid:
            return
        # Without bytes there is one task with one tokenizer, and tokens compare.
        mean = fmean(score.bits_per_byte if score.bytes else score.nats_per_token for score in valid)
        best = self.progress.best_bits_per_byte
        if best is None or mean < best:
            self.progress.best_bits_per_byte = mean
            self._save(stream, journal, rundir.BEST)

    # ---- saving and resuming ---------------------------------------------------------------------

    def _save(self, stream: AnyStream, journal: Journal, name: str) -> None:
        self.save(stream, journal.run, name)
        journal.saved(name)

    def save(self, stream: AnyStream, run: RunWriter, name: str) -> None:
        """Write a checkpoint from which `load_state_dict` goes on bit by bit."""
        state = {
            **self.state_dict(),
            "stream": stream.state_dict(),
            "log_lengths": run.log_lengths(),
        }
        save_checkpoint(
            run.checkpoint(name),
            model=self.model,
            state=state,
            tokenizer=self.tokenizer,
            average=self.average,
            weights=self.method.saved_weights(),
            beside=[part.write_beside for part in (self.method, self.engine) if part is not None],
        )
