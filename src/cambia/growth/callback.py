"""Growth in `transformers.Trainer`: one callback, in training, checkpoints and resuming.

    trainer = Trainer(
        model=model, args=args, train_dataset=dataset,
        callbacks=[
            GrowthCallback([GrowthRule(when=ScheduleTrigger(at_steps=[100]), then=WidenFFN(factor=1.5))])
        ],
    )
    trainer.train()                               # grows after step 100, optimizer state and all
    trainer.train(resume_from_checkpoint=True)    # in a new process, with the small model: it gets the shape

What a step measured is complete when the next one begins: its loss has been logged and the model scored by
then. So the rules are asked there, before the first micro-batch, when no gradients are waiting. A checkpoint
that was written in between holds the model as it was scored, and what was measured waits in it.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from cambia.errors import CheckpointError, ConfigError
from cambia.growth.carry import Moments
from cambia.growth.reshape import (
    check_shape,
    folder_of,
    has_other_shape,
    recorded_fields,
    reshape,
)
from cambia.growth.rules import Approval, Budget, GrowthManager, GrowthRule
from cambia.growth.trainer_limits import STEP_SAYS, growable, refuse_settings, refuse_unmeasured
from cambia.models.bodies import body_of
from cambia.models.causal_lm import align_memory
from cambia.records import GrowthEvent, Measured, Signals


class GrowthCallback(TrainerCallback, ExportableState):
    """Grows the model of a `transformers.Trainer` while it trains.

    Triggers read what the Trainer logs, at the steps at which it logs it: `loss`, `grad_norm`,
    `learning_rate`, `eval_loss` as `validation_loss`, and every other number under its own name.

    Checkpoints are the Trainer's own. What growth must know to go on is in trainer_state.json; the folder
    loads with `from_pretrained` as it is.

    Args:
        rules: as for `GrowthManager`.
        check_batch: (B, T) token ids on which each growth is verified; random ones by default.
        moments: what becomes of the optimizer's state (see `cambia.growth.carry.OptimizerHolder`).
        rewarm_steps: optimizer steps in which newborn entries come up to their full learning rate.
        seed: of new random weights.
        budget: how large the model may become.
        approve: asked before each growth with its plan and its reason; False leaves the model as it is.
        dry_run: record what would be done and do none of it.
    """

    def __init__(
        self,
        rules: Sequence[GrowthRule],
        *,
        check_batch: Tensor | None = None,
        moments: Moments = "mean",
        rewarm_steps: int = 100,
        seed: int = 0,
        budget: Budget | None = None,
        approve: Approval | None = None,
        dry_run: bool = False,
    ):
        self.rules = list(rules)
        self._settings: dict[str, Any] = {
            "check_batch": check_batch,
            "moments": moments,
            "rewarm_steps": rewarm_steps,
            "seed": seed,
            "budget": budget,
            "approve": approve,
            "dry_run": dry_run,
        }
        self._at_start = [rule.when.state_dict() for rule in self.rules]
        self.manager = GrowthManager(self.rules, **self._settings)
        self._values: dict[str, Measured] = {}
        self._asked = 0
        self._watched: PreTrainedModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._trainer_state: TrainerState | None = None
        self._args: TrainingArguments | None = None

    @property
    def events(self) -> list[GrowthEvent]:
        """The growth events of this training, those before a resume too."""
        return self.manager.history

    # ---- the Trainer's events --------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Refuse what cannot work, and be ready for a checkpoint of another shape.

        Raises:
            ConfigError: a setting of the Trainer cannot go with growth.
            GrowthError: the model is of a family that cannot grow.
        """
        refuse_settings(args)
        self._args, self._trainer_state = args, state
        self._optimizer = plain_optimizer(given.get("optimizer"))
        if isinstance(given.get("model"), PreTrainedModel):
            self._watch(given["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start with the model and its optimizer, or go on where a checkpoint was written.

        Raises:
            ConfigError: nothing measures what a trigger reads.
            GrowthError: the model cannot grow, or not in this way.
            CheckpointError: the checkpoint is not one of a training with these rules.
        """
        model = growable(given["model"])
        self._watch(model)
        self._args, self._trainer_state = args, state
        assert isinstance(state.stateful_callbacks, dict)
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise ConfigError("two GrowthCallbacks in one Trainer: put all rules into one")
        if self.manager.rewarm is not None:
            self.manager.rewarm.remove()
        for rule, at_start in zip(self.rules, self._at_start, strict=True):
            rule.when.load_state_dict(at_start)
            refuse_unmeasured(rule.when, args)
        self._optimizer = plain_optimizer(given["optimizer"])
        align_memory(model)  # weights that were read from a file lie elsewhere than those that were built
        self.manager = GrowthManager(self.rules, model=model, optimizer=self._optimizer, **self._settings)
        self._values, self._asked = {}, 0
        if state.global_step and saved["attributes"]["record"] is not None:
            self._go_on(saved["attributes"]["record"], model)
        else:
            self.manager.check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Take in what was measured."""
        for name, value in (logs or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._values[name] = Measured(float(value), state.global_step)
        if "eval_loss" in (logs or {}):
            self._values["validation_loss"] = self._values["eval_loss"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Ask the rules about the step that is done, before anything of the next one."""
        step = state.global_step
        if step <= self._asked:
            return
        events = self.manager.step(self._signals(state))
        self._asked = step
        if args.torch_compile and any(event.done for event in events):
            torch.compiler.reset()  # old shapes would use up the number of recompilations that is allowed
        for event in events:
            self._tell(event, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Leave the optimizer without hooks."""
        if self.manager.rewarm is not None:
            self.manager.rewarm.remove()

    # ---- what is known ---------------------------------------------------------------------------

    def _signals(self, state: TrainerState) -> Signals:
        step = state.global_step
        now = {name: m.value for name, m in self._values.items() if m.step == step and name in STEP_SAYS}
        return Signals(
            step=step,
            tokens=int(state.num_input_tokens_seen),
            flops=state.total_flos,
            progress=step / max(state.max_steps, 1),
            values=dict(self._values),
            **now,
        )

    def _tell(self, event: GrowthEvent, args: TrainingArguments, state: TrainerState) -> None:
        """Into the Trainer's history, and onto the screen as its own logs are."""
        line: dict[str, Any] = {
            "growth": ", ".join(_brief(operator) for operator in event.operators),
            "growth_reason": event.reason,
            "growth_done": event.done,
            "parameters_before": event.parameters_before,
            "parameters_after": event.parameters_after,
            "logit_error": event.logit_error,
            "epoch": state.epoch,
        }
        state.log_history.append({**line, "step": state.global_step})
        if state.is_local_process_zero:
            if args.disable_tqdm:
                print(line)
            else:
                tqdm.write(str(line))

    # ---- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json: plain values."""
        return {"args": {}, "attributes": {"record": self._record()}}

    def _record(self) -> dict[str, Any] | None:
        model = self.manager.model
        if model is None:
            return None
        manager = self.manager.state_dict()
        if manager["rewarm"] is not None:
            for newborn in manager["rewarm"]["newborns"]:
                newborn["index"] = _packed(newborn["index"])
        return {
            "asked": self._asked,
            "values": {name: [m.value, m.step] for name, m in self._values.items()},
            "manager": manager,
            "events": [event.as_dict() for event in self.events],
            "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        }

    def _go_on(self, record: Mapping[str, Any], model: PreTrainedModel) -> None:
        manager = dict(record["manager"])
        if len(manager["triggers"]) != len(self.rules):
            raise CheckpointError(
                f"the checkpoint was written with {len(manager['triggers'])} growth rules, this "
                f"GrowthCallback has {len(self.rules)}: go on with the rules that the training began with"
            )
        events = [GrowthEvent.from_dict(line) for line in record["events"]]
        config = body_of(model).config.to_dict()
        for name, value in recorded_fields(now=[], then=events).items():
            if config.get(name) != value:
                raise CheckpointError(
                    f"the model has {name}={config.get(name)}, the checkpoint's has {value}: build the model "
                    "that the training began with, not by model_init=, or load the checkpoint's with "
                    "from_pretrained"
                )
        if manager["rewarm"] is not None:
            newborns = manager["rewarm"]["newborns"]
            unpacked = [{**newborn, "index": _unpacked(newborn["index"])} for newborn in newborns]
            manager["rewarm"] = {"newborns": unpacked}
        self.manager.load_state_dict(manager, events)
        self._values = {name: Measured(*measured) for name, measured in record["values"].items()}
        self._asked = record["asked"]

    def _watch(self, model: PreTrainedModel) -> None:
        """Be asked before weights are loaded into this model."""
        if model is self._watched:
            return
        body_of(model)  # raises for a family that cannot grow
        self._watched = model

        def before_loading(module: Any, tensors: Mapping[str, Tensor], *_: Any) -> None:
            # A function and not a method: copying the model copies its hooks, and not all of this callback.
            if module is self._watched:
                self._take_shape(module, tensors)

        model.register_load_state_dict_pre_hook(before_loading)

    def _take_shape(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        """Give the model the shape of a checkpoint that is about to be loaded into it."""
        if not has_other_shape(model, tensors):
            return
        folder = folder_of(tensors, self._folders())
        record = None if folder is None else self._recorded_in(folder)
        if folder is None or record is None:
            raise CheckpointError(
                "the weights are of a model of another shape, and no checkpoint that GrowthCallback knows "
                "holds them with a growth record: name the folder in "
                "TrainingArguments(resume_from_checkpoint=...), or pass the Trainer the model that "
                "from_pretrained loads from it"
            )
        events = [GrowthEvent.from_dict(line) for line in record["events"]]
        fields = recorded_fields(now=self.events, then=events)
        reshape(model, fields, frozen=record["frozen"], optimizer=self._optimizer)
        check_shape(model, tensors, folder)

    def _folders(self) -> Iterator[Path]:
        """Where the Trainer may be loading from, the likeliest first."""
        assert self._args is not None and self._trainer_state is not None
        for named in (self._args.resume_from_checkpoint, self._trainer_state.best_model_checkpoint):
            if isinstance(named, str):
                yield Path(named)
        numbered = {
            int(found[1]): folder
            for folder in Path(self._args.output_dir or ".").glob("checkpoint-*")
            if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
        }
        yield from (numbered[number] for number in sorted(numbered, reverse=True))

    def _recorded_in(self, folder: Path) -> dict[str, Any] | None:
        file = folder / "trainer_state.json"
        if not file.is_file():
            return None
        saved = json.loads(file.read_text(encoding="utf-8"))["stateful_callbacks"].get(type(self).__name__)
        return saved["attributes"]["record"] if saved is not None else None


# ---- small things --------------------------------------------------------------------------------


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _brief(operator: Mapping[str, Any]) -> str:
    given = ", ".join(f"{k}={v}" for k, v in operator.items() if k in ("factor", "add", "to"))
    return f"{operator['type']}({given})"


def _packed(index: Tensor | None) -> str | None:
    """Sorted positions as text; what grew along an axis repeats itself and packs a thousandfold."""
    if index is None:
        return None
    steps = torch.diff(index.cpu(), prepend=torch.zeros(1, dtype=torch.int64))
    return base64.b64encode(zlib.compress(steps.numpy().tobytes())).decode()


def _unpacked(text: str | None) -> Tensor | None:
    if text is None:
        return None
    steps = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int64)
    return steps.cumsum(0)
