"""`cambia plan`: what it says is what a run of it does, and every bad input is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from cambia.experiment.estimate import estimate
from cambia.experiment.planning import plan_run
from cambia.experiment.tree import experiment_from
from cambia.growth import ScheduleTrigger, Signals
from cambia.rundir import METRICS, RunReader
from tests.conftest import Call, tiny

TEXT = {"type": "generated", "task": "counting", "limit_bytes": 40_000}
TREE = {
    "data": {"tasks": [{"name": "counting", "source": TEXT}]},
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2},
    "training": {"steps": 8, "batch_size": 4, "sequence_length": 32},
    "methods": [],
}


@pytest.fixture
def cambia(tmp_path, monkeypatch, command_line: Call) -> Call:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)
    return command_line


def test_a_plan_is_what_its_run_does():
    deep = {**TREE, "model": {**TREE["model"], "num_hidden_layers": 7}}
    found = plan_run(experiment_from(deep, source="test", flags={}), tokens=128 * 50)
    assert [(stage.step, stage.layers) for stage in found.stages] == [(0, 2), (18, 4), (35, 7)]
    expected = estimate(experiment_from(found.tree, source="the plan", flags={}))
    assert [phase.parameters for phase in expected.phases] == [stage.parameters for stage in found.stages]
    assert [phase.at_step for phase in expected.phases] == [stage.step for stage in found.stages]
    assert found.flops == pytest.approx(expected.flops)
    assert found.bound == pytest.approx(1 - expected.flops / found.flops_large)
    again = plan_run(experiment_from(deep, source="test", flags={}), flops=found.flops)
    assert again.steps in (found.steps, found.steps - 1)


@pytest.mark.parametrize("tokens", [128 * 50, 128 * 2000])
def test_growth_is_due_after_so_many_tokens_a_parameter(tokens):
    """And at the latest while enough of the run is left; whichever way the budget is told."""
    experiment = experiment_from(
        {**TREE, "model": {**TREE["model"], "num_hidden_layers": 8}}, source="test", flags={}
    )
    found = plan_run(experiment, tokens=tokens)
    in_layers = [stage.parameters for stage in found.stages]
    layer = (in_layers[2] - in_layers[1]) / 4
    due = [13 * layer * layers / 128 for layers in (2, 4)]
    expected = due if tokens > 1e5 else [0.35 * found.steps, 0.7 * found.steps]
    assert [stage.step for stage in found.stages[1:]] == pytest.approx(expected, abs=1)
    again = plan_run(experiment, flops=found.flops)
    assert again.steps == pytest.approx(found.steps, abs=1)
    late = plan_run(experiment, tokens=tokens, grow_at=0.6)
    assert late.stages[-1].step == pytest.approx(0.6 * late.steps, abs=1)


def test_the_command_writes_a_run_that_works_and_reads_its_curve(cambia: Call, tmp_path):
    words = ["--tokens", "6400", "--start-layers", "2", "--out", "plan.yaml"]
    sizes = [
        "--model.hidden_size",
        "16",
        "--model.intermediate_size",
        "24",
        "--model.num_attention_heads",
        "2",
    ]
    kept = [
        "--training.batch_size",
        "4",
        "--training.sequence_length",
        "32",
        "--model.num_key_value_heads",
        "2",
    ]
    one = [
        "--data.tasks",
        "[{name: counting, source: {type: generated, task: counting, limit_bytes: 40000}}]",
    ]
    code, out, err = cambia("plan", "smoke", *words, *sizes, *kept, *one, "--layers", "4", "--methods", "[]")
    assert code == 0, err
    told = " ".join(out.split())
    assert (
        "What is not computed, t (1 - x) =" in told
        and "wrote plan.yaml" in told
        and "for each parameter" in told
    )
    assert (
        "Measured: - growth in depth by the plan's schedule, 0.28M parameters, 21 tokens for each, 3 seeds"
        in told
    )
    assert "0.28M parameters, 7 tokens for each" in told, "the length of a run decides what growth is worth"
    code, _, err = cambia("plan", "smoke", "--tokens", "6400", "--out", "plan.yaml")
    assert code == 2 and "--out plan.yaml exists already" in err
    code, _, err = cambia("run", "plan.yaml", "--name", "planned")
    assert code == 0, err
    run = RunReader(tmp_path / "runs/planned")
    assert [event["step"] for event in run.growth()] == [31]
    assert run.rows(METRICS)[-1]["tokens"] == 6400
    again = ["plan", "plan.yaml", "--layers", "8", "--start-layers", "2", "--tokens", "9e3", "--curve"]
    code, out, err = cambia(*again, "planned")
    assert code == 0 and "the efficiency rule would" in " ".join(out.split()), err
    code, _, err = cambia(*[word.replace("2", "1") for word in again], "planned")
    assert code == 2 and "name a run of the small model" in err
    code, _, err = cambia("run", "plan.yaml", "--name", "short", "--training.steps", "6")
    assert code == 0, err
    code, _, err = cambia(*again, "short")
    assert code == 2 and "too short to fit" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "1", "--tokens", "1e6"], "--layers 1: expected 2 to 1,000"),
        (["--layers", "2.5", "--tokens", "1e6"], "--layers: expected a whole number, got 2.5"),
        (["--layers", "inf", "--tokens", "1e6"], "--layers: expected a whole number, got inf"),
        (["--layers", "200000", "--tokens", "1e6"], "--layers 200000: expected 2 to 1,000"),
        (["--layers", "4", "--model.num_hidden_layers", "4", "--tokens", "1e6"], "both name the target"),
        (["--tokens", "1e6", "--training.steps", "9"], "--training.steps: the plan decides that"),
        (["--tokens", "1e6", "--growth.rules", "[]"], "--growth.rules: the plan decides that"),
        (
            ["--tokens", "1e7", "--growth.budget.parameters", "600000"],
            "beyond --growth.budget: 1,017,984 par",
        ),
        (["--tokens", "1e6", "--training.schedule.warmup_fraction", "0.6"], "its learning rate rises until"),
        (["--flops", "5e-324"], "below one step of each task"),
        (["--flops", "1e29"], "tokens or 4.73e+18 steps: give a smaller one"),
        (["--tokens", "1e4"], "falls already: give a larger budget"),
        (["--tokens", "1e6", "--out", "a_file/plan.yaml"], "no folder can be made there"),
        (["--layers", "3", "--start-layers", "3", "--tokens", "1e6"], "growth only adds"),
        (["--tokens", "10"], "below one step of each task, which takes 3,072 tokens"),
        (["--flops", "10"], "below one step of each task, which takes"),
        (["--tokens", "4e3", "--layers", "16", "--start-layers", "1"], "steps is too short to grow 4 times"),
        (["--tokens", "0"], "--tokens 0: expected a number above 0"),
        (["--flops", "-1"], "--flops -1: expected a number above 0"),
        (["--tokens", "nan"], "--tokens nan: expected"),
        (["--flops", "inf"], "--flops inf: expected"),
        (["--layers", "0", "--tokens", "1e6"], "--layers 0: expected 2"),
        (["--start-layers", "-1", "--tokens", "1e6"], "--start-layers -1: expected 1 at least"),
        (["--tokens", "1e6", "--data.tasks.0.steps", "900"], "the tasks say themselves how long"),
        (["--tokens", "1e6", "--training.schedule.decay_fraction", "1"], "fall from the first step on"),
        (
            ["--tokens", "1e6", "--training.schedule", "{type: cosine}"],
            "where its learning rate falls already",
        ),
        (["--tokens", "1e6", "--flops", "1e9"], "takes one budget"),
        ([], "needs a budget: --tokens 8e6"),
        (["--tokens", "1e6", "--grow-at", "0.95"], "before its rate falls"),
        (["--tokens", "1e6", "--curve", "nothing"], "there is no run 'nothing'"),
    ],
)
def test_bad_input_is_one_line(cambia: Call, words, said):
    Path("a_file").touch()
    code, _, err = cambia("plan", *words)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.225])
def test_a_share_of_a_run_is_the_step_at_which_it_grows(share):
    trigger = ScheduleTrigger(at_fractions=[share])
    (planned,) = trigger.steps(100, 128)
    fired = [step for step in range(1, 101) if trigger.update(Signals(step=step, progress=step / 100))]
    assert fired == [planned]


def test_several_steps_of_each_batch_cost_as_much_each():
    trees = [{**TREE, "training": {**TREE["training"], "neural_steps_per_batch": n}} for n in (1, 2)]
    once, twice = (plan_run(experiment_from(tree, source="", flags={}), tokens=128 * 50) for tree in trees)
    assert twice.flops == 2 * once.flops and twice.bound == pytest.approx(once.bound)
    estimated = estimate(experiment_from(twice.tree, source="", flags={}))
    assert twice.flops == pytest.approx(estimated.flops)


def test_a_checkpoint_is_where_it_starts(cambia: Call):
    tiny("llama").save_pretrained("old")
    words = ["plan", "finetune", "--model.path", "old", "--tokens", "1e6", "--training.sequence_length", "32"]
    code, _, err = cambia(*words)
    assert code == 2 and "needs the depth to come to" in err
    code, _, err = cambia(*words, "--layers", "1")
    assert code == 2 and "--layers 1: expected 2" in err
    code, _, err = cambia(*words, "--layers", "2")
    assert code == 2 and "the target has 2 layers and the start 2" in err
    code, _, err = cambia(*words, "--layers", "6", "--start-layers", "1")
    assert code == 2 and "leave out --start-layers" in err
    config = tiny("llama").config
    config.num_hidden_layers = 0
    LlamaForCausalLM(config).save_pretrained("none")
    code, _, err = cambia(*[word.replace("old", "none") for word in words], "--layers", "4")
    assert code == 2 and "that model has no layers to copy" in err
