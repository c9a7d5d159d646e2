"""LoRA experts in `transformers.Trainer`: one kind of text is learned after another, without labels.

    callback = ExpertsCallback()
    args = TrainingArguments("trained", train_sampling_strategy="sequential", learning_rate=0.006)
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    callback.experts.names                        # as many as there were kinds of text
    callback.experts.save_pretrained("experts")

The Trainer reads batch after batch. The callback looks at each before the model does: rows that are known
train nothing, rows of the kind that is being learned train its expert, strange ones wait, and when enough of
them have come an expert is added (`cambia.continual.methods.experts`). What it reads out of memory, the rows
that waited for it and at its end some of them again, are steps of their own between the Trainer's.
"""

# N rows of a batch, T time

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cambia.continual.methods.experts import Experts
from cambia.continual.methods.method import Situation
from cambia.data.batches import Batch
from cambia.data.loaders import LoaderStream
from cambia.errors import ConfigError
from cambia.growth.callback import plain_optimizer
from cambia.growth.parts import AddLoraExpert
from cambia.growth.rules import GrowthManager, GrowthRule
from cambia.growth.triggers.watching import NoveltyTrigger
from cambia.models.parts.lora_experts import LoraExperts
from cambia.records import Allocation, GrowthEvent, Signals, StreamEvent
from cambia.training.optim import set_learning_rate


class ExpertsCallback(TrainerCallback):
    """Teaches the frozen model of a `transformers.Trainer` one kind of text after another.

    Batches must come in the order of the text, in rows of one length without padding. The Trainer's learning
    rate is the highest one; its schedule is not used, since every expert has a course of its own. A
    checkpoint holds the model as it was and beside it, in experts/, what was learned so far. A training that
    was stopped does not go on from it: `cambia learn` does that.

    Args:
        method: the settings of experts, their detector, their course.
        rules: what may grow when something new has come; by default an expert each time.
    """

    def __init__(self, method: Experts | None = None, rules: Sequence[GrowthRule] | None = None):
        self.method = method or Experts()
        self.rules = list(rules or [GrowthRule(when=NoveltyTrigger(), then=AddLoraExpert())])
        self._manager: GrowthManager | None = None
        self._hooks: list[Any] = []
        self._inside = ExitStack()
        self._allocation = Allocation(train=False)
        self._teaching = False  # a lesson of the callback's own, or a question of its allocator
        self._step = 0
        self.told: list[StreamEvent] = []
        """What was decided about the stream and its experts, in order."""

    @property
    def experts(self) -> LoraExperts:
        """What has been learned; answers texts as the model does, each by the right expert."""
        return self.method.experts

    @property
    def events(self) -> list[GrowthEvent]:
        """Each expert's birth."""
        return self._manager.history if self._manager is not None else []

    # ---- the Trainer's events --------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Freeze the model, before an optimizer is made for it.

        Raises:
            ConfigError: nothing of the model can be adapted, or a setting of the Trainer cannot go with it.
        """
        _refuse(args, given.get("model"))
        self.method.prepare(given["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Look at batches before the model does.

        Raises:
            ConfigError: the training goes on from a checkpoint.
        """
        if state.global_step:
            raise ConfigError(
                "ExpertsCallback does not go on from a Trainer's checkpoint: leave out "
                "resume_from_checkpoint, or use `cambia learn`, which may be killed at any time"
            )
        self._optimizer = plain_optimizer(given["optimizer"])
        self._rate, self._clip = args.learning_rate, args.max_grad_norm
        model = given["model"]
        self._idle = torch.zeros((), device=model.device, requires_grad=True)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Clip: the Trainer sees the model's parameters alone."""
        self._clipped()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Ask the rules, and let the expert read what is due."""
        self._optimizer.zero_grad()
        self._ask(self._allocation)
        self._lessons()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Write the experts into the checkpoint's folder."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir() and self._manager is not None:
            self.method.write_beside(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Let the last expert consolidate, and leave the model without hooks of the callback."""
        for hook in self._hooks:
            hook.remove()
        if self._manager is not None:
            self._allocator.finish(self._batch_size)
            self._lessons()
            self.told += self.method.told()

    # ---- a batch ---------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model reads a batch: what of it trains, and which expert."""
        if self._teaching or not (model.training and torch.is_grad_enabled()):
            return None
        self._teaching = True
        try:
            stream = LoaderStream([kwargs])
            batch = stream.next_batch(0)
            if self._manager is None:
                self._attach(model, stream)
            self._allocation = self._allocator.allocate(batch, Signals(self._step))
        finally:
            self._teaching = False
        self._set_rate(self._allocation)
        # The mean over the rows that train, not a share of the mean over all.
        kept = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        if not self._allocation.train:
            return args, kept
        self._inside.enter_context(self.method.teaching(self._allocation.parts))
        if self._allocation.rows is not None:
            rows, count = list(self._allocation.rows), len(batch.input_ids)
            kept = {
                name: value[rows] if isinstance(value, Tensor) and len(value) == count else value
                for name, value in kept.items()
            }
        return args, kept

    def _after(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        """After the model has read a batch; where nothing trains, there is still to be a gradient."""
        if self._teaching or not (model.training and torch.is_grad_enabled()):
            return None
        self._inside.close()
        if not self._allocation.train:
            outputs.loss = outputs.loss.detach() + self._idle
        return outputs

    def _attach(self, model: Any, stream: LoaderStream) -> None:
        situation = Situation(model=model, optimizer=self._optimizer, stream=stream, seed=0)
        self.method.attach(situation)
        allocator = self.method.allocator()
        assert allocator is not None
        self._allocator: Any = allocator
        self._batch_size = stream.batch_size
        self._manager = GrowthManager(self.rules, model=model, optimizer=self._optimizer)

    def _ask(self, allocation: Allocation) -> None:
        """Tell the rules what was measured."""
        assert self._manager is not None
        self._step += 1
        measured: dict[str, float | None] = {**allocation.measured}
        self._manager.step(None, **measured)
        self.method.meet_newcomer()
        self.told += self.method.told()

    # ---- lessons ---------------------------------------------------------------------------------

    def _lessons(self) -> None:
        """Whatever an expert reads out of memory now."""
        while (lesson := self._allocator.lesson(self._batch_size)) is not None:
            self._allocation = self._allocator.allocate(lesson, Signals(self._step))
            self._set_rate(self._allocation)
            self._learn(lesson, self._allocation)

    def _learn(self, lesson: Batch, allocation: Allocation) -> None:
        model = self.experts.model
        self._teaching = True
        try:
            with torch.enable_grad(), self.method.teaching(allocation.parts):
                ids, targets = (each.to(model.device) for each in (lesson.input_ids, lesson.targets))
                outputs = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False)
            outputs.loss.backward()
        finally:
            self._teaching = False
        self._clipped()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _set_rate(self, allocation: Allocation) -> None:
        share = 1.0 if allocation.rate is None else allocation.rate
        set_learning_rate(self._optimizer, self._rate * share)

    def _clipped(self) -> None:
        if self._clip:
            every = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(every, self._clip)


def _refuse(args: TrainingArguments, model: Any) -> None:
    if not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded:
        raise ConfigError(
            f"ExpertsCallback teaches a plain transformers model; this {type(model).__name__} is none or "
            "carries adapters: merge them first (merge_and_unload)"
        )
    if args.gradient_accumulation_steps != 1:
        raise ConfigError(
            "ExpertsCallback decides batch by batch what is learned: leave gradient_accumulation_steps at 1 "
            "and set per_device_train_batch_size"
        )
    if args.fp16:
        raise ConfigError("ExpertsCallback works in float32 or bfloat16: leave fp16 out, or take bf16=True")
    if args.activation_checkpointing:
        raise ConfigError(
            "ExpertsCallback reads activations that are kept: leave activation_checkpointing out"
        )
    if args.n_gpu > 1 or args.world_size > 1:
        raise ConfigError("ExpertsCallback teaches on one device: start the training without a launcher")
    if args.train_sampling_strategy == "random":
        raise ConfigError(
            "shuffled rows are no stream, every batch would hold all kinds of text: pass "
            'TrainingArguments(train_sampling_strategy="sequential")'
        )
