"""LoRA adapters of PEFT: their rank grows, and what they add stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from cambia.errors import GrowthError
from cambia.growth import AddLayers, WidenFFN, WidenLoraRank, grow, plan_growth
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, logits, loss_of, relative_error, tokens

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "with a bias": {"lora_bias": True},
    "embedding too": {"target_modules": ["q_proj", "embed_tokens"]},
    "uneven": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 5, "v_proj": 7}},
}


def adapted(family: str = "llama", *, fresh: bool = False, **settings: Any) -> Any:
    """A tiny model with adapters of rank 3, fresh (saying nothing yet) or disturbed."""
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    chosen = {"target_modules": targets, "fan_in_fan_out": family == "gpt2", **settings}
    biases = {"attention_bias": True, "mlp_bias": True} if settings.get("lora_bias") else {}
    config = peft.LoraConfig(r=3, lora_alpha=8, init_lora_weights=fresh, **chosen)
    return peft.get_peft_model(tiny(family, torch.float64, **biases), config)


def trained(model: PreTrainedModel, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_higher_rank_says_the_same_and_learns(family: str, fresh: bool) -> None:
    model = adapted(family, fresh=fresh)
    optimizer = trained(model)
    batch = tokens(model)
    before = logits(model, batch)
    event = grow(model, WidenLoraRank(to=8), optimizer=optimizer)
    assert relative_error(logits(model, batch), before) <= 1e-10
    assert event.config_changes == {"lora_ranks": ({"default": 3}, {"default": 8})}
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and bool((parameter.grad != 0).all()), name


# PEFT takes the bias of a LoRA layer for a broken matrix.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_loaded_by_peft_afterwards(kind: str, tmp_path: Path) -> None:
    model = adapted(**KINDS[kind])
    batch = tokens(model)
    before = logits(model, batch)
    scales = {name: dict(m.scaling) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    grow(model, WidenLoraRank(factor=2), optimizer=trained(model, 0))
    assert relative_error(logits(model, batch), before) <= 1e-10
    for name, module in model.named_modules():
        if name in scales:
            assert module.scaling == pytest.approx(scales[name])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    sizes = {"attention_bias": True, "mlp_bias": True} if kind == "with a bias" else {}
    again = peft.PeftModel.from_pretrained(tiny("llama", torch.float64, **sizes), tmp_path)
    assert relative_error(logits(again, batch), logits(model, batch)) <= 1e-14
    grow(model, WidenLoraRank(add=1))
    assert relative_error(logits(model, batch), before) <= 1e-10


def test_uneven_ranks_keep_their_proportions() -> None:
    model = adapted(**KINDS["uneven"])
    grow(model, WidenLoraRank(factor=2))
    ranks = {name.rpartition(".")[2]: m.r["default"] for name, m in model.named_modules() if hasattr(m, "r")}
    assert ranks == {"q_proj": 12, "v_proj": 6, "down_proj": 6}
    config = model.peft_config["default"]
    assert config.r == 6
    assert set(config.rank_pattern.values()) == {12}


def test_other_adapters_and_the_model_below_are_left_alone() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=["k_proj", "q_proj"]))
    before = {name: p for name, p in model.named_parameters() if "default" not in name}
    grow(model, WidenLoraRank(adapter="default", add=1))
    after = {name: p for name, p in model.named_parameters() if "default" not in name}
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() == before.keys()
    model.set_adapter("other")
    batch = tokens(model)
    said = logits(model, batch)
    grow(model, WidenLoraRank(adapter="other", to=7))
    assert torch.equal(logits(model, batch), said)
    assert (model.peft_config["default"].r, model.peft_config["other"].r) == (4, 7)


def test_adapters_that_transformers_itself_has_added_grow_too() -> None:
    model = tiny("llama", torch.float64)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "default")
    batch = tokens(model)
    before = logits(model, batch)
    grow(model, WidenLoraRank(to=6))
    assert relative_error(logits(model, batch), before) <= 1e-10
    assert model.peft_config["default"].r == 6


def test_a_growth_that_fails_leaves_the_adapters_as_they_were() -> None:
    class Refuses:
        def prepare(self, changes: Any) -> Any:
            def commit(undo: Any) -> None:
                raise MemoryError("no room")

            return commit

    model = adapted()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    config = model.peft_config["default"].to_dict()
    with pytest.raises(MemoryError):
        grow(model, WidenLoraRank(to=8), holders=[Refuses()])
    assert model.peft_config["default"].to_dict() == config
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert all(m.r == {"default": 3} for m in model.modules() if hasattr(m, "lora_A"))


def test_what_cannot_grow_under_adapters_is_refused_with_what_can() -> None:
    model = adapted()
    for operator in (WidenFFN(), AddLayers()):
        with pytest.raises(GrowthError, match=r"only WidenLoraRank grows .* merge_and_unload\(\)"):
            plan_growth(model, operator)
    with pytest.raises(GrowthError, match="there is no adapter 'other'; adapter= is one of default"):
        plan_growth(model, WidenLoraRank(adapter="other"))
    with pytest.raises(GrowthError, match=r"a plain llama model has no LoRA adapter .*get_peft_model"):
        plan_growth(tiny(), WidenLoraRank())
    with pytest.raises(GrowthError, match="to=2 is not larger"):
        plan_growth(model, WidenLoraRank(to=2))
    merged = model.merge_and_unload()
    grow(merged, WidenFFN())
