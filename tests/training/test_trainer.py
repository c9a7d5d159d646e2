"""The loop: what it computes, and that its options change nothing that they should not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cambia.errors import CheckpointError
from cambia.experiment.build import assemble
from cambia.experiment.estimate import estimate
from cambia.experiment.starts import model_folder
from cambia.experiment.tree import Experiment, experiment_from
from cambia.models.bodies import count_parameters, flops_per_token
from cambia.models.saved import load_model
from cambia.rundir import RunReader, RunWriter

TREE = {
    "data": {
        "tasks": [
            {"name": "counting", "source": {"type": "generated", "task": "counting", "limit_bytes": 60_000}}
        ]
    },
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "training": {"steps": 6, "batch_size": 6, "sequence_length": 32},
    "evaluation": {"every_steps": 2, "max_bytes": 500},
    "growth": {
        "rules": [{"when": {"type": "schedule", "at_steps": [3]}, "then": {"type": "add_layers", "add": 1}}]
    },
    "methods": [],
}


@pytest.fixture
def trained(tmp_path, monkeypatch, tmp_path_factory):
    """Train TREE with dotted overrides in a fresh run directory."""
    monkeypatch.setenv("CAMBIA_CACHE", str(tmp_path_factory.getbasetemp() / "trainer-cache"))

    def go(name: str = "run", **flags: object) -> tuple[RunReader, object]:
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        experiment = experiment_from(TREE, source="test", flags=dotted)
        run = RunWriter(tmp_path / name)
        parts = assemble(experiment, run)
        run.write_config({}, "")
        assert parts.trainer.train(parts.stream, run=run, stage_steps=parts.stage_steps)
        run.close()
        return RunReader(tmp_path / name), parts.trainer

    return go


def column(reader: RunReader, name: str) -> list:
    return [row[name] for row in reader.rows("metrics.csv")]


def test_loss_falls_and_everything_is_logged(trained):
    reader, trainer = trained(training__steps=40)
    losses = column(reader, "loss")
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(264), rel=0.05)  # a fresh model knows nothing
    assert losses[-1] < 0.85 * losses[0]
    parameters = column(reader, "parameters")
    assert parameters[1] < parameters[-1] == count_parameters(trainer.model)
    flops = column(reader, "flops")
    per_step = [after - before for before, after in itertools.pairwise(flops)]
    assert per_step[0] < per_step[-1] == pytest.approx(6 * 32 * flops_per_token(trainer.model, 32))
    measured = [value is not None for value in column(reader, "validation_loss")]
    assert measured == [step % 2 == 0 for step in range(1, 41)]


def test_a_task_may_be_longer_or_shorter_than_the_others(trained):
    reader, _ = trained(data__tasks__0__share=1.5, training__steps=4)
    assert len(column(reader, "loss")) == 6
    reader, _ = trained("own", data__tasks__0__share=1.5, data__tasks__0__steps=3)
    assert len(column(reader, "loss")) == 3
    reader, _ = trained(
        "tokens", data__tasks__0__share=0.5, training__steps=None, training__tokens=6 * 32 * 4
    )
    assert len(column(reader, "loss")) == 2


def test_accumulation_gives_the_same_run(trained):
    whole, _ = trained("whole")
    parts, _ = trained("parts", training__accumulation=3)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)
    assert column(parts, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=1e-4)


def test_gradient_checkpointing_gives_the_same_run_and_survives_growth(trained):
    plain, _ = trained("plain")
    saving, trainer = trained("saving", training__gradient_checkpointing=True)
    assert column(saving, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    assert all(layer.gradient_checkpointing for layer in trainer.model.model.layers)


def test_bfloat16_stays_close_and_keeps_weights_in_float32(trained):
    plain, _ = trained("plain")
    coarse, trainer = trained("coarse", training__precision="bfloat16")
    assert column(coarse, "loss") == pytest.approx(column(plain, "loss"), rel=2e-2)
    assert column(coarse, "loss") != column(plain, "loss")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_float16_scales_the_loss(trained):
    plain, _ = trained("plain")
    half, trainer = trained("half", training__precision="float16")
    assert trainer.step.scaler.get_scale() > 1
    # The first steps may be left out while the scale comes down; the losses stay near.
    assert column(half, "loss")[0] == pytest.approx(column(plain, "loss")[0], rel=2e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, inside its compiler
def test_compiled_training_survives_growth(trained):
    plain, _ = trained("plain")
    compiled, _ = trained("compiled", training__compile=True)
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(trained):
    one, _ = trained("one")
    two, _ = trained("two")
    other, _ = trained("other", seed=1)
    read = [(reader.folder / "metrics.csv").read_bytes() for reader in (one, two, other)]
    assert read[0] == read[1] != read[2]


def test_checkpoints_are_kept_as_asked(trained):
    reader, _ = trained(checkpoint__named_every_steps=1, checkpoint__keep=2)
    names = [path.name for path in reader.checkpoints()]
    assert names == ["latest", "best", "ckpt_step5", "ckpt_step6", "ckpt_task0"]


def test_one_schedule_over_the_run_or_over_each_task(trained):
    rates = column(trained(training__schedule={"type": "wsd", "warmup_fraction": 0.5})[0], "learning_rate")
    assert rates[0] < rates[1] < rates[2] <= 3e-3
    assert rates[-1] < max(rates)


def test_lengths_in_epochs_and_tokens(trained):
    assert len(column(trained("tokens", training__steps=None, training__tokens=1000)[0], "loss")) == 6
    epochs, _ = trained("epochs", training__steps=None, training__epochs=0.05)
    # 60 kB, nine tenths of it for training, a byte a token: about 2,700 tokens of 192 a step.
    assert 8 <= len(column(epochs, "loss")) <= 20


def test_estimate_plans_growth_and_counts_the_same_operations(trained, monkeypatch):
    reader, trainer = trained()
    result = estimate(experiment_from(TREE, source="test", flags={}))
    assert isinstance(experiment_from(TREE, source="test", flags={}), Experiment)
    assert [phase.at_step for phase in result.phases] == [0, 3]
    assert result.phases[-1].parameters == count_parameters(trainer.model)
    assert result.flops == pytest.approx(column(reader, "flops")[-1])
    assert result.tokens == column(reader, "tokens")[-1]
    assert result.seconds > 0


# ---- growth with limits, and averaged weights ----------------------------------------------------


def never(plan: object, reason: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("growth__budget", {"parameters": 9_000}, "parameters, the budget is 9,000"),
        ("growth__approve", f"{__name__}:never", "not approved"),
        ("growth__dry_run", True, "dry run"),
    ],
)
def test_growth_that_is_not_allowed_is_recorded_and_not_done(trained, flag, value, why):
    reader, trainer = trained(**{flag: value})
    (event,) = reader.growth()
    assert why in event["reason"] and event["step"] == 3
    assert event["parameters_after"] > event["parameters_before"] == count_parameters(trainer.model)
    assert len(set(column(reader, "parameters"))) == 1


def test_what_the_configuration_says_of_newborn_weights_reaches_them(trained):
    _, trainer = trained(growth__newborn_rate=0.5, growth__rewarm_steps=7, growth__moments="reset")
    rewarm = trainer.growth.rewarm
    assert (rewarm.steps, rewarm.factor, trainer.growth.moments) == (7, 0.5, "reset")
    assert rewarm.newborns, "a rate of their own never ends"


def test_a_growing_run_with_an_average_scores_and_saves_the_averaged_model(trained):
    reader, trainer = trained("averaged", training__average_decay=0.8, training__steps=20)
    plain, _ = trained("plain", training__steps=20)
    assert column(reader, "loss") == column(plain, "loss"), "training itself does not notice"
    assert column(reader, "validation_loss")[5] != column(plain, "validation_loss")[5]
    latest = reader.folder / "latest"
    assert model_folder(latest) == latest / "averaged" == model_folder(reader.folder)
    averaged = dict(load_model(model_folder(reader.folder)).named_parameters())
    weights = dict(load_model(latest).named_parameters())
    with trainer.average.applied():
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, averaged[name])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert not torch.equal(parameter, averaged[name])
    (latest / "averaged/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"averaged/model.safetensors is not what was written"):
        load_model(latest / "averaged")


def test_the_rate_does_not_show_hidden_boundaries(trained):
    """It re-warms in each task where the learner may see them, and runs once over all of them where not."""
    rates = {}
    for boundaries in (True, False):
        stream = {"type": "sequence", "rounds": 2, "boundaries": boundaries}
        reader, _ = trained(name=f"{boundaries}", data__stream=stream)
        rates[boundaries] = column(reader, "learning_rate")
    assert rates[True][:6] == rates[True][6:]
    peak = rates[False].index(max(rates[False]))
    assert rates[False][peak:] == sorted(rates[False][peak:], reverse=True)
