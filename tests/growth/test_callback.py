"""Growth inside `transformers.Trainer`: in training, in its checkpoints, and on the way back from them."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from cambia.errors import CheckpointError, ConfigError, GrowthError
from cambia.growth import (
    AddLayers,
    GrowthCallback,
    GrowthRule,
    PlateauTrigger,
    ScheduleTrigger,
    WidenFFN,
    WidenHidden,
)
from cambia.growth.operators import Operator
from tests.conftest import tiny

STEPS = 8


class Stop(Exception):
    """What kills a training."""


class Killer(TrainerCallback):
    """Kills the training before this many steps are done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            raise Stop


class Spy(TrainerCallback):
    """Keeps what every optimizer step saw."""

    def __init__(self) -> None:
        self.parameters: list[int] = []
        self.owned: list[bool] = []
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        self.parameters.append(sum(p.numel() for p in model.parameters()))
        ours = {id(p) for p in model.parameters()}
        groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        self.owned.append({p for group in groups for p in group} == ours)
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        self.norms.append(norms.norm().item())


pytestmark = pytest.mark.filterwarnings(
    # peft asks a model for it, and transformers warns that the name will change.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(autouse=True)
def anew() -> None:
    """accelerate keeps the settings of the first Trainer for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    """Each training begins with a collection of garbage; it need not look at all that was imported."""
    transformers_logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def data(rows: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 31, (rows, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def rule(step: int = 3, then: Operator | None = None) -> GrowthRule:
    return GrowthRule(when=ScheduleTrigger(at_steps=[step]), then=then or WidenFFN(add=4))


def stuck() -> GrowthRule:
    """Nothing improves by that much, so the second measurement without improvement fires."""
    return GrowthRule(when=PlateauTrigger(patience=2, min_improvement=9.0), then=WidenFFN(add=4))


def trainer(
    folder: Path,
    rules: list[GrowthRule] | None,
    *others: TrainerCallback,
    model: PreTrainedModel | None = None,
    callback: dict[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> Trainer:
    """A Trainer as people write it, of a size that takes no time."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    rules = copy.deepcopy(rules)  # triggers keep a state
    growth = [] if rules is None else [GrowthCallback(rules, **{"rewarm_steps": 2, **(callback or {})})]
    return Trainer(
        model=tiny() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=data(),
        eval_dataset=data(4),
        callbacks=[*growth, *others],
        optimizers=(optimizer, None),
    )


def growth_of(trainer: Trainer) -> GrowthCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, GrowthCallback))


def size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def told(trainer: Trainer, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in trainer.state.log_history if name in line}


# ---- in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["cambia", "llama", "gpt2"])
def test_it_grows_between_two_steps(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spy, model = Spy(), tiny(family)
    before = size(model)
    rules = [rule(3), rule(5, AddLayers(add=1))]
    running = trainer(tmp_path, rules, spy, model=model, gradient_accumulation_steps=2, max_grad_norm=0.1)
    running.train()
    first, second = growth_of(running).events
    assert (first.step, second.step) == (3, 5)
    assert first.logit_error is not None and first.logit_error < 1e-5
    assert (first.parameters_before, second.parameters_after) == (before, size(model))
    assert spy.parameters == [before] * 3 + [first.parameters_after] * 2 + [second.parameters_after] * 3
    assert all(spy.owned), "the optimizer trains all of the model and nothing else, at every step"
    # The norm is that of all gradients together, new ones too, and clipped.
    assert spy.norms == pytest.approx([0.1] * STEPS, rel=1e-3)
    rates = list(told(running, "learning_rate").values())
    assert rates == pytest.approx([1e-2 * (1 - i / STEPS) for i in range(STEPS)]), "the schedule goes on"
    # What the Trainer says of it.
    lines = [line for line in running.state.log_history if "growth" in line]
    assert [line["growth"] for line in lines] == ["widen_ffn(add=4)", "add_layers(add=1)"]
    assert lines[0]["parameters_after"] == first.parameters_after
    assert lines[0]["growth_reason"] == "schedule: 3 steps reached"
    assert [line["step"] for line in lines] == [3, 5]
    assert "'growth': 'widen_ffn(add=4)'" in capsys.readouterr().out


def test_new_weights_learn_and_the_optimizer_remembers(tmp_path: Path) -> None:
    """The moments of the old entries go along; the new ones move once they are heard."""
    running = trainer(tmp_path, [rule(3)], Killer(4))
    seen: dict[str, Tensor] = {}

    class Moments(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            weight = given["model"].model.layers[0].mlp.down_proj.weight
            if state.global_step == 3:
                seen["before"] = given["optimizer"].state[weight]["exp_avg"].clone()
                seen["weight"] = weight.detach().clone()

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 3:
                weight = given["model"].model.layers[0].mlp.down_proj.weight
                seen["carried"] = given["optimizer"].optimizer.state[weight]["exp_avg"].clone()

    running.add_callback(Moments())
    with pytest.raises(Stop):
        running.train()
    assert torch.equal(seen["carried"][:, :20], seen["before"])
    assert not seen["carried"][:, 20:].any()
    grown = running.model.model.layers[0].mlp.down_proj.weight
    assert grown.shape[1] == 24 and bool(grown[:, 20:].any(dim=0).all()), "zero at birth, then trained"


def test_without_rules_it_changes_nothing(tmp_path: Path) -> None:
    plain, with_callback = trainer(tmp_path, None), trainer(tmp_path, [])
    plain.train()
    with_callback.train()
    assert told(plain) == told(with_callback)


def test_triggers_read_what_the_trainer_measures(tmp_path: Path) -> None:
    """A trigger sees `eval_loss` as the validation loss, once for each time that it was measured."""
    seen: list[tuple[int, float | None, float | None]] = []

    class Listening(PlateauTrigger):
        def update(self, signals: Any) -> str | None:
            seen.append((signals.step, signals.fresh("validation_loss"), signals.fresh("grad_norm")))
            return super().update(signals)

    watching = GrowthRule(when=Listening(patience=2, min_improvement=9.0), then=WidenFFN(add=4))
    running = trainer(tmp_path, [watching], eval_strategy="steps", eval_steps=2, logging_steps=3)
    running.train()
    losses, norms = told(running, "eval_loss"), told(running, "grad_norm")
    assert seen == [(step, losses.get(step), norms.get(step)) for step in range(1, STEPS)]
    assert [event.step for event in growth_of(running).events] == [6]


def test_tokens_and_progress(tmp_path: Path) -> None:
    rules = [
        GrowthRule(when=ScheduleTrigger(at_tokens=[50]), then=WidenFFN(add=4)),
        GrowthRule(when=ScheduleTrigger(at_fractions=[0.75]), then=WidenFFN(add=4)),
    ]
    running = trainer(tmp_path, rules, include_num_input_tokens_seen="all")
    running.train()
    assert [event.step for event in growth_of(running).events] == [3, 6]  # 18 tokens a step
    assert growth_of(running).events[0].tokens == 54


def test_activation_checkpointing(tmp_path: Path) -> None:
    rules = [rule(2, WidenHidden(add=12)), rule(3, AddLayers(add=1))]
    running = trainer(tmp_path, rules, max_steps=5, activation_checkpointing=True)
    running.train()
    assert len(growth_of(running).events) == 2
    plain = trainer(tmp_path, rules, max_steps=5)
    plain.train()
    assert told(running) == told(plain)


def test_mixed_precision(tmp_path: Path) -> None:
    """Training computes in bfloat16; growth is verified in the precision of the weights."""
    exact: list[float] = []

    class Exactly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 2:
                model = given["model"]
                with torch.no_grad():
                    exact.append(type(model).forward(model, input_ids=batch, labels=batch).loss.item())

    batch = torch.stack([row["input_ids"] for row in data(4)])
    running = trainer(tmp_path, [rule(2)], Exactly(), callback={"check_batch": batch}, max_steps=4, bf16=True)
    running.train()
    (event,) = growth_of(running).events
    assert event.loss_before == pytest.approx(exact[0], rel=1e-6)
    with torch.no_grad():
        model: Any = running.model
        assert (
            model(input_ids=batch, labels=batch).loss != type(model).forward(model, batch, labels=batch).loss
        )


def test_weights_in_bfloat16(tmp_path: Path) -> None:
    running = trainer(tmp_path, [rule(3)], model=tiny(dtype=torch.bfloat16))
    running.train()
    (event,) = growth_of(running).events
    assert event.done and {p.dtype for p in running.model.parameters()} == {torch.bfloat16}


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    running = trainer(tmp_path, [rule(3)])
    running.train()
    once = size(running.model)
    running.train()
    assert size(running.model) > once and len(growth_of(running).events) == 1


# ---- checkpoints and resuming --------------------------------------------------------------------


def final(trainer: Trainer) -> dict[str, Any]:
    """All that must be equal bit by bit, as plain values and tensors."""
    optimizer: Any = trainer.optimizer
    state = optimizer.optimizer.state_dict()
    config = trainer.model.config.to_dict()
    values = {
        "loss": told(trainer),
        "norms": told(trainer, "grad_norm"),
        "weights": dict(trainer.model.state_dict()),
        "moments": state["state"],
        "groups": [group["params"] for group in state["param_groups"]],
        "events": json.dumps([event.as_dict() for event in growth_of(trainer).events], sort_keys=True),
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "architectures", "dtype")},
        "history": [
            line
            for line in trainer.state.log_history
            if "train_runtime" not in line and "eval_loss" not in line
        ],
    }
    return copy.deepcopy(values)


def assert_same(got: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), path
        for key in expected:
            assert_same(got[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected), path
    else:
        assert got == expected, path


# (family, when which operator acts, the checkpoint from which training goes on)
RESUMED = [
    pytest.param("llama", [rule(3)], 4, id="after a growth, while new entries warm up"),
    pytest.param("llama", [rule(3)], 3, id="between the decision and the growth"),
    pytest.param("llama", [rule(2, AddLayers(add=1, where="middle"))], 5, id="depth"),
    pytest.param("llama", [rule(2, AddLayers(add=1, fade_in=1.0))], 5, id="depth, fading in"),
    pytest.param("cambia", [rule(2), rule(5, AddLayers(add=1))], 4, id="a second growth after it"),
    pytest.param("gpt2", [rule(2, WidenHidden(add=12)), rule(3, AddLayers(add=2))], 6, id="hidden size"),
    pytest.param("llama", [rule(6)], 4, id="before any growth"),
    pytest.param("llama", [stuck()], 6, id="between a measurement and the growth"),
]


@pytest.mark.parametrize(("family", "rules", "at"), RESUMED)
@pytest.mark.parametrize("passes", ["small", "grown"])
def test_resuming_is_as_if_it_had_never_stopped(
    family: str, rules: list[GrowthRule], at: int, passes: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": at}
    if rules[0].when.needs:
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(tmp_path / "whole", rules, model=tiny(family), **settings)
    whole.train()
    killed = trainer(tmp_path / "cut", rules, Killer(at + 1), model=tiny(family), **settings)
    with pytest.raises(Stop):
        killed.train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{at}"
    model = tiny(family, seed=9) if passes == "small" else AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = trainer(tmp_path / "cut", rules, model=model, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(final(resumed), final(whole))
    # On other processors the last bits depend on where a tensor begins.
    assert all(p.data_ptr() % 64 == 0 for p in resumed.model.parameters())


def killed_at(tmp_path: Path, *rules: GrowthRule, at: int = 5, **settings: Any) -> Path:
    """The checkpoint of a training that was killed."""
    running = trainer(
        tmp_path / "killed", list(rules), Killer(at), save_strategy="steps", save_steps=at - 1, **settings
    )
    with pytest.raises(Stop):
        running.train()
    return tmp_path / "killed" / f"checkpoint-{at - 1}"


def test_a_checkpoint_is_a_stock_folder(tmp_path: Path) -> None:
    checkpoint = killed_at(tmp_path, rule(3))
    model, told_of = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert model.config.intermediate_size == 24
    assert not told_of["missing_keys"] and not told_of["unexpected_keys"]
    assert {file.name for file in checkpoint.iterdir()} >= {
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    }
    record = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][
        "GrowthCallback"
    ]
    assert len(json.dumps(record)) < 10_000, "positions of new entries are packed"


def test_a_checkpoint_of_another_folder(tmp_path: Path) -> None:
    checkpoint = killed_at(tmp_path, rule(3))
    elsewhere = trainer(tmp_path / "elsewhere", [rule(3)])
    with pytest.raises(
        CheckpointError, match=r"another shape.*TrainingArguments\(resume_from_checkpoint=\.\.\.\)"
    ):
        elsewhere.train(resume_from_checkpoint=str(checkpoint))
    named = trainer(tmp_path / "elsewhere", [rule(3)], resume_from_checkpoint=str(checkpoint))
    named.train(resume_from_checkpoint=str(checkpoint))
    whole = trainer(tmp_path / "whole", [rule(3)])
    whole.train()
    assert_same(final(named), final(whole))


def test_an_optimizer_of_ones_own_and_frozen_weights(tmp_path: Path) -> None:
    """Built for the small model, resumed with the grown one; what was frozen stays so, in new layers too."""
    rules = [rule(2, AddLayers(add=1, where="append"))]

    def built() -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        model = tiny()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not ("norm" in name or ".1.mlp.up_proj" in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    def run(*others: TrainerCallback) -> Trainer:
        model, optimizer = built()
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
        return trainer(tmp_path, rules, *others, model=model, optimizer=optimizer, **settings)

    whole = run()
    whole.train()
    frozen = [name for name, p in whole.model.named_parameters() if not p.requires_grad]
    assert "model.layers.2.mlp.up_proj.weight" in frozen
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(final(resumed), final(whole))


def test_the_same_trainer_goes_on_and_back(tmp_path: Path) -> None:
    """It is interrupted while new entries warm up, and later returns to before its growth."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    running = trainer(tmp_path / "a", [rule(3)], Killer(4), **settings)
    with pytest.raises(Stop):
        running.train()
    running.remove_callback(Killer)
    running.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert not running.optimizer.optimizer._optimizer_step_pre_hooks
    whole = trainer(tmp_path / "b", [rule(3)], **settings)
    whole.train()
    assert_same(final(running), final(whole))
    running.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(final(running), final(whole))


def test_a_folder_with_checkpoints_of_another_training(tmp_path: Path) -> None:
    """Of the same shapes, but not of the same layers."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", [rule(3, AddLayers(add=1, where="middle"))], **settings)
    whole.train()
    other = trainer(tmp_path, [rule(3, AddLayers(add=1, where="append"))], **settings)
    other.train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "older")
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    resumed = trainer(tmp_path, [rule(3, AddLayers(add=1, where="middle"))], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(final(resumed), final(whole))


@pytest.mark.parametrize("best", [2, 6])
def test_the_best_model_comes_back_in_its_own_shape(best: int, tmp_path: Path) -> None:
    """The best checkpoint is smaller than the last model, or as large; then training goes on from there."""
    scores = {step: 1.0 if step == best else 2.0 for step in range(STEPS + 1)}
    running = trainer(
        tmp_path,
        [rule(3, AddLayers(add=1)), rule(4)],
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    evaluate = running.evaluate
    running.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_score": scores[running.state.global_step]}
    running.train()
    assert len(growth_of(running).events) == 2
    model: Any = running.model
    stored = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())
    assert model.config.num_hidden_layers == len(model.model.layers) == (2 if best == 2 else 3)
    ids = data(2)[0]["input_ids"][None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(model(input_ids=ids).logits, reloaded(input_ids=ids).logits)
    running.args.load_best_model_at_end = False
    spy = Spy()
    running.add_callback(spy)
    running.train()
    assert all(spy.owned), "the optimizer followed"


def test_it_joins_a_training_that_began_without_it(tmp_path: Path) -> None:
    plain = trainer(tmp_path, None, save_strategy="steps", save_steps=4)
    plain.train()
    joined = trainer(tmp_path, [rule(6)], save_strategy="steps", save_steps=2)
    joined.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [event.step for event in growth_of(joined).events] == [6]
    again = trainer(tmp_path, [rule(6)], model=tiny())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert size(again.model) == size(joined.model)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    checkpoint = str(killed_at(tmp_path, rule(3)))
    with pytest.raises(CheckpointError, match="with 1 growth rules, this GrowthCallback has 2"):
        trainer(tmp_path / "killed", [rule(3), rule(4)]).train(resume_from_checkpoint=checkpoint)
    other = trainer(tmp_path / "killed", [rule(3)], model=tiny(hidden_size=32))
    with pytest.raises(
        CheckpointError, match=r"is \(31, 24\), after the recorded growth it would be \(31, 32\)"
    ):
        other.train(resume_from_checkpoint=checkpoint)


# ---- what is refused -----------------------------------------------------------------------------


def test_adapters_and_wrappers_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    inside = tiny()
    inside.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, inside):
        with pytest.raises(
            GrowthError,
            match=r"PEFT adapters: grow the base model with cambia\.growth\.grow before.*WidenLoraRank",
        ):
            trainer(tmp_path, [rule(3)], model=model).train()
    compiled: Any = torch.compile(tiny(), backend="eager")
    with pytest.raises(GrowthError, match=r"cannot grow a OptimizedModule.*torch_compile=True"):
        trainer(tmp_path, [rule(3)], model=compiled).train()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.MULTI_CPU, r"distributed \(MULTI_CPU\).*train on one device"),
        (DistributedType.DEEPSPEED, r"distributed \(DEEPSPEED\)"),
        (DistributedType.FSDP, r"distributed \(FSDP\)"),
    ],
)
def test_several_processes_are_refused(
    kind: DistributedType, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = trainer(tmp_path, [])
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    with pytest.raises(ConfigError, match=message):
        growth_of(ready).on_init_end(ready.args, ready.state, ready.control, model=ready.model)


def test_regional_compilation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = trainer(tmp_path, [])
    monkeypatch.setattr(AcceleratorState().dynamo_plugin, "use_regional_compilation", True)
    with pytest.raises(ConfigError, match="regional compilation"):
        growth_of(ready).on_init_end(ready.args, ready.state, ready.control, model=ready.model)


@pytest.mark.parametrize("name", ["auto_find_batch_size", "restore_callback_states_from_checkpoint"])
def test_settings_that_contradict_growth_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}=True"):
        trainer(tmp_path, [rule(3)], **{name: True})


def test_what_nothing_measures_is_refused(tmp_path: Path) -> None:
    tokens = GrowthRule(when=ScheduleTrigger(at_tokens=[9]), then=WidenFFN(add=4))
    with pytest.raises(ConfigError, match="include_num_input_tokens_seen"):
        trainer(tmp_path, [tokens]).train()
    plateau = GrowthRule(when=PlateauTrigger(), then=WidenFFN(add=4))
    with pytest.raises(ConfigError, match=r"reads 'validation_loss'.*eval_strategy"):
        trainer(tmp_path, [plateau]).train()
    noise = GrowthRule(when=PlateauTrigger(metric="loss"), then=WidenFFN(add=4))
    with pytest.raises(ConfigError, match=r"reads 'loss'.*logging_strategy"):
        trainer(tmp_path, [noise], logging_strategy="no").train()
    with pytest.raises(ConfigError, match="two GrowthCallbacks"):
        trainer(tmp_path, [rule(3)], GrowthCallback([])).train()


def test_growth_that_is_illegal_is_refused_before_the_first_step(tmp_path: Path) -> None:
    running = trainer(tmp_path, [rule(3, WidenFFN(to=5))])
    with pytest.raises(GrowthError, match="to=5 is not larger"):
        running.train()
    assert running.state.global_step == 0


def test_loading_other_weights_into_the_model_is_left_alone(tmp_path: Path) -> None:
    """The hook answers for the Trainer's model and for other shapes only."""
    ready = trainer(tmp_path, [rule(3)])
    model: Any = ready.model
    model.load_state_dict(tiny(seed=4).state_dict())
    with pytest.raises(CheckpointError, match="no checkpoint that GrowthCallback knows"):
        model.load_state_dict(tiny(intermediate_size=28).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        copy.deepcopy(model).load_state_dict(tiny(intermediate_size=28).state_dict())


def test_a_family_without_a_table_is_refused_at_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=31, **sizes))
    with pytest.raises(GrowthError, match="no architecture table for model type 'gpt_neox'"):
        trainer(tmp_path, [rule(3)], model=model)
