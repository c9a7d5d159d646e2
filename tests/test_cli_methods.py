"""Methods and streams from the command line: what is refused before training, and what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cambia.rundir import RunReader

TREE = {
    "data": {
        "tasks": [
            {"name": name, "source": {"type": "generated", "task": name, "size_bytes": 30_000}}
            for name in ("copy", "counting")
        ]
    },
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "training": {"steps": 3, "batch_size": 4, "sequence_length": 24},
    "evaluation": {"every_steps": None, "max_bytes": 300},
    "threads": 1,
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CAMBIA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(TREE))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "skills.jsonl").write_text(
        '{"skill": "a", "instruction": "1", "output": "2"}\n{"output": "3"}\n'
    )
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods.0.type", "ewk"], "did you mean 'ewc'"),
        (["--methods.0.type", "ewc", "--methods.0.strenth", "3"], "did you mean 'strength'"),
        (
            ["--methods.0.type", "ewc", "--data.stream.boundaries", "false"],
            "--data.stream.boundaries true, or take a method that needs no boundaries (naive, joint, replay",
        ),
        (
            ["--data.stream.boundaries", "false", "--training.schedule", "{type: wsd, over: task}"],
            "shows the learner where tasks begin",
        ),
        (["--methods", "[{type: replay}, {type: joint}]"], "replay and joint both choose the rows"),
        (["--methods.0.capacity", "null"], "a replay buffer needs a limit"),
        (["--methods.0.budget_bytes", "30"], "give the replay buffer at least that many"),
        (["--methods.0.fraction", "1.5"], "methods.0.fraction"),
        (["--methods.0.type", "lora", "--training.average_decay", "0.9"], "--training.average_decay"),
        (
            ["--data.stream.type", "sequence", "--data.stream.order", "[copy]", "--methods.0.type", "lwf"],
            "lwf works from one task to the next",
        ),
        (["--data.stream.order", "[copy, countin]"], "did you mean 'counting'"),
        (["--data.stream.type", "mixtures", "--data.stream.domains", "3"], "mixes 3 tasks, there are 2"),
        (["--data.stream.type", "stationary"], "is made of one text"),
        (["--data.tasks.0.source", "{type: files, path: empty.txt}"], "gave no text to train on"),
        (["--data.tasks", "[]"], "tasks is empty"),
        (
            ["--data.tasks", "[]", "--data.stream", "{type: skills, path: skills.jsonl}"],
            "1 of 2 rows have no skill",
        ),
        (
            ["--data.stream.type", "mixtures", "--methods.0.type", "full_per_task"],
            "weights for each task need stages of one task",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_training(command_line, tree, words, said) -> None:
    code, out, err = command_line("run", str(tree), "--name", "one", *words)
    assert code == 2 and said in " ".join(err.split())
    assert "Traceback" not in out + err
    assert not list(Path("runs").glob("one/metrics.csv"))


def test_a_growing_model_and_a_method_that_does_not_follow_are_refused(command_line, tree) -> None:
    rule = "[{when: {type: schedule, at_steps: [2]}, then: {type: widen_ffn, add: 4}}]"
    code, _, err = command_line("run", str(tree), "--growth.rules", rule, "--methods.0.type", "ewc")
    assert code == 2 and "--growth.enabled false" in err


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["--data.stream.rounds", "2"], ["copy", "counting"] * 2),
        (["--data.stream.type", "gradual"], ["copy", "counting"]),
        (["--data.stream.type", "mixtures", "--data.stream.stages", "2"], ["copy+counting"] * 2),
        (
            ["--data.tasks", "[]", "--data.stream", "{type: counting, skills: [1, -1], size_bytes: 30000}"],
            ["up_1", "down_1"],
        ),
    ],
)
def test_streams_from_the_command_line(command_line, tree, words, stages) -> None:
    code, _, err = command_line("run", str(tree), "--name", "one", *words)
    assert code == 0, err
    rows = [row for row in RunReader("one").rows("eval.csv") if row["split"] == "test"]
    assert list(dict.fromkeys((row["stage"], row["task_trained"]) for row in rows)) == [
        (0, "none"),
        *enumerate(stages, 1),
    ]


def test_permuted_vocabulary_is_scored_through_its_permutations(command_line, tree) -> None:
    words = ["--data.tasks", yaml.safe_dump(TREE["data"]["tasks"][:1], default_flow_style=True)]
    stream = "{type: permuted_vocabulary, tasks: 3, mode: repeat, period: 2}"
    assert command_line("run", str(tree), "--name", "one", *words, "--data.stream", stream)[0] == 0
    run = RunReader("one")
    scored = {r["task_eval"]: r for r in run.rows("eval.csv") if r["stage"] == 3 and r["split"] == "test"}
    assert list(scored) == ["perm0", "perm1", "perm0.2"]
    assert (
        scored["perm0"]["nll_per_byte"]
        == scored["perm0.2"]["nll_per_byte"]
        != scored["perm1"]["nll_per_byte"]
    )
    code, out, _ = command_line("eval", "one", "--max-bytes", "300")
    assert code == 0 and f"{scored['perm1']['bits_per_byte']:.4f}" in out


def test_specialists_are_scored_by_their_own_weights(command_line, tree) -> None:
    assert command_line("run", str(tree), "--name", "one", "--methods.0.type", "full_per_task")[0] == 0
    rows = [row for row in RunReader("one").rows("eval.csv") if row["split"] == "test" and row["stage"] == 2]
    assert {row["route"] for row in rows} == {"oracle"}
    code, out, _ = command_line("eval", "one", "--max-bytes", "300")
    assert code == 0
    assert all(f"{row['bits_per_byte']:.4f}" in out for row in rows)
