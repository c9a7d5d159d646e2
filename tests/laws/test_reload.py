"""Law 4: a grown model that is saved and loaded again says the same, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cambia.growth import AddLayers, Operator, WidenFFN, grow
from cambia.models.architectures import ARCHITECTURES, layer_ids
from tests.conftest import tiny
from tests.laws.examples import EVERY, FAMILIES, logits, once, parameters, possible, tokens
from tests.laws.fresh import check_read, write


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.disable_progress_bar()


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


# What new weights hold makes no difference to how they are read.
@pytest.mark.parametrize(("family", "operator"), parameters(once(EVERY, "initial", "preserve")))
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
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_goes_on_after_reloading_as_without(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    grow(model, AddLayers(add=1, where="interpose"))
    again = reloaded(model, tmp_path)
    for one in (model, again):
        grow(one, AddLayers(add=1, where="append", initial="random"), WidenFFN(add=3))
    assert layer_ids(again.config) == layer_ids(model.config) == [0, 1, 2, 3]
    assert torch.equal(logits(again), logits(model))


def grown_everywhere(family: str) -> list[tuple[str, PreTrainedModel]]:
    """A model of three layers grown by every operator that is legal, by all of them, and unevenly."""
    kinds = once(possible(family, EVERY))
    growths = {type(operator).__name__: [operator] for operator in kinds} | {"all": kinds}
    if ARCHITECTURES[family].uneven:
        growths["uneven"] = [WidenFFN(layers=[1], add=5), AddLayers(add=2), WidenFFN(factor=1.5)]
    models = []
    for name, operators in growths.items():
        model = tiny(family, num_hidden_layers=3)
        grow(model, *operators)
        models.append((name, model))
    return models


def test_a_fresh_process_reads_the_same(tmp_path: Path) -> None:
    """Stock models with stock classes, where the library was never imported; native ones with it."""
    expected = {}
    for family in FAMILIES:
        for name, model in grown_everywhere(family):
            folder, said = write(model, tmp_path, f"{family} {name}", tokens(model))
            expected[folder] = said
            written = json.loads((folder / "config.json").read_text())
            assert written.get("layer_ids", [0, 1, 2]) == layer_ids(model.config)
            assert "auto_map" not in written
    assert {folder.parent.name for folder in expected} == {"stock", "native"}
    check_read(tmp_path, expected)
