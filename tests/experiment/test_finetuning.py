"""Options of training on stock checkpoints of every family: what they change, and that growth keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cambia.data.sources import Splits, key_of
from cambia.experiment.build import assemble, open_stream, train
from cambia.experiment.tree import experiment_from
from cambia.growth.barrier import TOLERANCE
from cambia.models.architectures import ARCHITECTURES, architecture_of
from cambia.rundir import RunReader, RunWriter
from cambia.training import Trainer
from tests.conftest import checkpoint
from tests.experiment.test_starts import TREE

FAMILIES = sorted(ARCHITECTURES)
ASKED = {
    "data.tasks.0.source": {
        "type": "files",
        "path": "rows.jsonl",
        "instruction_field": "q",
        "output_field": "a",
    },
    "data.test_fraction": 0.1,
}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Any:
    """Train TREE on a checkpoint of a family, with dotted overrides, in a fresh run directory."""
    monkeypatch.setenv("CAMBIA_CACHE", str(tmp_path_factory.getbasetemp() / "starts-cache"))
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def go(family: str, name: str, **flags: Any) -> tuple[RunReader, Trainer]:
        folder = tmp_path / family
        if not folder.exists():
            checkpoint(folder, family)
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        dotted |= ASKED if dotted.pop("asked", False) else {}
        experiment = experiment_from(TREE, source="test", flags={"model.path": str(folder), **dotted})
        run = RunWriter(tmp_path / name)
        parts = assemble(experiment, run)
        run.write_config({}, "")
        assert parts.trainer.train(parts.stream, run=run, stage_steps=parts.stage_steps)
        run.close()
        return RunReader(tmp_path / name), parts.trainer

    return go


def column(reader: RunReader, name: str) -> list[float]:
    return [row[name] for row in reader.rows("metrics.csv")]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_run_in_every_layer(trained: Any, family: str) -> None:
    plain, _ = trained(family, "plain")
    calls: list[nn.Module] = []
    saving, trainer = trained(family, "saving", training__gradient_checkpointing=True)
    assert column(saving, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    assert column(saving, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-4)

    # Every layer, also the one that growth brought in, is computed again in the backward pass.
    layers = trainer.model.get_submodule(architecture_of(trainer.model.config).layers)
    assert len(layers) == 3
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    ids = torch.randint(0, 250, (2, 9))
    loss = trainer.model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6 and len(set(calls)) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_train_and_grow(trained: Any, family: str) -> None:
    reader, trainer = trained(family, "half", model__dtype="bfloat16", optimizer__learning_rate=0.03)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    state = trainer.optimizer.state
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.bfloat16}
    errors = [event["logit_error"] for event in reader.growth()]
    assert len(errors) == 2 and max(errors) <= 3e-2
    losses = column(reader, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_arithmetic_keeps_weights_and_growth_exact(trained: Any, family: str) -> None:
    plain, _ = trained(family, "plain")
    coarse, trainer = trained(family, "coarse", training__precision="bfloat16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in trainer.optimizer.state.values()} == {torch.float32}
    assert all(event["logit_error"] <= TOLERANCE[torch.float32] for event in coarse.growth())
    assert column(coarse, "loss") == pytest.approx(column(plain, "loss"), rel=5e-2)
    assert column(coarse, "loss") != column(plain, "loss")


def test_bits_per_byte_are_those_of_each_answer_behind_its_instruction(trained: Any, tmp_path: Path) -> None:
    rows = [{"q": "why " * 4 + str(n), "a": f"because of {n}"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"training__steps": 2, "evaluation__max_bytes": 10_000, "growth__enabled": False}
    reader, trainer = trained("gpt2", "alone", asked=True, training__sequence_length=40, **flags)
    score = reader.rows("eval.csv")[-1]
    held = [row for row in rows if Splits(0.05, 0.1).of(key_of(row["q"] + "\n")) == "test"]
    nats = 0.0
    for row in held:
        head, tail = (row["q"] + "\n").encode(), row["a"].encode()
        logits = trainer.model.eval()(input_ids=torch.tensor([[256, *head, *tail]])).logits[0, len(head) :]
        targets = torch.tensor([*tail, 256])
        nats += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
    size = sum(len(row["a"].encode()) for row in held)
    assert (score["bytes"], score["tokens"]) == (size, size + len(held))
    assert score["nll_per_byte"] == pytest.approx(nats / size, rel=1e-5)


def test_examples_longer_than_a_sequence_are_counted(trained: Any, tmp_path: Path) -> None:
    rows = [{"q": "x" * (n % 60), "a": f"answer {n}"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = checkpoint(tmp_path / "long")
    tree = experiment_from(TREE, source="test", flags={"model.path": str(folder), **ASKED})
    _, stream = open_stream(tree)
    batches = stream.batches[0]
    assert 0 < batches.packed.cut < batches.token_file.num_documents
    train(tree, name="counted")
    summary = RunReader("counted").summary() or {}
    assert summary["data"][0]["longer_than_a_sequence"] == batches.packed.cut
    assert "examples are longer than 32 tokens" in summary["notes"][0]
