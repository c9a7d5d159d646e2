"""`cambia learn`: what comes out, what is refused before training, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.learning import QUICK, base, text
from tests.markdown import Said, cambia


def here(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("CAMBIA_RUNS", str(folder / "runs"))
    patch.setenv("CAMBIA_CACHE", str(folder / "cache"))
    patch.setenv("COLUMNS", "100")
    patch.delenv("CAMBIA_DATA", raising=False)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """A folder in which a model has learned two kinds of text, of which one comes again."""
    folder = tmp_path_factory.mktemp("learn")
    base(folder / "base")
    text(folder, "counting")
    text(folder, "brackets")
    with pytest.MonkeyPatch.context() as patch:
        here(folder, patch)
        words = "base counting.txt brackets.txt counting.txt --steps 30 --name two"
        return folder, cambia(f"cambia learn {words}", *QUICK)


@pytest.fixture
def place(learned: tuple[Path, Said], monkeypatch: pytest.MonkeyPatch) -> Path:
    here(learned[0], monkeypatch)
    return learned[0]


def test_it_ends_with_what_each_expert_learned(learned: tuple[Path, Said]) -> None:
    folder, said = learned
    assert said.code == 0, said.err
    summary = json.loads((folder / "runs/two/summary.json").read_text())
    experts, texts = summary["experts"], {text["name"]: text for text in summary["texts"]}
    assert [expert["state"] for expert in experts] == ["sealed", "sealed"]
    assert [expert["learned_from"][0] for expert in experts] == ["counting", "brackets"]
    for text_ in texts.values():
        assert text_["own"] < text_["base"] - 0.5 and text_["right"] > 0.7
    assert summary["results"]["experts"] == 2
    assert summary["results"]["expert_bytes"] == 4 * summary["results"]["expert_parameters"]
    for words in ("learned by", "expert_1", "cambia verify two", "stock PEFT"):
        assert words in said.out
    assert "expert_1" in (folder / "runs/two/report.html").read_text()
