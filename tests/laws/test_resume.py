"""Law 5: a run killed at any moment and resumed equals the uninterrupted one, bit for bit.

Each life of the run is a process of its own, forked from a server that has imported the library, and
ends by SIGKILL: after a step, in the middle of a log row, while a checkpoint is written, between the two
renames that put it in place, right after growth, or at a random time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import checkpoint

TREE: dict[str, Any] = {
    "data": {
        "tasks": [
            {"name": "counting", "source": {"type": "generated", "task": "counting", "limit_bytes": 60_000}},
            {"name": "copy", "source": {"type": "generated", "task": "copy", "limit_bytes": 60_000}},
        ]
    },
    "model": {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 3, "num_attention_heads": 2},
    "training": {"steps": 9, "batch_size": 6, "sequence_length": 32, "accumulation": 2, "average_decay": 0.7},
    # What grows along: a buffer with logits, and a teacher of the shape of before.
    "methods": [
        {"type": "derpp", "fraction": 0.3, "capacity": 20, "logits": 8, "beta": 0.5},
        {"type": "lwf", "strength": 0.1},
    ],
    "growth": {
        "rewarm_steps": 4,
        "rules": [
            {"when": {"type": "schedule", "at_steps": [4]}, "then": {"type": "widen_ffn", "add": 8}},
            {"when": {"type": "schedule", "at_steps": [7, 12]}, "then": {"type": "add_layers", "add": 1}},
            {
                "when": {"type": "plateau", "patience": 1, "min_improvement": 9.0},
                "then": {"type": "widen_ffn", "factor": 1.3},
                "max_events": 1,
                "cooldown_steps": 3,
            },
            {
                # Windows, memories and a cooldown that are cut in two by most deaths.
                "when": {
                    "type": "any",
                    "triggers": [
                        {
                            "type": "gradient_norm",
                            "below": 0.5,
                            "above": 1.01,
                            "window_steps": 3,
                            "settle_steps": 2,
                        },
                        {"type": "loss_spike", "ratio": 1.02, "window": 4, "patience": 2},
                        {"type": "slice_spike", "slice": "long", "ratio": 1.01, "patience": 1, "window": 2},
                    ],
                },
                "then": {"type": "widen_ffn", "add": 2, "layers": "gradient", "count": 1},
                "cooldown_steps": 2,
                "rearm_steps": 3,
                "max_events": 3,
            },
        ],
    },
    "decoding": {
        "engine_update_freq": 3,
        "fit": {
            "prompts": 4,
            "prompt_tokens": 6,
            "new_tokens": 5,
            "search": {"type": "cma", "population": 4},
        },
    },
    "evaluation": {
        "every_steps": 2,
        "max_bytes": 700,
        "slices": [{"type": "length", "name": "long", "at_least": 8}],
    },
    "checkpoint": {"every_steps": 3, "named_every_steps": 5, "keep": 2},
    "threads": 1,
}


def tree_of(start: str, optimizer: str, root: str) -> dict[str, Any]:
    """The settings of a run, native from scratch or from a stock checkpoint that learns instructions."""
    tree = {**TREE, "optimizer": {"type": optimizer}}
    if start == "native":
        return tree
    path = f"{root}/rows.jsonl"
    asked = {"type": "files", "path": path, "instruction_field": "q", "output_field": "a"}
    tree["data"] = {
        "tasks": [{"name": "asked", "source": asked}, TREE["data"]["tasks"][1]],
        "test_fraction": 0.1,
    }
    tree["model"] = {"type": "pretrained", "path": f"{root}/model"}
    tree["training"] = {**TREE["training"], "gradient_checkpointing": True}
    even = [{**rule, "then": {**rule["then"]}} for rule in TREE["growth"]["rules"]]
    for key in ("layers", "count"):
        even[-1]["then"].pop(key)
    tree["growth"] = {**TREE["growth"], "rules": even}
    tree["decoding"] = {"engine_update_freq": 3, "fit": {**TREE["decoding"]["fit"], "by": "gradient"}}
    return tree


def live(name: str, root: str, start: str, optimizer: str, death: tuple[str, int] | None) -> None:
    """One life: start or resume the run, and die where `death` says, the n-th time it comes by."""
    os.environ["CAMBIA_RUNS"], os.environ["CAMBIA_CACHE"] = root, f"{Path(root).parent}/cache"
    from cambia import files
    from cambia.experiment import train
    from cambia.experiment.tree import experiment_from
    from cambia.rundir import RunWriter
    from cambia.training.journal import Journal
    from cambia.training.scoring import Scorer
    from cambia.training.trainer import Trainer

    places = {
        "after a step": (Trainer, "_step"),
        "after a log row": (Journal, "stepped"),
        "after growth": (RunWriter, "append_json"),
        "writing a checkpoint": (files, "_seal"),
        "after a checkpoint": (Trainer, "save"),
        "after a score": (Scorer, "task"),
    }
    if death and death[0] in places:
        die_after(*places[death[0]], death[1])
    elif death and death[0] == "between the renames":
        die_after(files.os, "rename", death[1])
    resume = (Path(root) / name / "config.json").exists()
    tree = tree_of(start, optimizer, root)
    train(experiment_from(tree, source="test", flags={}), name=name, resume=resume)


def die_after(owner: object, attribute: str, times: int) -> None:
    original = getattr(owner, attribute)
    left = [times]

    def dying(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, dying)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Started, and the data prepared, by a first run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cambia.experiment", "cambia.data", "transformers", "torch.profiler"])
    be_born(context, "warm", tmp_path_factory.mktemp("warm"), ("native", "adamw"), None).join()
    return context


def be_born(server, name: str, root: Path, kind: tuple[str, str], death: tuple[str, int] | None):
    process = server.Process(target=live, args=(name, str(root), *kind, death))
    process.start()
    return process


def same_tensors(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def check_equal(reference: Path, killed: Path) -> None:
    for log in ("metrics.csv", "eval.csv", "growth.jsonl", "decoding.jsonl", "promises.jsonl"):
        assert (killed / log).read_bytes() == (reference / log).read_bytes(), log
    folders = sorted(p.name for p in reference.iterdir() if p.is_dir())
    assert sorted(p.name for p in killed.iterdir() if p.is_dir()) == folders
    assert {"latest", "best", "ckpt_task0", "ckpt_task1", "ckpt_step10", "ckpt_step15"} <= set(folders)
    for stage in ("probes/stage0.safetensors", "probes/stage1.safetensors"):
        assert same_tensors(reference / stage, killed / stage)
    for folder in set(folders) - {"probes"}:
        assert same_tensors(reference / folder / "model.safetensors", killed / folder / "model.safetensors")
        assert (reference / folder / "inference_params.json").read_bytes() == (
            killed / folder / "inference_params.json"
        ).read_bytes()
        assert same_tensors(reference / folder / "state.safetensors", killed / folder / "state.safetensors")
        one, other = (json.loads((run / folder / "state.json").read_text()) for run in (reference, killed))
        for state in (one, other):
            del state["log_lengths"]["timing.csv"]
        assert one == other


DEATHS = [
    ("after a score", 2),  # before the first checkpoint
    ("after a step", 2),
    ("after growth", 1),
    ("writing a checkpoint", 2),
    ("after a log row", 3),
    ("between the renames", 3),
    ("after a checkpoint", 2),
    ("after growth", 1),
    ("between the renames", 4),
    ("writing a checkpoint", 4),
]


@pytest.mark.parametrize(
    ("kind", "start", "optimizer", "deaths"),
    [
        ("chosen", "native", "muon", DEATHS[:5]),
        ("chosen", "gpt2", "adamw", DEATHS[5:]),
        pytest.param("chosen", "native", "adamw", DEATHS, marks=pytest.mark.slow),
        pytest.param("chosen", "native", "sgd", DEATHS, marks=pytest.mark.slow),
        pytest.param("random", "native", "adamw", DEATHS, marks=pytest.mark.slow),
        pytest.param("chosen", "qwen3", "muon", DEATHS, marks=pytest.mark.slow),
    ],
    ids=["muon", "gpt2", "adamw", "sgd", "random", "qwen3"],
)
def test_a_killed_run_equals_the_uninterrupted_one(server, tmp_path, kind, start, optimizer, deaths):
    if start != "native":
        dropout = {"resid_pdrop": 0.1, "attn_pdrop": 0.1} if start == "gpt2" else {}
        checkpoint(tmp_path / "model", start, **dropout)
        rows = [{"q": f"{n}+1", "a": f"is {n + 1}!"} for n in range(400)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = (start, optimizer)
    began = time.monotonic()
    be_born(server, "reference", tmp_path, one, None).join()
    whole = time.monotonic() - began
    assert json.loads((tmp_path / "reference/summary.json").read_text())["status"] == "finished"

    chance = random.Random(5)
    kills = 0
    for death in deaths:
        process = be_born(server, "killed", tmp_path, one, death if kind == "chosen" else None)
        if kind == "random":
            time.sleep(chance.uniform(0.05, 0.5) * whole)
            process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= (len(deaths) - 2 if kind == "chosen" else 2), "most lives must have been cut short"
    be_born(server, "killed", tmp_path, one, None).join()
    check_equal(tmp_path / "reference", tmp_path / "killed")
