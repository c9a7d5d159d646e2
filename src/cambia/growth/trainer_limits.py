"""What growth inside `transformers.Trainer` cannot go with, each refused in one line before training."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, DistributedType
from transformers import PreTrainedModel, TrainingArguments

from cambia.errors import ConfigError, GrowthError
from cambia.growth.triggers import Composite, Trigger
from cambia.models.bodies import lora_layers

STEP_SAYS = ("loss", "grad_norm", "learning_rate")
"""What a Trainer logs of its steps."""


def refuse_settings(args: TrainingArguments) -> None:
    """Refuse what a Trainer's settings say.

    Raises:
        ConfigError: training is distributed, or a setting contradicts growth.
    """
    accelerator = AcceleratorState()
    if accelerator.distributed_type != DistributedType.NO or args.n_gpu > 1:
        how = accelerator.distributed_type.value if args.n_gpu <= 1 else "DataParallel"
        raise ConfigError(
            f"GrowthCallback grows a model in one process, this training is distributed ({how}), which keeps "
            "old parameters in buckets of its own: train on one device, or grow between two trainings with "
            "cambia.growth.grow"
        )
    compilation: Any = accelerator.dynamo_plugin
    if compilation.use_regional_compilation:
        raise ConfigError(
            "regional compilation compiles each layer for itself and would not see new ones: leave "
            "use_regional_compilation out; torch_compile=True alone works"
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size=True starts over with a model that may have grown: leave it out and set "
            "per_device_train_batch_size for the grown model"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ConfigError(
            "restore_callback_states_from_checkpoint=True makes callbacks anew without their rules: leave it "
            "out, GrowthCallback takes up its state by itself"
        )


def growable(model: Any) -> PreTrainedModel:
    """The model, if it can grow inside a Trainer.

    Raises:
        GrowthError: it carries adapters, or is wrapped.
    """
    if not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded:
        if isinstance(model, PreTrainedModel) or lora_layers(model):
            raise GrowthError(
                "GrowthCallback cannot grow a model with PEFT adapters: grow the base model with "
                "cambia.growth.grow before they are put on it, or merge them (merge_and_unload); their rank "
                "grows between two trainings with grow(model, WidenLoraRank(...))"
            )
        raise GrowthError(
            f"GrowthCallback cannot grow a {type(model).__name__}: pass the plain transformers model "
            "(torch_compile=True compiles it)"
        )
    return model


def refuse_unmeasured(trigger: Trigger, args: TrainingArguments) -> None:
    """Refuse a trigger that could never fire.

    Raises:
        ConfigError: nothing measures what it reads.
    """
    if isinstance(trigger, Composite):
        for inner in trigger.triggers:
            refuse_unmeasured(inner, args)
        return
    name = type(trigger).__name__
    if "tokens" in trigger.reads and args.include_num_input_tokens_seen == "no":
        raise ConfigError(
            f"{name} reads tokens, which the Trainer does not count: set "
            "TrainingArguments(include_num_input_tokens_seen='non_padding')"
        )
    evaluated = sorted(n for n in trigger.needs if n == "validation_loss" or n.startswith("eval_"))
    if evaluated and args.eval_strategy == "no":
        raise ConfigError(
            f"{name} reads {evaluated[0]!r}, which nothing measures here: set "
            "TrainingArguments(eval_strategy='steps', eval_steps=...) and give the Trainer an eval_dataset"
        )
    logged = sorted(trigger.needs & set(STEP_SAYS))
    if logged and args.logging_strategy == "no":
        raise ConfigError(
            f"{name} reads {logged[0]!r}, which the Trainer does not log here: set "
            "TrainingArguments(logging_strategy='steps', logging_steps=...)"
        )
