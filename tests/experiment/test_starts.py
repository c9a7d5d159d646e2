"""What a run starts from: checkpoints of every family, and what is refused before any text is prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from cambia.data.tokenizers import HfTokenizer, ModelTokenizer
from cambia.errors import CambiaError, CheckpointError
from cambia.experiment.build import load, open_stream, train
from cambia.experiment.estimate import estimate
from cambia.experiment.starts import PretrainedModel
from cambia.experiment.tree import Experiment, experiment_from, plain_tree, read_experiment
from cambia.models.architectures import ARCHITECTURES
from cambia.models.bodies import count_parameters
from cambia.rundir import RunReader
from tests.conftest import checkpoint, tiny

TREE: dict[str, Any] = {
    "data": {
        "tasks": [
            {"name": "counting", "source": {"type": "generated", "task": "counting", "limit_bytes": 60_000}}
        ]
    },
    "model": {"type": "pretrained"},
    "optimizer": {"learning_rate": 0.01},
    "training": {"steps": 6, "batch_size": 4, "sequence_length": 32},
    "evaluation": {"every_steps": 3, "max_bytes": 500},
    "growth": {
        "rewarm_steps": 2,
        "rules": [
            {"when": {"type": "schedule", "at_steps": [2]}, "then": {"type": "widen_ffn", "add": 8}},
            {"when": {"type": "schedule", "at_steps": [4]}, "then": {"type": "add_layers", "add": 1}},
        ],
    },
}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CAMBIA_CACHE", str(tmp_path_factory.getbasetemp() / "starts-cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


def experiment(folder: Path | str, **flags: Any) -> Experiment:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return experiment_from(TREE, source="test", flags={"model.path": str(folder), **dotted})


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_checkpoint_of_every_family_trains_grows_and_comes_back(family: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", family)
    run = train(experiment(folder), name=family)
    reader = RunReader(run)
    assert [event["exactness"] for event in reader.growth()] == ["tolerance", "tolerance"]
    assert all(event["logit_error"] <= 1e-5 for event in reader.growth())
    losses = [row["loss"] for row in reader.rows("metrics.csv")]
    assert losses[-1] < losses[0]
    summary = reader.summary() or {}
    first = AutoModelForCausalLM.from_pretrained(folder)
    assert summary["parameters_start"] == count_parameters(first) < summary["parameters_end"]
    assert summary["optimizer_covers_all_parameters"]
    # Row 0 of the matrix is the checkpoint as it came.
    reference = RunReader(train(experiment(folder, growth__enabled=False), name="again"))
    assert reader.rows("eval.csv")[0] == reference.rows("eval.csv")[0]
    grown = AutoModelForCausalLM.from_pretrained(run / "latest")
    assert type(grown) is type(first) and count_parameters(grown) == summary["parameters_end"]
    assert grown.config.num_hidden_layers == 3


def test_the_model_s_own_tokenizer_is_taken_and_written_down(llama: Path) -> None:
    one = experiment(llama)
    assert one.tokenizer == ModelTokenizer()
    tree = plain_tree(one)
    assert tree["tokenizer"] == {"type": "model", "eos_token": None}
    assert experiment_from(tree, source="test", flags={}) == one
    tokenizer, _ = open_stream(one)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_recipes_take_a_checkpoint(llama: Path) -> None:
    flags = {"model.type": "pretrained", "model.path": str(llama), "training.sequence_length": 32}
    for recipe in ("first_growth", "own_text", "instructions", "smoke"):
        assert read_experiment(recipe, flags).tokenizer == ModelTokenizer()
    assert read_experiment("finetune").tokenizer == ModelTokenizer(), "it is shown before there is a model"


def test_a_run_goes_on_from_another_run(llama: Path) -> None:
    train(experiment(llama), name="first")
    second = RunReader(train(experiment("first"), name="second"))
    assert (second.summary() or {})["parameters_end"] == count_parameters(load("second"))
    before, after = (RunReader(name).rows("eval.csv") for name in ("first", "second"))
    assert after[0]["bits_per_byte"] == before[-2]["bits_per_byte"]
    assert load("second").config.num_hidden_layers == 4


def test_a_run_goes_on_when_its_checkpoint_has_moved(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    train(experiment(folder, training__steps=1), name="moved")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CambiaError, match="is no folder here, nor a run's name"):
        train("ignored", name="moved", resume=True)
    train("ignored", name="moved", resume=True, overrides={"model.path": str(tmp_path / "elsewhere")})


def test_weights_are_in_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "half", dtype=torch.float16)
    for asked, got in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        start = PretrainedModel(path=str(folder), dtype=asked)
        tokenizer, _ = open_stream(experiment(folder))
        assert start.build(tokenizer, sequence_length=8).dtype == got


def test_an_estimate_is_of_the_checkpoint(llama: Path) -> None:
    found = estimate(experiment(llama))
    first = count_parameters(AutoModelForCausalLM.from_pretrained(llama))
    assert found.phases[0].parameters == first < found.phases[1].parameters < found.phases[2].parameters
    assert found.seconds > 0
    half = estimate(experiment(llama, model__dtype="bfloat16"))
    assert half.memory_bytes == found.memory_bytes - 8 * found.phases[-1].parameters


def test_what_ends_a_document_ends_generation(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", eos_token_id=[3, 4])
    plain = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**plain, "temperature": 0.6}))
    run = train(experiment(folder, training__steps=1), name="ends")
    saved = json.loads((run / "latest/generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["temperature"], saved["do_sample"]) == ([3, 4, 256], 0.6, True)


# ---- refusals ------------------------------------------------------------------------------------


def altered(llama: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def said(folder: Path | str, **flags: Any) -> str:
    with pytest.raises(CambiaError) as stop:
        open_stream(experiment(folder, **flags))
    return str(stop.value)


def test_folders_without_a_usable_model_are_refused(llama: Path, tmp_path: Path) -> None:
    assert "is no folder here, nor a run's name" in said("nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in said(empty)
    (empty / "adapter_config.json").write_text("{}")
    assert "merge it into its model first" in said(empty)
    pickles = altered(llama, tmp_path / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    assert re_said(said(pickles), "holds pytorch_model.bin", "save_pretrained")
    (pickles / "pytorch_model.bin").unlink()
    assert "the weights are missing" in said(pickles)


def re_said(message: str, *parts: str) -> bool:
    return all(part in message for part in parts) and "\n" not in message


def test_models_that_cannot_grow_or_train_are_refused(llama: Path, tmp_path: Path) -> None:
    assert "type 'bert'; those that can grow are cambia, llama" in said(
        altered(llama, tmp_path / "bert", model_type="bert")
    )
    quantised = altered(llama, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised (gptq)" in said(quantised)
    with pytest.raises(CambiaError, match=r"--training.sequence_length: 65 is longer than the 64 positions"):
        experiment(llama, training__sequence_length=65)
    with pytest.raises(CambiaError, match="needs `path`"):
        experiment("")


def test_tokenizers_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small", vocab_size=250, bos_token_id=1, eos_token_id=1, pad_token_id=None)
    assert re_said(said(small), "has 257 ids", "250 rows of embedding", "AddTokens(to=257)")
    with pytest.raises(CambiaError, match="--tokenizer: a model from scratch has no tokenizer of its own"):
        read_experiment("smoke", {"tokenizer.type": "model"})
    for kind in ("bytes", "bpe"):
        with pytest.raises(CambiaError, match=r"--tokenizer: .* is for models from scratch"):
            experiment(llama, tokenizer__type=kind)
    assert experiment(small, tokenizer__type="hf", tokenizer__path=str(llama)).tokenizer == HfTokenizer(
        path=str(llama)
    )


def test_a_model_without_its_head_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    LlamaForSequenceClassification(tiny().config).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        load(folder)
