"""LoRA experts beside models whose weights are stored in 8 or 4 bits; what is not installed is skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.errors import ConfigError
from cambia.models import LoraExperts

pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages say of themselves
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))


def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def by_bitsandbytes(bits: int) -> Callable[[Path], PreTrainedModel]:
    def made(folder: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        plain().save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")

    return made


def by_torchao(folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize(
    "quantised",
    [by_bitsandbytes(8), by_bitsandbytes(4), by_torchao],
    ids=["bitsandbytes-8", "bitsandbytes-4", "torchao-8"],
)
def test_experts_learn_beside_quantised_weights(
    quantised: Callable[[Path], PreTrainedModel], tmp_path: Path
) -> None:
    model = quantised(tmp_path / "base").eval()
    with torch.no_grad():
        before = model(IDS).logits
    experts = LoraExperts(model)
    part = experts.add("a")
    routes = ["a", None, "a", None]
    with torch.no_grad(), experts.routed(routes):
        assert torch.equal(model(IDS).logits, before), "an expert changes nothing at birth"
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        with experts.teaching("a"):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    experts.seal("a")
    with torch.no_grad(), experts.routed(routes):
        taught = model(IDS).logits
    assert torch.equal(taught[1::2], before[1::2]) and not torch.equal(taught[::2], before[::2])
    experts.save_pretrained(tmp_path / "experts")
    experts.remove()
    again = LoraExperts.from_pretrained(tmp_path / "experts", model)
    with torch.no_grad(), again.routed(routes):
        assert torch.equal(model(IDS).logits, taught)
        assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (4, 18)
    with pytest.raises(ConfigError, match="is stored quantised"):
        again.merged("a")
