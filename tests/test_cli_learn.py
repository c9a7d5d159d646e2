"""`cambia learn`: what comes out, how it goes on, and what is refused before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cambia.experiment import watch
from cambia.experiment.watch import Watcher
from cambia.models import LoraExperts
from cambia.models.saved import load_model
from cambia.training.step import Stepper
from tests.conftest import checkpoint
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
    for kind in ("counting", "brackets", "copy"):
        text(folder, kind)
    with pytest.MonkeyPatch.context() as patch:
        here(folder, patch)
        words = "base counting.txt brackets.txt counting.txt --steps 24 --name two"
        return folder, cambia(f"cambia learn {words}", *QUICK)


@pytest.fixture
def place(learned: tuple[Path, Said], monkeypatch: pytest.MonkeyPatch) -> Path:
    here(learned[0], monkeypatch)
    return learned[0]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# ---- what comes out ------------------------------------------------------------------------------


def test_it_ends_with_what_each_expert_learned(learned: tuple[Path, Said]) -> None:
    folder, said = learned
    assert said.code == 0, said.err
    assert said.out.startswith("3 texts, 24 steps on each, batches of 16 x 32 tokens, learning rate 0.02\n")
    found = summary(folder / "runs/two")
    assert [expert["state"] for expert in found["experts"]] == ["sealed", "sealed"]
    assert [expert["learned_from"][0] for expert in found["experts"]] == ["counting", "brackets"]
    for one in found["texts"]:
        assert one["own"] < one["base"] - 0.5 and one["told"] < one["base"] - 0.5
        assert 0.7 < one["right"] <= one["covered"]
    assert found["results"]["experts"] == 2
    assert found["results"]["expert_bytes"] == 4 * found["results"]["expert_parameters"]
    for words in ("learned by", "expert_1", "cambia verify two", "stock PEFT"):
        assert words in said.out
    assert "expert_1" in (folder / "runs/two/report.html").read_text()


def test_specialists_stand_beside(place: Path) -> None:
    shutil.copytree(place / "runs/two", place / "runs/beside", ignore=shutil.ignore_patterns("ckpt_*"))
    said = cambia("cambia learn --resume beside --specialists")
    assert said.code == 0, said.err
    assert "specialist" in said.out and "learned this text alone" in " ".join(said.out.split())
    for one in summary(place / "runs/beside")["texts"]:
        assert one["specialist"] < one["base"] - 0.5
    alone = summary(place / "runs/beside-specialists")
    assert alone["steps"] == 3 * 24 and "experts" not in alone


def test_nothing_was_lost_and_it_is_proved(place: Path) -> None:
    said = cambia("cambia verify two")
    assert said.code == 0, said.out + said.err
    last = said.out.rstrip().splitlines()[-1]
    assert last.startswith("every promise held") and "F_weight 0, F_route" in last and "coverage" in last
    # What the first expert answered when the second stage ended is what it answers after the third.
    kept = [line.split() for line in said.out.splitlines() if line.strip().startswith("2 brackets")]
    assert any(row[2:5] == ["counting", "kept", "none"] for row in kept), said.out


def test_the_right_expert_writes(place: Path) -> None:
    prompt = (place / "brackets.txt").read_text()[:40]
    said = cambia("cambia generate two --max-new-tokens 4 --temperature 0 --prompt", prompt)
    assert said.code == 0 and "answered by expert_1" in said.out
    scored = cambia("cambia eval two brackets.txt --max-bytes 400")
    assert scored.code == 0, scored.err
    bits = float(scored.out.split()[-2])
    told = {one["name"]: one for one in summary(place / "runs/two")["texts"]}["brackets"]
    assert bits < told["base"] - 0.5
    exported = cambia("cambia export two stock")
    assert exported.code == 0 and "2 experts beside it" in exported.out
    assert LoraExperts.from_pretrained(place / "stock/experts").names == ["expert_0", "expert_1"]


def test_an_altered_expert_is_found_and_refused(place: Path, tmp_path: Path) -> None:
    whole = cambia("cambia verify runs/two/latest/experts")
    assert whole.code == 0 and "2 experts as written" in whole.out
    shutil.copytree(place / "runs/two/latest/experts", tmp_path / "experts")
    weights = tmp_path / "experts/adapters/expert_0/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found = cambia(f"cambia verify {tmp_path / 'experts'}")
    assert found.code == 1 and "adapter_model.safetensors is not what was written" in found.out
    refused = cambia(f"cambia learn {tmp_path / 'experts'} copy.txt")
    assert refused.code == 2 and "is not what was written" in refused.err


def test_families_that_cannot_grow_can_learn(place: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    checkpoint(place / "neox", "gpt_neox", **sizes)
    said = cambia(
        "cambia learn neox counting.txt --steps 12 --name neox", *QUICK, "--methods.0.keep_margin", "0"
    )
    assert said.code == 0, said.err
    assert [expert["name"] for expert in summary(place / "runs/neox")["experts"]] == ["expert_0"]
    # One text is enough for a promise: the model itself.
    assert "F_weight 0" in cambia("cambia verify neox").out
    grown = "--model.path neox --data.tasks.0.source.path counting.txt --training.sequence_length 32"
    refused = cambia(f"cambia run finetune {grown}")
    assert refused.code == 2 and "those that can grow are" in refused.err


# ---- how it goes on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def further(learned: tuple[Path, Said]) -> Path:
    """The same model after a third kind of text, from its folder of experts."""
    with pytest.MonkeyPatch.context() as patch:
        here(learned[0], patch)
        said = cambia("cambia learn runs/two/latest/experts copy.txt --steps 12 --name three")
        assert said.code == 0, said.err
    return learned[0] / "runs/three"


def test_a_folder_of_experts_goes_on(place: Path, further: Path) -> None:
    before, after = summary(place / "runs/two"), summary(further)
    assert [expert["sha256"] for expert in after["experts"][:2]] == [e["sha256"] for e in before["experts"]]
    assert [expert["learned_from"][0] for expert in after["experts"]] == ["counting", "brackets", "copy"]
    assert [one["name"] for one in after["texts"]] == ["copy", "counting", "brackets"]
    old = {one["name"]: one for one in before["texts"]}
    for one in after["texts"][1:]:
        assert (one["base"], one["told"]) == (old[one["name"]]["base"], old[one["name"]]["told"])
    assert cambia("cambia verify three").code == 0


def test_without_memory_for_the_next_expert_nothing_is_lost(place: Path, further: Path) -> None:
    steps = 0

    def full(stepper: Stepper, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return taught(stepper, batch)

    taught = Stepper.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "__call__", full)
        said = cambia("cambia learn two copy.txt --steps 12 --name full")
    assert said.code == 2 and said.err.splitlines()[-1].startswith("cambia: out of memory with")
    latest = place / "runs/full/latest"
    experts = LoraExperts.from_pretrained(latest / "experts", load_model(latest))
    assert experts.sealed == ["expert_0", "expert_1"]
    # And with memory it ends as if nothing had happened.
    assert cambia("cambia learn --resume full").code == 0
    for log in ("metrics.csv", "eval.csv", "growth.jsonl", "stream.jsonl", "promises.jsonl"):
        assert (place / "runs/full" / log).read_bytes() == (further / log).read_bytes(), log


def test_files_are_learned_in_the_order_of_their_arrival(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []

    def train(folder: Path, experiment: Any) -> bool:
        """A run that is done at once; the second time it is killed."""
        made.append((folder.name, Path(experiment.data.tasks[0].source.path).name))
        if len(made) == 2:
            raise KeyboardInterrupt
        shutil.copytree(place / "runs/two", folder)
        return True

    monkeypatch.setattr(watch, "train_in", train)
    inbox, home = tmp_path / "inbox", tmp_path / "home"
    inbox.mkdir()
    (inbox / "a.txt").write_text("first text")
    (inbox / "empty.txt").write_text("")
    said: list[str] = []
    watcher = Watcher(str(place / "base"), inbox, home, seconds=0.01, say=said.append)
    assert watcher.watch(idle_seconds=0)
    (inbox / "b.txt").write_text("second text")
    with pytest.raises(KeyboardInterrupt):
        watcher.watch(idle_seconds=0)
    shutil.rmtree(inbox)  # what has arrived is kept
    inbox.mkdir()
    assert watcher.watch(idle_seconds=0)
    number = {line["file"]: f"{line['number']:04d}" for line in watcher.arrivals()}
    first, second = (f"{number[name]}-{name}" for name in ("a.txt", "b.txt"))
    assert made == [(number["a.txt"], first), ("0003", second), ("0003", second)]
    assert [line["file"] for line in watcher.arrivals() if "refused" in line] == ["empty.txt"]
    assert (home / "newest").resolve() == (home / "0003").resolve()
    other = cambia(f"cambia learn base --watch {inbox} --name x --once --steps 3 stray.txt")
    assert other.code == 2 and "--watch takes a model and no texts" in other.err


# ---- what is refused before training -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("base", "nothing to learn from"),
        ("", "name a model"),
        ("bas counting.txt", "is no folder here, nor a run's name"),
        ("base nowhere.txt", "there is no file or folder 'nowhere.txt'"),
        ("base empty.txt", "is empty"),
        ("base line.txt", "the valid split is empty"),
        ("base short.txt", "the valid split is empty"),
        ("base few.jsonl", "32 windows to learn from, and an expert is born after 48"),
        ("base odd.jsonl", "--data.tasks.0.source.field"),
        ("small counting.txt", "add rows first"),
        ("base counting.txt --methods.0.shape.targets [nope]", "its linear layers: down_proj"),
        ("base counting.txt --methods.0.keep_margn 1", "did you mean 'keep_margin'"),
        ("two copy.txt --model.dtype bfloat16", "leave out --model.dtype"),
        ("two copy.txt --methods.0.shape.rank 3 --methods.0.shape.kind full", "do not fit the settings"),
    ],
)
def test_what_cannot_be_learned_is_one_line(place: Path, words: str, said: str) -> None:
    (place / "empty.txt").write_text("")
    (place / "line.txt").write_text("one line\n")
    (place / "short.txt").write_text("\n\n".join(f"{i} is a short one" for i in range(30)))
    rows = [json.dumps({"text": f"root {i}"}) for i in range(100)]
    (place / "few.jsonl").write_text("\n".join(rows))
    (place / "odd.jsonl").write_text('{"a": "b", "c": 1}\n')
    if not (place / "small").exists():
        checkpoint(place / "small", vocab_size=250, bos_token_id=1, eos_token_id=1, pad_token_id=None)
    quick = [] if words.startswith("two") else QUICK
    refused = cambia(f"cambia learn {words} --name refused", *quick)
    assert refused.code == 2 and said in " ".join(refused.err.split()), refused.err
    assert "Traceback" not in refused.out + refused.err
    assert refused.err.splitlines()[-1].startswith("cambia: ")
    assert not (place / "runs/refused").exists()
