"""`cambia grow`: what it prints, what it leaves, and that every bad input is one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cambia.growth import AddLayers, WidenFFN, grow
from cambia.models.saved import load_model
from tests.conftest import Call, tiny


@pytest.fixture
def cambia(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command_line: Call
) -> Call:
    """Call the command in a folder with a checkpoint `old`; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("old")
    capsys.readouterr()
    return command_line


def test_operators_in_order_with_their_own_settings(cambia: Call, tmp_path: Path) -> None:
    words = "--op widen_ffn --factor 1.5 --op=add_layers --add=2 --where append --seed 3 --out new"
    code, out, _ = cambia("grow", "old", *words.split())
    assert code == 0
    live = load_model(tmp_path / "old")
    event = grow(live, WidenFFN(factor=1.5), AddLayers(add=2, where="append"), seed=3)
    for text in (f"{event.parameters_after:,}", "widen_ffn x1.5", "add_layers +2 where=append", "stock"):
        assert text in out
    assert "logits differ by" in out
    grown = load_model(tmp_path / "new").state_dict()
    assert grown.keys() == live.state_dict().keys()
    assert all(torch.equal(grown[name], tensor) for name, tensor in live.state_dict().items())


def test_a_dry_run_touches_nothing(cambia: Call, tmp_path: Path) -> None:
    code, out, _ = cambia("grow", "old", "--op", "widen_hidden", "--factor", "2", "--dry-run")
    assert code == 0
    for text in ("hidden_size", "24", "48", "FLOPs per token", "kB", "Nothing was written"):
        assert text in out
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_unchecked_and_in_several_files(cambia: Call, tmp_path: Path) -> None:
    words = ["--op", "widen_ffn", "--add", "8", "--out", "new", "--check", "no", "--shard-gigabytes", "1e-5"]
    code, out, _ = cambia("grow", "old", *words)
    assert code == 0 and "not compared" in out
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_a_runs_name_will_do(cambia: Call, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "old").rename(tmp_path / "runs/mine")
    code, out, _ = cambia("grow", "mine", "--op", "widen_ffn", "--add", "8", "--out", "new")
    assert code == 0 and "new" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "name the checkpoint first"),
        ("--op widen_ffn --add 8 old --out new", "name the checkpoint first"),
        ("old --out new", "at least one operator with --op"),
        ("old --add 8 --op widen_ffn --out new", "'--add' stands before the first --op"),
        ("old --op widen_ffn --add 8", "give --out DIR"),
        ("old --op --add 8 --out new", "takes an operator's name: widen_ffn"),
        ("old --op widen_fn --add 8 --out new", "did you mean 'widen_ffn'"),
        ("old --op widen_ffn --ad 8 --out new", "did you mean 'add'"),
        ("old --op widen_ffn --growth_factor 2 --out new", "is called 'factor' here"),
        ("old --op widen_ffn --add many --out new", "--op widen_ffn --add:"),
        ("old --op widen_ffn --add 2 --to 90 --out new", "one of factor=, add= and to="),
        ("old --op widen_ffn --factor 0.5 --out new", "does not grow anything"),
        ("old --op widen_ffn --to 10 --out new", "not larger than the present size 20"),
        ("old --op widen_ffn --add 8 extra --out new", "'extra' stands alone"),
        ("old --op widen_ffn --layers [0] --add 8 --out new", "one FFN width for all layers"),
        ("old --op widen_ffn --add 8 --out new --check perhaps", "auto"),
        ("old --op widen_ffn --add 8 --out new --shard-gigabytes 0", "expected a number above 0"),
        ("old --op widen_ffn --add 8 --out old", "old exists already"),
        ("old --op widen_ffn --add 8 --out old/new", "inside the checkpoint"),
        ("nothing --op widen_ffn --add 8 --out new", "there is no folder nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cambia: Call, tmp_path: Path, words: str, expected: str
) -> None:
    code, _, err = cambia("grow", *words.split())
    assert code == 2
    assert expected in err
    assert err.startswith("cambia: ") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
