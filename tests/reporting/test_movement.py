"""How far weights moved: against norms computed by hand, at any scale, and where tensors come and go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from cambia.reporting.movement import FURTHEST, Movement, movements


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint with these weights in two files, and with a state that is no weight."""
    folder.mkdir()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    save_file({"/optimizer": torch.ones(3)}, folder / "state.safetensors")
    return folder


def moved(place: Path, old: dict[str, Tensor], new: dict[str, Tensor]) -> Movement:
    (found,) = movements([saved(place / "old", old), saved(place / "new", new)])
    return found


def test_by_hand(tmp_path: Path) -> None:
    old = {
        "model.embed_tokens.weight": torch.full((2, 2), 3.0),
        "model.layers.0.mlp.weight": torch.tensor([3.0, 4.0]),
        "model.layers.0.norm.weight": torch.ones(1),
        "model.layers.10.norm.weight": torch.zeros(2),
        "bias": torch.ones(1),
    }
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["model.layers.0.mlp.weight"] = torch.tensor([3.0, 4.5])
    new["model.layers.10.norm.weight"] += 2.0
    found = moved(tmp_path, old, new)
    assert (found.before, found.after, found.reshaped) == ("old", "new", 0)
    told = {each.name: each.relative for each in found.groups}
    assert told == {
        "model.layers.10": 1.0,  # from nothing
        "model.layers.0": pytest.approx(0.5 / math.sqrt(9 + 4.5**2 + 1)),
        "model.embed_tokens": 0.0,
        "bias": 0.0,
    }
    assert [each.name for each in found.tensors][:2] == [
        "model.layers.10.norm.weight",
        "model.layers.0.mlp.weight",
    ]
    assert found.relative == pytest.approx(math.sqrt((0.25 + 8) / (36 + 9 + 4.5**2 + 1 + 8 + 1)))


def test_what_grew_is_left_out(tmp_path: Path) -> None:
    old = {f"layers.{i}.weight": torch.ones(2, 2) for i in range(9)}
    new = {**old, "layers.0.weight": torch.ones(3, 2), "layers.9.weight": torch.ones(2, 2)}
    found = moved(tmp_path, old, new)
    assert found.reshaped == 2 and found.relative == 0.0
    assert len(found.tensors) == len(found.groups) == FURTHEST


def test_a_checkpoint_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    one, other = (saved(tmp_path / name, {"a.weight": torch.ones(2)}) for name in ("one", "other"))
    assert [(m.before, m.after) for m in movements([one, tmp_path / "gone", other])] == [("one", "other")]
    assert movements([one]) == movements([]) == ()


@given(
    values=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=6),
    scale=st.sampled_from([2.0**-20, 0.5, 4.0]),
)
def test_it_is_relative_and_finite(
    values: list[tuple[float, float]], scale: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    plain, scaled = (
        moved(tmp_path_factory.mktemp("pair"), {"a.b": old * by}, {"a.b": new * by}).relative
        for by in (1.0, scale)
    )
    assert 0 <= plain <= 2 + 1e-9
    assert (plain == 0) == torch.equal(old, new) or float((new - old).abs().max()) < 1e-150
    assert scaled == pytest.approx(plain, rel=1e-9)
