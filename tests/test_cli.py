"""The command line: what it prints, and that every bad input is one line and exit code 2."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from cambia.rundir import RunWriter
from cambia.sweepdir import CellRecord, Result, SweepWriter
from tests.conftest import checkpoint

TINY = {
    "name": "tiny",
    "data": {
        "tasks": [
            {"name": "counting", "source": {"type": "generated", "task": "counting", "limit_bytes": 60_000}},
            {"name": "copy", "source": {"type": "generated", "task": "copy", "limit_bytes": 60_000}},
        ]
    },
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "training": {"steps": 4, "batch_size": 4, "sequence_length": 32},
    "growth": {
        "rules": [{"when": {"type": "schedule", "at_steps": [3]}, "then": {"type": "widen_ffn", "add": 8}}]
    },
    "evaluation": {"every_steps": 2, "max_bytes": 1000},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cambia(tmp_path, monkeypatch, command_line, cache):
    """Call the command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CAMBIA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    return command_line


def test_a_run_from_the_first_step_to_the_report(cambia, tmp_path):
    code, out, _ = cambia("run", "tiny.yaml", "--training.steps=5", "--name", "one")
    assert code == 0
    assert "counting" in out and "copy" in out
    run = tmp_path / "runs/one"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 10
    assert summary["parameters_end"] > summary["parameters_start"]
    assert "<html" in (run / "report.html").read_text().lower()
    assert len((run / "eval.csv").read_text().splitlines()) == 1 + 3 * 2 * 2  # rows, tasks, splits

    # What the run wrote back runs again, and gives the same numbers.
    code, _, _ = cambia("run", str(run / "config.yaml"), "--name", "again")
    assert code == 0
    for log in ("metrics.csv", "eval.csv", "growth.jsonl"):
        assert (tmp_path / "runs/again" / log).read_bytes() == (run / log).read_bytes()

    assert cambia("run", "tiny.yaml", "--name", "one")[0] == 2  # taken
    code, out, _ = cambia("runs", "list")
    assert code == 0 and "one" in out and "again" in out
    code, out, _ = cambia("generate", "one", "--prompt", "1 2 3", "--max-new-tokens", "8")
    assert code == 0 and out.startswith("1 2 3")
    code, out, _ = cambia("eval", "one")
    assert code == 0 and "counting" in out
    (tmp_path / "mine.txt").write_text("1 2 3 4 5 6\n" * 40)
    code, out, _ = cambia("eval", "one", "mine.txt")
    assert code == 0 and "mine.txt" in out
    code, out, _ = cambia("export", "one", "stock")
    assert code == 0 and "LlamaForCausalLM" in out
    assert json.loads((tmp_path / "stock/config.json").read_text())["model_type"] == "llama"
    assert cambia("runs", "delete", "again")[0] == 2  # nobody there to ask
    assert cambia("runs", "delete", "again", "--yes")[0] == 0
    assert not (tmp_path / "runs/again").exists()


def test_a_stock_checkpoint_from_the_first_step_to_the_export(cambia, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint(tmp_path / "base", "gpt2")
    tree = {**TINY, "model": {"type": "pretrained", "path": "base"}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tree))
    code, out, _ = cambia("run", "tuned.yaml", "--dry-run")
    assert code == 0 and "widen_ffn" in out
    code, out, err = cambia("run", "tuned.yaml", "--name", "tuned")
    assert code == 0, err
    assert "pretrained" in out and "untrained" not in out
    page = (tmp_path / "runs/tuned/report.html").read_text()
    assert "pretrained" in page and "untrained" not in page
    assert "tokenizer: {type: model" in (tmp_path / "runs/tuned/config.yaml").read_text()
    # Three times as long as GPT-2 has positions.
    words = ("--prompt", "1 2 3", "--max-new-tokens", "192", "--temperature", "0")
    code, out, _ = cambia("generate", "tuned", *words)
    assert code == 0 and out.startswith("1 2 3")
    code, out, _ = cambia("eval", "tuned")
    assert code == 0 and "counting" in out and "copy" in out
    (tmp_path / "mine.txt").write_text("1 2 3 4 5 6\n" * 40)
    assert cambia("eval", "base", "mine.txt")[0] == 0
    assert cambia("report", "tuned")[0] == 0
    assert "leave out --to llama" in cambia("export", "tuned", "out", "--to", "llama")[2]
    code, out, _ = cambia("export", "tuned", "out")
    assert code == 0 and "GPT2LMHeadModel" in out
    assert not (tmp_path / "out/state.json").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.n_inner == 20 + 8


def test_dry_run_trains_nothing(cambia, tmp_path):
    code, out, _ = cambia("run", "tiny.yaml", "--dry-run")
    assert code == 0
    assert "widen_ffn" in out and "FLOPs" in out
    assert not (tmp_path / "runs").exists()


def test_default_names_are_numbered(cambia, tmp_path):
    for expected in ("tiny", "tiny-2"):
        assert cambia("run", "tiny.yaml", "--training.steps", "1")[0] == 0
        assert (tmp_path / "runs" / expected / "summary.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "nowhere.yaml"], "no file nowhere.yaml"),
        (["run", "frist_growth"], "did you mean 'first_growth'"),
        (["run", "tiny.yaml", "--training.stepz", "3"], "did you mean 'steps'"),
        (["run", "tiny.yaml", "--trainin.steps", "3"], "did you mean 'training'"),
        (["run", "tiny.yaml", "--nam", "x"], "did you mean 'name'"),
        (["run", "tiny.yaml", "--training.steps", "many"], "--training.steps"),
        (["run", "tiny.yaml", "--training.steps", "-3"], "greater than 0"),
        (["run", "tiny.yaml", "--training.precision", "float7"], "float32"),
        (["run", "tiny.yaml", "--training.clip_norm", ".inf"], "expected a finite number"),
        (["run", "tiny.yaml", "--seed", "99999999999999999999"], "--seed"),
        (["run", "tiny.yaml", "--growth.rules.0.then.type", "widen_fn"], "did you mean 'widen_ffn'"),
        (["run", "tiny.yaml", "--growth.rules.5.cooldown_steps", "1"], "entries are 0 to 0"),
        (["run", "tiny.yaml", "--growth.rules.0.then.growth_factor", "2"], "is called 'factor' here"),
        (["run", "tiny.yaml", "--growth.rules.0.when.type", "nomodule.x:Y"], "no module 'nomodule.x'"),
        (["run", "tiny.yaml", "--training.epochs", "2"], "takes one length"),
        (["run", "tiny.yaml", "--model.num_key_value_heads", "3"], "use num_key_value_heads="),
        (["run", "tiny.yaml", "--model.num_attention_heads", "5"], "use num_attention_heads=4"),
        (["run", "tiny.yaml", "--device", "tpu"], "expected auto, cpu, cuda"),
        (["run", "tiny.yaml", "--device", "cuda:99"], "none on this machine"),
        (["run", "tiny.yaml", "--name", "../up"], "cannot name a run"),
        (["run", "tiny.yaml", "--model.max_position_embeddings", "8"], "max_position_embeddings"),
        (["run", "tiny.yaml", "extra"], "stands alone"),
        (["run", "tiny.yaml", "--model.hidden_size", "1048576", "--dry-run"], "lower --model.hidden_size"),
        (["run", "tiny.yaml", "--data.cache_dir", "~nosuchuser/x"], "~nosuchuser/x: there is no user"),
        (["learn", "~nosuchuser/x", "tiny.yaml"], "~nosuchuser/x: there is no user"),
        (["learn", "tiny.yaml", "~nosuchuser/x"], "~nosuchuser/x: there is no user"),
        (["run", "--resume", "nothing"], "no run 'nothing'"),
        (["rnu"], 'Did you mean "run"'),
        (["generate", "nothing", "--prompt", "x"], "no run 'nothing'"),
        (["generate", "x", "--prompt", "x", "--temperature", "nan"], "--temperature nan: expected 0, or"),
        (["generate", "x", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: expected"),
        (["eval", "x", "--max-bytes", "-5"], "--max-bytes -5: expected"),
        (["export", "nothing", "tiny.yaml/x"], "no run 'nothing'"),
        (["run", "tiny.yaml/x.yaml"], "tiny.yaml"),
        (["report", "nothing"], "no run 'nothing'"),
        (["recipes", "frist_growth"], "did you mean 'first_growth'"),
        (["data", "fetch", "tiny-shakespear", "--into", "."], "tiny-shakespeare"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cambia, words, expected):
    code, _, err = cambia(*words)
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"caf\xe9 au lait\n" * 30, "UTF-8"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', ":2"),
        ("folder", "folder", "folder"),
        ("short.txt", b"abc\n", ""),
    ],
)
def test_bad_text_is_one_line(cambia, tmp_path, name, content, expected):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    tree = {**TINY, "data": {"tasks": [{"name": "mine", "source": {"type": "files", "path": name}}]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    code, _, err = cambia("run", "mine.yaml")
    assert code == 2
    assert name in err or expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs/tiny/config.json").exists(), "a run that never began takes no name"


def test_bad_yaml_names_the_file_and_the_place(cambia, tmp_path):
    (tmp_path / "bad.yaml").write_text("training: {steps: 3\nname: x")
    assert "bad.yaml is not YAML" in cambia("run", "bad.yaml")[2]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**TINY, "trianing": {}}))
    assert "bad.yaml: trianing" in cambia("run", "bad.yaml")[2]


def test_an_altered_checkpoint_is_refused_and_nothing_is_lost(cambia, tmp_path):
    assert cambia("run", "tiny.yaml", "--training.steps", "2")[0] == 0
    weights = tmp_path / "runs/tiny/latest/model.safetensors"
    metrics = (tmp_path / "runs/tiny/metrics.csv").read_bytes()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for words in (["run", "--resume", "tiny"], ["generate", "tiny", "--prompt", "x"]):
        code, _, err = cambia(*words)
        assert code == 2
        assert "SHA-256" in err
    weights.write_bytes(content[: len(content) // 2])
    assert cambia("run", "--resume", "tiny")[0] == 2
    assert (tmp_path / "runs/tiny/metrics.csv").read_bytes() == metrics
    manifest = tmp_path / "runs/tiny/latest/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    assert "format 99" in cambia("run", "--resume", "tiny")[2]
    assert cambia("report", "tiny")[0] == 0


def test_a_checkpoint_of_another_version_is_refused_in_one_line(cambia, tmp_path):
    assert cambia("run", "tiny.yaml", "--training.steps", "2")[0] == 0
    latest = tmp_path / "runs/tiny/latest"
    state = json.loads((latest / "state.json").read_text())
    del state["values"]
    (latest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((latest / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = sha256((latest / "state.json").read_bytes()).hexdigest()
    (latest / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = cambia("run", "--resume", "tiny")
    assert code == 2
    assert "another version of Cambia" in err and "--name" in err and "Traceback" not in err


def test_resume_refuses_what_would_make_it_another_run(cambia):
    assert cambia("run", "tiny.yaml", "--training.steps", "2")[0] == 0
    code, _, err = cambia("run", "--resume", "tiny", "--training.batch_size", "8")
    assert code == 2 and "cannot change" in err
    assert cambia("run", "--resume", "tiny", "--optimizer.learning_rate", "0.001")[0] == 0


def other_run(folder, tree):
    """A run that has begun, of which only the settings are there."""
    run = RunWriter(folder / "runs/other")
    run.write_config(tree, "")
    run.close()


@pytest.mark.parametrize(
    ("command", "tree", "right"),
    [
        ("learn", {"methods": [{"type": "full_per_task"}]}, "run"),
        ("learn", {"methods": [], "decoding": {"rewards": []}}, "tune-decoding"),
        ("tune-decoding", {"methods": [{"type": "experts"}]}, "learn"),
        ("tune-decoding", {"decoding": None}, "run"),
    ],
)
def test_a_run_goes_on_with_the_command_that_made_it(cambia, tmp_path, command, tree, right):
    other_run(tmp_path, tree)
    code, _, err = cambia(command, "--resume", "other")
    assert code == 2 and f"cambia {right} --resume other" in err and len(err.splitlines()) == 1, err


def test_nonfinite_loss_stops_with_the_checkpoint_kept_or_is_skipped(cambia, tmp_path):
    words = ["run", "tiny.yaml", "--optimizer.learning_rate", "1e30", "--growth.enabled", "false"]
    code, _, err = cambia(*words, "--name", "stops")
    assert code == 2
    assert "at step" in err and "counting" in err and "on_nonfinite skip" in err
    assert (tmp_path / "runs/stops/latest/manifest.json").exists()
    code, _, _ = cambia(*words, "--name", "skips", "--training.on_nonfinite", "skip")
    assert code == 0
    assert json.loads((tmp_path / "runs/skips/summary.json").read_text())["skipped_steps"] > 0


def test_out_of_memory_names_what_helps(cambia, monkeypatch):
    from cambia.training.trainer import Trainer

    def burst(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(Trainer, "_step", burst)
    code, _, err = cambia("run", "tiny.yaml")
    assert code == 2
    for word in ("batch_size", "accumulation", "sequence_length", "gradient_checkpointing"):
        assert word in err


def test_a_full_disk_keeps_what_was_written(cambia, tmp_path, monkeypatch):
    import errno

    from cambia.training import checkpoint

    original, calls = checkpoint.save_file, []

    def full(tensors: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = cambia("run", "tiny.yaml", "--checkpoint.every_steps", "1")
    assert code == 2 and "no space left" in err and "--resume" in err
    monkeypatch.setattr(checkpoint, "save_file", original)
    assert cambia("run", "--resume", "tiny")[0] == 0


@pytest.mark.parametrize("which", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_finish_the_step_and_save(tmp_path, cache, which, cambia):
    command = [sys.executable, "-m", "cambia", "run", "tiny.yaml"]
    process = subprocess.Popen(
        [*command, "--training.steps", "100000", "--threads", "1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "runs/tiny/metrics.csv"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    if which == signal.SIGINT:  # while it is going, nobody else may write to it
        code, _, err = cambia("run", "--resume", "tiny")
        assert code == 2 and "still going" in err
    process.send_signal(which)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cambia run --resume tiny" in out
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] == len(metrics.read_text().splitlines()) - 1


def test_every_command_has_help_and_doctor_reports(cambia):
    code, out, _ = cambia("--help")
    assert code == 0
    for command in ("run", "generate", "eval", "report", "export", "recipes", "runs", "data", "doctor"):
        assert command in out
        assert cambia(command, "--help")[0] == 0
    code, out, _ = cambia("doctor")
    assert code == 0 and "torch" in out and "sandbox" in out
    assert not re.search(r"missing \w+: pip install 'cambia'", out), "the extra's name is part of the command"
    assert cambia("--version")[1].strip() == __import__("cambia").__version__
    assert cambia("data", "list")[0] == 0
    assert cambia("data", "prepare", "tiny.yaml")[0] == 0


def test_recipes_print_yaml_that_is_complete(cambia, tmp_path):
    code, out, _ = cambia("recipes", "first_growth", "--print")
    assert code == 0
    tree = yaml.safe_load(out)
    assert tree["training"]["schedule"]["type"] == "wsd"
    (tmp_path / "copy.yaml").write_text(out)
    assert cambia("run", "copy.yaml", "--training.stepz", "1")[0] == 2


def test_sweeps_are_listed_and_deleted(cambia, tmp_path):
    sweep = SweepWriter(tmp_path / "runs" / "study")
    cell = CellRecord("a", "1", {"seed": 0})
    sweep.write_grid("", [cell, CellRecord("b", "2", {"seed": 1})])
    sweep.record(Result("a", "1", {"seed": 0}, "finished"))
    _, out, _ = cambia("runs", "list")
    assert "sweep study: 2 cells, 1 finished, 0 failed" in out
    claim = sweep.claim("2")
    code, _, err = cambia("runs", "delete", "study", "--yes")
    assert code == 2 and "still going" in err
    claim.release()
    shutil.rmtree(sweep.folder / ".claims")  # a copy without hidden files, for example
    assert cambia("runs", "delete", "study", "--yes")[0] == 0
    assert not sweep.folder.exists()


def test_no_answer_deletes_nothing(cambia, tmp_path, monkeypatch):
    sweep = SweepWriter(tmp_path / "runs" / "study")
    sweep.write_grid("", [])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, out, _ = cambia("runs", "delete", "study")
    assert code == 0 and "kept" in out and sweep.folder.exists()


@pytest.mark.parametrize("content", ["[{", "[1]", "3", '[{"nmae": 1}]'])
def test_a_broken_sweep_is_listed_beside_the_others(cambia, tmp_path, content):
    for name in ("broken", "whole"):
        SweepWriter(tmp_path / "runs" / name).write_grid("", [])
    (tmp_path / "runs/broken/grid_cells.json").write_text(content)
    code, out, _ = cambia("runs", "list")
    assert code == 0 and "sweep broken: unreadable: " in out and "sweep whole: 0 cells" in out


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_run_whose_records_are_no_records_is_told_in_one_line(cambia, tmp_path, name):
    other_run(tmp_path, {})
    (tmp_path / "runs/other" / name).write_text("[1]")
    code, _, err = cambia("report", "other")
    assert code == 2 and f"{name} was altered" in err and len(err.splitlines()) == 1, err
