"""LoRA experts: what is refused, what adapters made elsewhere become, how large they are, and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.errors import CheckpointError, ConfigError
from cambia.models import LoraExperts, LoraShape
from cambia.models.bodies import count_parameters
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.parts.lora_shape import new_deltas, share_of
from cambia.nn.routed import bare_copy
from tests.conftest import tiny
from tests.laws.examples import logits
from tests.laws.test_parts import BATCH, beside, close, moved, said

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT's, and the next ones
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
)

# ---- refused ---------------------------------------------------------------------------------------


def test_targets_that_are_not_there_are_answered_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'query'; its linear layers: down_proj, gate_proj, k_proj, o_proj"):
        LoraExperts(tiny("llama"), LoraShape(targets=("query",)))
    experts = LoraExperts(tiny("llama"), LoraShape(targets=("q_proj", "v_proj"), tables="none", gains=False))
    assert {name.rpartition(".")[2] for name in experts.add().by_module} == {"q_proj", "v_proj"}


def test_one_model_has_one_set_of_experts() -> None:
    model = tiny("llama")
    experts = LoraExperts(model)
    with pytest.raises(ConfigError, match="added to this model already"):
        LoraExperts(model)
    experts.add("a")
    moved(experts, "a")
    experts.remove()
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="'query'"):
        LoraExperts(model, LoraShape(targets=("query",)))
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing has happened to it"
    again = LoraExperts(model)
    again.add("a")
    assert torch.equal(said(again, ["a"] * 6), logits(model, BATCH))


@pytest.mark.parametrize("name", ["", "a/b", "a.b", " a", "there"])
def test_names_are_unused_and_fit_to_be_folders(name: str) -> None:
    experts = beside("llama", "default", "there")
    with pytest.raises(ConfigError, match="cannot be a new LoRA expert's name"):
        experts.add(name)


def test_sealed_experts_train_no_more_and_stay() -> None:
    experts = beside("llama", "default", "a")
    experts.seal("a")
    with pytest.raises(ConfigError, match=r"never trains again: add\(like='a'\) goes on from it"):
        experts.teaching("a").__enter__()
    with pytest.raises(ConfigError, match="so it stays"):
        experts.drop("a")
    with pytest.raises(ConfigError, match="no LoRA expert 'b'; there are a"):
        experts.routed(["b"])


def test_a_name_is_given_once(tmp_path: Path) -> None:
    experts = LoraExperts(tiny("llama"))
    experts.seal(experts.add().name)
    experts.drop(experts.add().name)
    assert experts.add().name == "expert_2"
    again = LoraExperts.from_pretrained(experts.save_pretrained(tmp_path / "experts"), tiny("llama"))
    assert again.add().name not in ("expert_0", "expert_2")


@pytest.mark.parametrize(("kept", "dropped"), [("a", "b"), ("b", "a")])
def test_a_dropped_expert_leaves_nothing(kept: str, dropped: str) -> None:
    experts = beside("llama", "default", "a", "b")
    before = said(experts, [kept, None] * 3)
    experts.drop(dropped)
    assert experts.names == [kept]
    assert torch.equal(said(experts, [kept, None] * 3), before)


def saved(folder: Path) -> LoraExperts:
    experts = beside("llama", "default", "a", "b")
    experts.save_pretrained(folder)
    return experts


def test_experts_of_another_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "saved")
    other = tiny("llama", seed=3, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="LoRA experts of another LlamaForCausalLM"):
        LoraExperts.from_pretrained(tmp_path / "saved", other)
    LoraExperts(other)  # nothing was left hanging


def test_an_altered_expert_is_noticed(tmp_path: Path) -> None:
    experts = saved(tmp_path / "saved")
    path = tmp_path / "saved/adapters/a/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is not what was written"):
        LoraExperts.from_pretrained(tmp_path / "saved", bare_copy(experts.model))


def test_a_folder_without_its_model_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "saved")
    with pytest.raises(
        CheckpointError, match=r"without their model: give it, from_pretrained\(folder, model\)"
    ):
        LoraExperts.from_pretrained(tmp_path / "saved")


# ---- adapters made elsewhere -----------------------------------------------------------------------


def by_peft(folder: Path, model: PreTrainedModel, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter as PEFT makes and writes it, and what the model says with it."""
    stock = get_peft_model(bare_copy(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    stock.eval()
    expected = logits(stock, BATCH)
    stock.save_pretrained(folder, save_embedding_layers=False)
    return folder, expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"0.mlp.*": 5}, "alpha_pattern": {"1.*": 3}},
    ],
)
def test_adapters_of_peft_come_in(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family)
    folder, expected = by_peft(tmp_path / "mine", model, **settings)
    experts = LoraExperts(model)
    part = experts.from_peft(folder)
    assert part.name == "mine"
    assert part.state == "sealed"
    assert close(said(experts, ["mine"] * 6), expected)
    assert torch.equal(said(experts, [None] * 6), logits(model, BATCH))


def test_tables_and_norms_of_an_adapter_come_in_too(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    folder, expected = by_peft(
        tmp_path / "mine",
        model,
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["input_layernorm", "lm_head"],
    )
    experts = LoraExperts(model)
    experts.from_peft(folder, "it")
    assert close(said(experts, ["it"] * 6), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "began as pissa, which changes the weights of its base"),
        ({"init_lora_weights": "olora"}, "began as olora"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    ],
)
def test_what_an_expert_cannot_do_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True)
    folder, _ = by_peft(tmp_path / "mine", model, r=4, **settings)
    with pytest.raises(ConfigError, match=said):
        LoraExperts(model).from_peft(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder, _ = by_peft(tmp_path / "mine", tiny("llama"), r=4)
    with pytest.raises(CheckpointError, match=r"made for another model: it adapts .model\.layers\.0"):
        LoraExperts(tiny("gpt2")).from_peft(folder)
    with pytest.raises(CheckpointError, match=r"made for another model: at .* for a layer of 40 outputs"):
        LoraExperts(tiny("llama", hidden_size=40, head_dim=10)).from_peft(folder)
    with pytest.raises(CheckpointError, match="no adapter folder of PEFT"):
        LoraExperts(tiny("llama")).from_peft(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        LoraExperts(tiny("llama")).from_peft(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ConfigError, match="of type IA3"):
        LoraExperts(tiny("llama")).from_peft(folder)


def test_an_adapter_of_ours_knows_its_base(tmp_path: Path) -> None:
    experts = beside("llama", "default", "a")
    folder = experts.to_peft("a", tmp_path / "a")
    LoraExperts(bare_copy(experts.model)).from_peft(folder)
    other = bare_copy(experts.model)
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    others = LoraExperts(other)
    with pytest.raises(CheckpointError, match="made for another LlamaForCausalLM"):
        others.from_peft(folder)
    (folder / "base.json").unlink()
    assert others.from_peft(folder).name == "a" and others.sealed == ["a"]


# ---- size, and writing text ------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [64, 128, 256])
def test_an_expert_takes_its_share_of_the_model(hidden: int) -> None:
    model = tiny("llama", hidden_size=hidden, intermediate_size=3 * hidden, vocab_size=264)
    part = LoraExperts(model).add()
    share = part.num_parameters / count_parameters(model)
    assert share <= share_of(model)
    assert share > 0.7 * share_of(model)
    assert part.rank % 4 == 0


LARGE = {
    "1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4},
    "1B, tied": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                 "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "tie_word_embeddings": True},
    "7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


@pytest.mark.parametrize("size", LARGE)
def test_experts_of_large_models_have_rank_16_and_take_about_a_percent(size: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE[size]))
        part = LoraExpert("a", new_deltas(model, LoraShape()))
    assert part.rank >= 16
    assert 0.002 < part.num_parameters / count_parameters(model) < 0.015


@pytest.mark.parametrize("family", ["llama", "gpt2", "cambia"])
def test_a_batch_of_prompts_is_continued_row_by_row(family: str) -> None:
    experts = beside(family, "default", "a", "b")
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with experts.routed(["a", "b", None, "b", "a", None]):
        together = experts.model.generate(BATCH, **settings)
    for rows, name in (([0, 4], "a"), ([1, 3], "b"), ([2, 5], None)):
        with experts.using(name):
            alone = experts.model.generate(BATCH[rows], **settings)
        assert torch.equal(alone, together[rows])


def test_a_beam_search_keeps_each_row_with_its_expert() -> None:
    experts = beside("llama", "default", "a", "b")
    settings: dict[str, Any] = {
        "max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with experts.routed(["a", "b"]):
        together = experts.model.generate(BATCH[:2], **settings)
    for row, name in enumerate("ab"):
        with experts.using(name):
            assert torch.equal(experts.model.generate(BATCH[row : row + 1], **settings)[0], together[row])


def test_a_mixture_is_searched_with_beams_as_alone() -> None:
    experts = beside("llama", "default", "a", "b")
    weights = torch.tensor([[0.7, 0.3], [0.1, 0.9]])
    settings: dict[str, Any] = {
        "max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with experts.mixed(["a", "b"], weights):
        together = experts.model.generate(BATCH[:2], **settings)
    for row in range(2):
        with experts.mixed(["a", "b"], weights[row : row + 1]):
            assert torch.equal(experts.model.generate(BATCH[row : row + 1], **settings)[0], together[row])
