"""Growth on the disk gives, byte for byte, what loading, growing and saving give, in little memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel

from cambia.config import resolve
from cambia.errors import CambiaError, CheckpointError, ConfigError, GrowthError, StorageFullError
from cambia.files import MANIFEST
from cambia.growth import (
    OPERATORS,
    AddHeads,
    AddLayers,
    AddTokens,
    Operator,
    WidenFFN,
    WidenHeadDim,
    WidenHidden,
    grow,
)
from cambia.growth.disk import rows
from cambia.growth.disk.offline import grow_checkpoint, plan_checkpoint
from cambia.growth.disk.shards import WHOLE
from cambia.growth.operators import PartOperator
from cambia.models.saved import load_model
from cambia.nn import blocks
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, LEGAL_AMOUNTS

TOGETHER = (WidenFFN(add=8, initial="split"), AddLayers(add=1), AddTokens(add=5), WidenHidden(add=12))


def _operators() -> list[tuple[Operator, ...]]:
    """Each operator of the registry by itself, and several at once."""
    classes = [resolve(name, OPERATORS, "operator") for name in OPERATORS]
    classes = [cls for cls in classes if not issubclass(cls, PartOperator)]
    amount = {cls: LEGAL_AMOUNTS.get(cls.__name__, [{"add": 3}])[0] for cls in classes}
    return [(cls() if cls is WidenHeadDim else cls(**amount[cls]),) for cls in classes] + [TOGETHER]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors in many blocks, and nothing held between operators."""
    monkeypatch.setattr(blocks, "BLOCK", 40)
    monkeypatch.setattr(rows, "HELD_BYTES", 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def saved(model: PreTrainedModel, folder: Path, shards: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def assert_as_live(
    source: Path, tmp_path: Path, operators: tuple[Operator, ...], shard_bytes: int = 10**9
) -> None:
    live = load_model(source)
    try:
        grow(live, *operators, seed=3)
    except GrowthError as refused:
        with pytest.raises(GrowthError, match=re.escape(str(refused))):
            plan_checkpoint(source, *operators)
        return
    saved(live, tmp_path / "live", f"{shard_bytes // 1000}KB")
    grow_checkpoint(source, *operators, out=tmp_path / "out", seed=3, shard_bytes=shard_bytes, check="no")
    assert contents(tmp_path / "out") == contents(tmp_path / "live")


# ---- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("operators", _operators(), ids=lambda o: "+".join(type(each).__name__ for each in o))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_it_writes_what_live_growth_saves(
    family: str, operators: tuple[Operator, ...], tmp_path: Path
) -> None:
    assert_as_live(saved(tiny(family), tmp_path / "old"), tmp_path, operators)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "qwen3", "gpt2")])
def test_in_families_with_the_same_table(family: str, tmp_path: Path) -> None:
    assert_as_live(saved(tiny(family), tmp_path / "old"), tmp_path, TOGETHER)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_every_type_tied_or_not(family: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    source = saved(tiny(family, dtype, tie_word_embeddings=tied), tmp_path / "old")
    operators = (WidenFFN(add=8), AddTokens(add=5), AddLayers(add=1, initial="random"), WidenFFN(factor=1.5))
    assert_as_live(source, tmp_path, operators)


@pytest.mark.parametrize(("old", "new"), [("5KB", 15_000), ("5KB", 10**9), ("5GB", 4_000)])
def test_in_one_file_or_several(old: str, new: int, tmp_path: Path) -> None:
    source = saved(tiny("qwen3", num_hidden_layers=11), tmp_path / "old", old)
    assert_as_live(source, tmp_path, (WidenFFN(factor=2), WidenHidden(factor=2)), new)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or new == 10**9


def test_the_check_compares_old_and_new(tmp_path: Path) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    event = grow_checkpoint(source, *TOGETHER, out=tmp_path / "out").event
    live = grow(load_model(source), *TOGETHER)
    assert event.logit_error == pytest.approx(live.logit_error, rel=1e-3)
    assert event.loss_after == pytest.approx(live.loss_after)
    assert event.as_dict().keys() == live.as_dict().keys()
    assert event.parameters_after == live.parameters_after
    skipped = grow_checkpoint(source, *TOGETHER, out=tmp_path / "unchecked", check="no").event
    assert skipped.logit_error is None


def test_what_is_not_exact_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    monkeypatch.setattr(rows, "root_mean_square", lambda _: float("nan"))
    with pytest.raises(GrowthError, match="logits differ by nan"):
        grow_checkpoint(source, WidenFFN(add=8), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# ---- checkpoints as they are found ---------------------------------------------------------------


def test_names_without_the_bodys_prefix_and_tables_that_are_no_parameters(tmp_path: Path) -> None:
    source = saved(tiny("gpt2"), tmp_path / "old")
    whole = tmp_path / "whole"
    shutil.copytree(source, whole)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(source / WHOLE).items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(tensors, source / WHOLE, metadata={"format": "pt"})
    plan = plan_checkpoint(source, WidenFFN(add=8))
    assert plan.checkpoint.others == ("h.0.attn.bias",)
    assert any("'h.0.attn.bias'" in note for note in plan.notes)
    grow_checkpoint(source, WidenFFN(add=8), out=tmp_path / "out")
    grow_checkpoint(whole, WidenFFN(add=8), out=tmp_path / "same")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


def test_a_tied_tensor_may_be_there_twice_but_not_in_two_forms(tmp_path: Path) -> None:
    source = saved(tiny("llama", tie_word_embeddings=True), tmp_path / "old")
    tensors = load_file(source / WHOLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / WHOLE, metadata={"format": "pt"})
    assert_as_live(source, tmp_path, (AddTokens(add=3),))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / WHOLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        plan_checkpoint(source, AddTokens(add=3))


def test_what_stands_beside_the_weights_goes_along(tmp_path: Path) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    for name in ("README.md", "chat_template.jinja", "tokenizer_config.json", "LICENSE"):
        (source / name).write_text(f"{{}} {name}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("tool")
    for name in ("optimizer.pt", "pytorch_model.bin", "state.json"):
        (source / name).write_text("of the old weights")
    grow_checkpoint(source, WidenFFN(add=8), out=tmp_path / "out")
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert {"README.md", "chat_template.jinja", "tokenizer_config.json"} <= there
    assert "additional_chat_templates/tool.jinja" in there
    assert not there & {"optimizer.pt", "pytorch_model.bin", "state.json"}
    assert (tmp_path / "out/LICENSE").read_text() == "{} LICENSE"


def with_tokenizer(source: Path, tokens: int) -> Path:
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, "w0")).save(
        str(source / "tokenizer.json")
    )
    return source


def test_a_tokenizer_shorter_than_the_vocabulary_is_told(tmp_path: Path) -> None:
    source = with_tokenizer(saved(tiny("llama"), tmp_path / "old"), 27)
    notes = plan_checkpoint(source, AddTokens(add=8)).notes
    assert any("uses 27 of 31 rows: its next 4 new tokens" in note for note in notes)
    assert not plan_checkpoint(source, WidenFFN(add=8)).notes


def test_a_tokenizer_longer_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = with_tokenizer(saved(tiny("llama"), tmp_path / "old"), 40)
    with pytest.raises(GrowthError, match=r"has 40 tokens and the vocabulary 31 rows.*add_tokens --to 64"):
        plan_checkpoint(source, WidenFFN(add=8))
    plan_checkpoint(source, AddTokens(to=64))


def test_notes_of_the_plan(tmp_path: Path) -> None:
    source = saved(tiny("qwen2", torch.bfloat16), tmp_path / "old")
    notes = plan_checkpoint(source, WidenHeadDim()).notes
    assert any("Qwen2Config does not declare head_dim=12" in note for note in notes)
    in_step = plan_checkpoint(source, WidenHidden(factor=2), AddHeads(factor=2)).notes
    assert not any("head_dim" in note for note in in_step)
    assert any("rounded to 16 bits" in note for note in notes)
    assert any("jump" in note for note in plan_checkpoint(source, AddLayers(add=1, preserve=False)).notes)
    assert "stock" in plan_checkpoint(source, WidenFFN(add=8)).loads_as
    native = saved(tiny("cambia"), tmp_path / "native")
    assert "needs Cambia" in plan_checkpoint(native, WidenFFN(add=8, layers=[0])).loads_as


# ---- refusals ------------------------------------------------------------------------------------


def _rewritten(source: Path, **fields: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _cut(source: Path) -> None:
    data = (source / WHOLE).read_bytes()
    (source / WHOLE).write_bytes(data[:-100])


def _without(source: Path, name: str) -> None:
    tensors = load_file(source / WHOLE)
    del tensors[name]
    save_file(tensors, source / WHOLE)


def _pickled(source: Path) -> None:
    (source / WHOLE).rename(source / "pytorch_model.bin")


def _integers(source: Path) -> None:
    tensors = load_file(source / WHOLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / WHOLE)


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no config": (lambda s: (s / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), "not readable JSON"),
    "no weights": (lambda s: (s / WHOLE).unlink(), "no weights to grow"),
    "pickled": (_pickled, "save_pretrained"),
    "adapter": (lambda s: (s / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    "quantized": (
        lambda s: _rewritten(s, quantization_config={"quant_method": "gptq"}),
        r"quantized \(gptq\)",
    ),
    "family": (lambda s: _rewritten(s, model_type="bloom"), "'bloom'.*growable on disk are cambia, llama"),
    "heads": (lambda s: _rewritten(s, num_attention_heads=5), "config.json"),
    "other sizes": (lambda s: _rewritten(s, intermediate_size=21), "do not belong together"),
    "cut": (_cut, "cut short"),
    "empty": (lambda s: (s / WHOLE).write_bytes(b""), "no safetensors file"),
    "no header": (lambda s: (s / WHOLE).write_bytes(b"\x02" + b"\0" * 30), "no safetensors header"),
    "missing": (lambda s: _without(s, "lm_head.weight"), "holds no 'lm_head.weight'"),
    "integers": (_integers, "is of type I8"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_cannot_grow_is_refused_in_one_line(broken: str, tmp_path: Path) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    breaks, expected = BROKEN[broken]
    breaks(source)
    with pytest.raises(CambiaError, match=expected) as refused:
        grow_checkpoint(source, WidenFFN(add=8), out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_of_several(tmp_path: Path) -> None:
    source = saved(tiny("llama"), tmp_path / "old", "5KB")
    next(source.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="lacks the file 'model-00002-of-"):
        plan_checkpoint(source, WidenFFN(add=8))


def test_measured_choices_need_the_model_in_memory(tmp_path: Path) -> None:
    source = saved(tiny("cambia"), tmp_path / "old")
    with pytest.raises(GrowthError, match="name the layers"):
        plan_checkpoint(source, WidenFFN(add=8, layers="gradient"))


def test_out_must_be_new_elsewhere_and_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    with pytest.raises(ConfigError, match="exists already"):
        grow_checkpoint(source, WidenFFN(add=8), out=source)
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        grow_checkpoint(source, WidenFFN(add=8), out=source / "new")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageFullError, match="room"):
        grow_checkpoint(source, WidenFFN(add=8), out=tmp_path / "deep/er/out")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# ---- in a process of its own ---------------------------------------------------------------------

PROGRAM = """
import sys, time
from pathlib import Path
from cambia.growth import WidenFFN
from cambia.growth.disk.offline import grow_checkpoint
def slowly(done, total):
    print(done, flush=True)
    time.sleep({pause})
if len(sys.argv) > 1:
    source, out = map(Path, sys.argv[1:])
    grow_checkpoint(source, WidenFFN(factor=1.5), out=out, progress=slowly if {pause} else None)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(lines["VmHWM"].split()[0]) * 1024)
"""


def start(*words: Path, pause: float = 0) -> subprocess.Popen[str]:
    import cambia

    environment = {**os.environ, "PYTHONPATH": str(Path(cambia.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(pause=pause), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_it_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    source = saved(tiny("llama"), tmp_path / "old")
    process = start(source, tmp_path / "out", pause=0.2)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))  # what was written so far
    grow_checkpoint(source, WidenFFN(factor=1.5), out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]


def peak(*words: Path) -> int:
    out, _ = start(*words).communicate()
    return int(out.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory was used")
@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 8192, "num_hidden_layers": 11},  # no tensor above 6 % of the whole
        {"vocab_size": 64_000, "num_hidden_layers": 6, "tie_word_embeddings": True},  # one is nearly half
    ],
    ids=["many tensors", "one large tensor"],
)
def test_memory_stays_under_a_third_of_the_checkpoint(sizes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(
        "llama",
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=8,
        **sizes,
    )
    source = saved(model, tmp_path / "old", "200MB")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 500_000_000
    del model
    idle = peak()
    began = time.perf_counter()
    above = peak(source, tmp_path / "out") - idle
    seconds = time.perf_counter() - began
    print(f"{size / 1e6:.0f} MB: {above / 1e6:.0f} MB above idle ({idle / 1e6:.0f} MB), {seconds:.1f} s")
    assert above < size / 3
