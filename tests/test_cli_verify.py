"""`cambia verify`: what it prints, its exit code, and that every bad input is one line and exit code 2."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from cambia.experiment.build import train_in
from cambia.sweepdir import SweepWriter
from tests.conftest import Call, checkpoint
from tests.markdown import ROOT
from tests.reporting.runs import FORMS, experiment_of, rewrite

SEALED = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, made once."""
    root = tmp_path_factory.mktemp("runs")
    for form in ("full_per_task", "naive"):
        train_in(root / form, experiment_of(FORMS[form], cache=tmp_path_factory.mktemp("cache")))
    return root


@pytest.fixture
def cambia(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command_line: Call,
) -> Call:
    """Call the command where there are runs of one's own; returns (exit code, stdout, stderr)."""
    shutil.copytree(whole, tmp_path / "runs")
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return command_line


def last_line(out: str) -> str:
    return out.rstrip("\n").rpartition("\n")[2]


def test_promises_that_hold(cambia: Call) -> None:
    code, out, err = cambia("verify", "full_per_task")
    assert (code, err) == (0, "")
    assert out.startswith("full_per_task  finished, full_per_task, 3 stages ended\n")
    assert last_line(out) == "every promise held (60 tensors, 2 answers)"
    rows = [line.split() for line in out.splitlines()]
    assert ["ckpt_task1", "6", "40", "0"] in rows
    kept = next(row for row in rows if row[:3] == ["2", "copy", "copy"])
    assert kept[3:5] == ["kept", "none"] and kept[5] == kept[6] and kept[7] == "+0.0000"
    assert "How far the weights moved" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_run_that_promised_nothing_says_what_moved(cambia: Call) -> None:
    code, out, _ = cambia("verify", "naive")
    assert code == 0 and last_line(out) == "nothing was promised, so nothing was broken"
    assert re.search(r"2 copy +copy +\d[\d.e-]* +\d\.\d{4} +\d\.\d{4} +[+-]\d\.\d{4}", out)
    assert re.search(r"ckpt_task0 → ckpt_task1 +model\.\w+[. ]", out)
    assert out.count("ckpt_task1 → ckpt_task2") >= 1
    tensors = out.partition("The tensors that moved furthest")[2]
    moved = [float(row[-1]) for row in map(str.split, tensors.splitlines()) if "→" in row]
    assert len(moved) == 5 and moved == sorted(moved, reverse=True)
    assert "Promised tensors" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_broken_promise_is_named_and_measured(
    cambia: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # where no name is folded

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"/method/records/sealed/1/{SEALED}"][0, 0] += 0.25

    rewrite(tmp_path / "runs/full_per_task/latest/state.safetensors", change)
    code, out, err = cambia("verify", "full_per_task")
    assert (code, err) == (1, "") and last_line(out) == "2 promises were broken"
    assert f"task 1: {SEALED} 2 copy latest 0.25" in " ".join(out.split())
    assert re.search(r"2 copy +copy +BROKEN", out)


def test_a_damaged_checkpoint_is_a_failure_and_no_traceback(cambia: Call, tmp_path: Path) -> None:
    for form, at in (("naive", "ckpt_task1"), ("full_per_task", "latest")):
        weights = tmp_path / "runs" / form / at / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        code, out, err = cambia("verify", form)
        assert (code, err) == (1, "") and last_line(out) == "1 checkpoint is damaged"
        assert f"{at}/model.safetensors is not what was written" in out


def test_what_cannot_be_checked(cambia: Call, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs/full_per_task/probes")
    code, out, _ = cambia("verify", "full_per_task")
    assert code == 1 and last_line(out) == "2 promises cannot be checked"
    shutil.rmtree(tmp_path / "runs/naive/probes")
    code, out, _ = cambia("verify", str(tmp_path / "runs/naive"))
    assert code == 0 and "the probe that was taken after 2 copy is gone" in out


def bad(text: str, make: Callable[[Path], object] = lambda place: None, *, name: str = "it") -> object:
    return pytest.param(name, make, text, id=text)


@pytest.mark.parametrize(
    "name, make, text",
    [
        bad("there is no run 'naiv' under", name="naiv"),
        bad("it is no run", lambda place: (place / "it").mkdir()),
        bad("is a model without its run", lambda place: checkpoint(place / "it")),
        bad("is a sweep: verify one of its runs", lambda place: a_sweep(place / "runs/it")),
        bad("is one checkpoint of a run: verify the run", name="runs/naive/latest"),
        bad("has no checkpoint yet", lambda place: without_checkpoints(place / "runs/it")),
        bad("is not readable JSON", lambda place: with_broken_config(place / "runs/it")),
    ],
)
def test_bad_input_is_one_line(
    name: str, make: Callable[[Path], object], text: str, cambia: Call, tmp_path: Path
) -> None:
    make(tmp_path)
    code, out, err = cambia("verify", name)
    assert (code, out) == (2, "")
    assert text in err and err.startswith("cambia: ") and err.count("\n") == 1


def a_sweep(folder: Path) -> None:
    SweepWriter(folder).write_grid("", [])


def without_checkpoints(folder: Path) -> None:
    shutil.copytree(folder.with_name("naive"), folder)
    for manifest in folder.glob("*/manifest.json"):
        shutil.rmtree(manifest.parent)


def with_broken_config(folder: Path) -> None:
    shutil.copytree(folder.with_name("naive"), folder)
    (folder / "config.json").write_text("{")


def test_the_page_shows_the_last_lines_as_they_are() -> None:
    """Each is one that a test above has seen, but for its numbers."""
    page = (ROOT / "docs/verify.md").read_text(encoding="utf-8")
    shown = {re.sub(r"\d+", "#", line) for line in re.findall(r"^\| `([^`]+)` \| \d", page, flags=re.M)}
    assert shown == {
        "every promise held (# tensors, # answers)",
        "nothing was promised, so nothing was broken",
        "# promises were broken",
        "# checkpoint is damaged",
        "# promises cannot be checked",
    }
