"""Law 4: a grown model that is saved and loaded again says the same, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cambia.growth import AddLayers, Operator, WidenFFN, grow
from cambia.models.architectures import ARCHITECTURES, layer_ids
from tests.conftest import tiny
from tests.laws.examples import EVERY, FAMILIES, logits, parameters, tokens


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.disable_progress_bar()


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("family", "operator"), parameters(EVERY))
def test_a_grown_model_reloads_bit_for_bit(family: str, operator: Operator, tmp_path: Path) -> None:
    model = tiny(family, attention_bias=True)
    grow(model, operator)
    again = reloaded(model, tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert layer_ids(again.config) == layer_ids(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_and_bfloat16_reload_too(family: str, tmp_path: Path) -> None:
    model = tiny(family, torch.bfloat16, tie_word_embeddings=True)
    grow(model, AddLayers(add=2), WidenFFN(add=3))
    again = reloaded(model, tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_goes_on_after_reloading_as_without(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    grow(model, AddLayers(add=1, where="interpose"))
    again = reloaded(model, tmp_path)
    for one in (model, again):
        grow(one, AddLayers(add=1, where="append", initial="random"), WidenFFN(add=3))
    assert layer_ids(again.config) == layer_ids(model.config) == [0, 1, 2, 3]
    assert torch.equal(logits(again), logits(model))


READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import cambia.models.causal_lm
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        said = model(input_ids=load_file(folder + "/batch.st")["batch"], use_cache=False).logits
    save_file({"logits": said}, folder + "/said.st")
"""


def test_a_fresh_process_reads_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expected: dict[Path, Any] = {}
    for family in FAMILIES:
        model = tiny(family, num_hidden_layers=3)
        if ARCHITECTURES[family].uneven:
            grow(model, WidenFFN(layers=[1], add=5))
        grow(model, AddLayers(add=2), WidenFFN(factor=1.5))
        model.save_pretrained(tmp_path / family)
        save_file({"batch": tokens(model)}, tmp_path / family / "batch.st")
        expected[tmp_path / family] = logits(model)
        assert json.loads((tmp_path / family / "config.json").read_text())["layer_ids"] == layer_ids(
            model.config
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", READER, *map(str, expected)], env=environment, check=True, timeout=120
    )
    for folder, said in expected.items():
        assert torch.equal(load_file(folder / "said.st")["logits"], said)
