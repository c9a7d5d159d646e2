"""Laws of continual-learning methods: each of the registry, by its contract.

Law 5, a run that is killed and resumed equals the uninterrupted one; law 6, what is sealed stays sealed, with
momentum, weight decay and clipping; law 7, what is promised to be answered is answered by the same bits; law
9, a reported loss holds no penalty. A method joins by standing in `CONTINUAL_METHODS`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cambia.config import resolve
from cambia.continual.methods import CONTINUAL_METHODS, Method
from cambia.experiment.build import train_in
from cambia.experiment.reopen import Reopened, reopen
from cambia.experiment.tree import Experiment, experiment_from
from cambia.models.hashing import sha256
from cambia.reporting.verify import verify_run
from cambia.rundir import RunReader
from cambia.training.audit import read_probes
from cambia.training.trainer import Trainer

NAMES = sorted(CONTINUAL_METHODS)
SETTINGS: dict[str, dict[str, Any]] = {
    "replay": {"fraction": 0.3, "capacity": 12, "drift": {"every_steps": 2, "rows": 2, "target": 0.001}},
    "derpp": {"fraction": 0.3, "capacity": 12, "beta": 0.5, "logits": 16},
    "agem": {"capacity": 12, "rows": 3},
    "ewc": {"strength": 50.0, "batches": 2, "decay": 0.9},
    "lora": {"rank": 3},
    "lora_per_task": {"rank": 3},
    "olora": {"rank": 3, "strength": 5.0},
    "masks": {"share": 0.4},
    "experts": {
        "shape": {"rank": 2},
        "detector": {"min_windows": 5, "cooldown_windows": 5, "group_windows": 5, "false_alarms": 0.5},
        "course": {"warmup_steps": 1, "consolidation_steps": 2, "held_rows": 2},
        "background_rows": 8,
        "keep_margin": 0.0,
    },
}
"""What differs from the defaults, so that everything that can go wrong happens in a few steps."""
MORE: dict[str, dict[str, Any]] = {
    "experts, first claim": {"type": "experts", **SETTINGS["experts"], "routing": "first_claim"},
    "experts, reopened": {
        "type": "experts",
        **SETTINGS["experts"],
        "course": {"consolidation_steps": 2, "measure_steps": 1, "maturity": {"window": 2, "slope": 1.0}},
        "reopen": "always",
        "collaborators": 1,
    },
    "replay, written": {"type": "replay", "text": "written", "capacity": 12, "fraction": 0.3},
    "replay, on top, within bytes": {"type": "replay", "budget_bytes": 900, "quota": True, "on_top": True},
    "masks by magnitude": {"type": "masks", "share": 0.4, "by": "magnitude"},
    "freeze from the start": {"type": "freeze", "after": 0},
    "osf, fixed": {"type": "osf", "keep": 0.5},
}
FORMS = {**{name: {"type": name, **SETTINGS.get(name, {})} for name in NAMES}, **MORE}
FAMILIES = {
    "native": {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
}


def experiment_of(method: list[dict[str, Any]]) -> Experiment:
    """Two short tasks, the first of which comes again."""
    tasks = [
        {"name": name, "source": {"type": "generated", "task": name, "size_bytes": 30_000}}
        for name in ("counting", "copy")
    ]
    tree = {
        "data": {
            "tasks": tasks,
            "stream": {"type": "sequence", "order": ["counting", "copy", "counting"]},
        },
        "model": FAMILIES["native"],
        "training": {"steps": 4, "batch_size": 5, "sequence_length": 24, "accumulation": 2, "clip_norm": 0.5},
        "optimizer": {"type": "adamw", "learning_rate": 0.02, "weight_decay": 0.2},
        "methods": method,
        "evaluation": {"every_steps": 3, "max_bytes": 150, "batch_size": 8},
        "checkpoint": {"every_steps": 3, "keep_tasks": False},
        "threads": 1,
    }
    if any(each["type"] == "experts" for each in method):
        tree["growth"] = {"rules": [{"when": {"type": "novelty"}, "then": {"type": "add_lora_expert"}}]}
    return experiment_from(tree, source="test", flags={})


class Killed(BaseException):
    """What no part of the library catches, as it could not catch a kill."""


def killed_at(experiment: Experiment, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer._step

    def dying(self, *given):
        if self.progress.step >= step:  # not every step trains
            raise Killed
        return whole(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_step", dying)
        train_in(folder, experiment)


def same(one: Path, other: Path) -> None:
    for name in ("metrics.csv", "eval.csv", "growth.jsonl", "stream.jsonl", "promises.jsonl"):
        files = [folder / name for folder in (one, other)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            assert files[0].read_bytes() == files[1].read_bytes(), name
    for name in ("latest/model.safetensors", "latest/state.safetensors", "probes/stage1.safetensors"):
        mine, theirs = (load_file(folder / name) for folder in (one, other))
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Each form's uninterrupted run, made once."""
    found: dict[str, Path] = {}

    def run_of(form: str) -> Path:
        if form not in found:
            folder = tmp_path_factory.mktemp("runs") / "whole"
            train_in(folder, experiment_of([FORMS[form]]))
            found[form] = folder
        return found[form]

    return run_of


RESUMED = [  # of forms that keep the same state as another, one is fast
    pytest.param(form, marks=[pytest.mark.slow] if form in MORE and form != "experts, reopened" else [])
    for form in FORMS
]


@pytest.mark.parametrize("form", RESUMED)
def test_law_5_resume_is_invisible(form, finished, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    # At the begin of a stage, after the checkpoint of the last one's end; amid one that comes again.
    for step in (4, 10):
        killed_at(experiment_of([FORMS[form]]), folder, step, monkeypatch)
    train_in(folder, experiment_of([FORMS[form]]))
    same(finished(form), folder)


@pytest.mark.parametrize("form", FORMS)
def test_law_6_what_is_promised_stays(form, finished):
    promises = RunReader(finished(form)).promises()
    assert len(promises) == 3
    for sooner, later in itertools.pairwise(promises):
        kept = {name: later["tensors"].get(name) for name in sooner["tensors"]}
        assert kept == sooner["tensors"], "a promise was broken or forgotten"
    contract = resolve(FORMS[form]["type"], CONTINUAL_METHODS, "method")().contract
    if contract.keeps_answers or contract.seals_weights:
        assert promises[-1]["tensors"], "a method that seals promises nothing"


@pytest.mark.parametrize("form", FORMS)
def test_law_7_kept_answers_are_the_same_bits(form, finished):
    folder = finished(form)
    run = RunReader(folder)
    opened = reopen(folder / "latest", run.config())
    if opened.method.contract.routes:
        check_sealed_answers(run, opened)
        return
    moved = []
    for path in run.probes()[1:]:  # the first task was learned anew later, as a new version
        for probe in read_probes(path):
            moved.append(not torch.equal(probe.again(opened.model, opened.method), probe.logits))
    assert len(moved) == 2
    # Nothing came after the last task; what came before it is kept, or else it has moved.
    assert not moved[1]
    assert opened.method.contract.keeps_answers == (not moved[0])


def check_sealed_answers(run: RunReader, opened: Reopened) -> None:
    """A Part keeps its answers from when it is sealed, whenever that is."""
    held = []
    for line, path in zip(run.promises(), run.probes(), strict=True):
        for probe in read_probes(path):
            if str(probe.task) in line["answerers"]:
                now = probe.by(line["answerers"][str(probe.task)], opened.model, opened.method)
                held.append(torch.equal(now, probe.logits))
    assert held and all(held)


@pytest.mark.parametrize("form", FORMS)
def test_an_audit_finds_every_promise_held(form, finished):
    audit = verify_run(finished(form))
    assert audit.held and not audit.notes


@pytest.mark.parametrize("form", FORMS)
def test_law_9_a_loss_holds_no_penalty(form, finished):
    rows = RunReader(finished(form)).rows("metrics.csv")
    method = {"ewc", "lwf", "olora", "derpp"}
    penalised = [row["penalty"] for row in rows if row["penalty"]]
    assert bool(penalised) == (FORMS[form]["type"] in method)
    # A step that only looks at what comes has none.
    assert all(row["loss"] < 6.5 for row in rows if row["loss"] is not None)


def test_promised_tensors_are_hashed_by_type_shape_and_bytes():
    ones = torch.ones(2, 3)
    others = [ones.double(), ones.view(3, 2), ones + 1e-7, torch.ones(2, 3, dtype=torch.bfloat16)]
    assert all(sha256(ones) != sha256(other) for other in others)
    assert sha256(ones) == sha256(torch.ones(3, 2).T)


def test_every_method_says_what_it_is():
    for name in NAMES:
        kind = resolve(name, CONTINUAL_METHODS, "method")
        assert issubclass(kind, Method)
        assert kind.__doc__
