"""Checkpoints: whatever went in comes out, bit by bit, or one line says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia import files
from cambia.errors import CheckpointError
from cambia.growth import AddLayers, WidenFFN, grow
from cambia.models.saved import STATE_JSON, load_model
from cambia.training.checkpoint import (
    STATE_TENSORS,
    load_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, logits, loss_of


def round_trip(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    save_checkpoint(folder / "latest", model=tiny("cambia"), state=state)
    return load_state(folder / "latest")


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return repr(one) == repr(two)


# ---- state ---------------------------------------------------------------------------------------


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state: dict[str, Any] = {
        "nothing": None,
        "yes": True,
        "count": 3,
        "huge": 2**130 + 1,
        "negative": -(2**70),
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "text": "Grün, 'quoted'\n/slash",
        "empty": {"list": [], "dict": {}, "text": ""},
        "nested": [{"deep": [torch.ones(2), {"er": torch.zeros(1)}]}, 4],
        "whole": whole,
        "column": whole[:, 1],
        "transposed": whole.T,
        "same again": whole,
        "bf16": torch.randn(5).to(torch.bfloat16),
        "f16": torch.randn(5).half(),
        "f64": torch.randn(5, dtype=torch.float64),
        "ints": torch.tensor([2**62, -1]),
        "bits": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "no entries": torch.empty(0, 3),
        "random": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)).data,
    }
    assert same(round_trip(tmp_path, state), state)


def test_a_state_without_tensors_is_a_state(tmp_path: Path) -> None:
    assert round_trip(tmp_path, {"step": 3}) == {"step": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_broke_down_does_not_break_the_checkpoint(tmp_path: Path, value: float) -> None:
    """A validation loss may become infinite in a run that is told to skip such steps."""
    state = {"values": {"validation_loss": {"value": value, "step": 3}}}
    assert same(round_trip(tmp_path, state), state)


def test_names_with_slashes_do_not_collide(tmp_path: Path) -> None:
    """A slice may be called "python/tests", and another one "tests" may lie inside "python"."""
    state = {"python/tests": torch.zeros(1), "python": {"tests": torch.ones(2)}}
    assert same(round_trip(tmp_path, state), state)


KEYS = st.text("abc_.", min_size=1, max_size=3)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
    | st.builds(torch.full, st.lists(st.integers(0, 2), max_size=2).map(tuple), st.integers(-3, 3))
)


@given(
    state=st.dictionaries(
        KEYS, st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=8)
    )
)
def test_any_nesting_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    assert same(round_trip(tmp_path_factory.mktemp("state"), state), state)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.randn(7)
    loaded = round_trip(tmp_path, {"random": random_state()})
    expected = torch.randn(9)
    torch.randn(100)
    set_random_state(loaded["random"])
    assert torch.equal(torch.randn(9), expected)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_logits_and_gradients_come_back_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Gradients too, or a resumed run would not be the uninterrupted one.

    Weights that lie in the file's memory begin where the file put them, and matrix kernels round
    otherwise when that is no multiple of 64 bytes.
    """
    odd: list[dict[str, Any]] = [{"intermediate_size": 33, "hidden_size": 40}, {"tie_word_embeddings": True}]
    for i, sizes in enumerate(odd if dtype == torch.float32 else odd[:1]):
        model = tiny(family, dtype, **sizes)
        grow(model, AddLayers(add=1), WidenFFN(add=3))
        save_checkpoint(tmp_path / f"{i}", model=model, state={})
        again = load_model(tmp_path / f"{i}")
        assert type(again) is type(model)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(model))
        for one in (model, again):
            loss_of(one).backward()
        for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad), (sizes, name)


def test_a_model_can_be_opened_in_another_precision(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "latest", model=tiny("llama"), state={})
    assert load_model(tmp_path / "latest", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_plain_hugging_face_folder_opens_without_a_manifest(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "latest", model=tiny("cambia"), state={"x": torch.ones(1)})
    names = {path.name for path in (tmp_path / "latest").iterdir()}
    assert {"config.json", "model.safetensors", STATE_JSON, STATE_TENSORS, files.MANIFEST} <= names
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "latest", model=tiny("cambia"), state={"x": torch.ones(300)})
    return tmp_path / "latest"


def one_line(caught: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["model.safetensors", STATE_TENSORS, STATE_JSON, "config.json"])
@pytest.mark.parametrize("opener", [load_state, load_model])
def test_an_altered_byte_is_noticed_before_anything_is_used(latest: Path, name: str, opener: Any) -> None:
    content = bytearray((latest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (latest / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs") as caught:
        opener(latest)
    assert name in one_line(caught)


def test_folders_that_hold_no_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file: convert it"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    with pytest.raises(CheckpointError, match="where you trust its source"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="cannot be opened as a model") as caught:
        load_model(tmp_path)
    one_line(caught)


def test_a_model_file_that_was_cut_short_is_one_line(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be opened as a model") as caught:
        load_model(tmp_path)
    one_line(caught)


def test_a_save_that_fails_leaves_the_old_checkpoint(latest: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(latest, model=tiny("cambia"), state={"unknown": object()})
    assert torch.equal(load_state(latest)["x"], torch.ones(300))
    assert [path.name for path in latest.parent.iterdir()] == ["latest"]


def test_the_state_file_is_readable_by_people(latest: Path) -> None:
    assert json.loads((latest / STATE_JSON).read_text()) == {"x": {"__tensor__": "/x"}}
