"""The native model: equal to Llama at equal sizes, and itself at unequal ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from cambia.errors import ConfigError
from cambia.models import CambiaConfig, CambiaForCausalLM
from cambia.nn.attention import rotary_frequencies

UNEVEN = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": [20, 7, 33],
    "num_attention_heads": [4, 6, 3],
    "num_key_value_heads": [2, 3, 3],
    "head_dim": 6,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def disturbed(model: Any) -> Any:
    """No weight is one or zero by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def uneven(**changes: Any) -> CambiaForCausalLM:
    return disturbed(CambiaForCausalLM(CambiaConfig(**{**UNEVEN, **changes})))


def tokens(rows: int = 2, length: int = 11, vocabulary: int = 31) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(length))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that both classes take: grouped or not, odd or even, with and without biases and tying."""
    kv_heads, shared, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    heads = kv_heads * shared
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 21)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(2, 40)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.2,
        "rope_parameters": dict(
            draw(st.sampled_from([{"rope_type": "default", "rope_theta": 100.0}, LLAMA3]))
        ),
    }


def in_float64(patch: pytest.MonkeyPatch) -> None:
    """Take Llama's float32 out of its norms and angles."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def angles(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exact = rotary_frequencies(self.config, dtype=torch.float64, device=x.device)
        table = (position_ids[..., None] * exact).repeat(1, 1, 2)
        return table.cos(), table.sin()

    patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles)


@settings(max_examples=25)
@given(
    sizes=shapes(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    length=st.sampled_from([1, 2, 40, 140]),
)
def test_equals_llama(sizes: dict[str, Any], dtype: torch.dtype, length: int) -> None:
    llama = disturbed(LlamaForCausalLM(LlamaConfig(**sizes))).to(dtype)
    native = CambiaForCausalLM(CambiaConfig(**sizes)).to(dtype).eval()
    native.load_state_dict(llama.state_dict())
    ids = tokens(2, length, sizes["vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            in_float64(patch)
        theirs, ours = llama(ids, labels=ids), native(ids, labels=ids)
    assert relative_error(ours.logits, theirs.logits) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert [name for name, _ in native.named_parameters()] == [name for name, _ in llama.named_parameters()]
    if length > 1:
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_gradients_equal_llamas() -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
    sizes |= {"vocab_size": 31, "num_hidden_layers": 2}
    llama = disturbed(LlamaForCausalLM(LlamaConfig(**sizes)))
    native = CambiaForCausalLM(CambiaConfig(**sizes))
    native.load_state_dict(llama.state_dict())
    ids = tokens()
    llama(ids, labels=ids).loss.backward()
    for skip_logits in (True, False):
        native.zero_grad()
        native(ids, labels=ids, skip_logits=skip_logits).loss.backward()
        for ours, theirs in zip(native.parameters(), llama.parameters(), strict=True):
            assert relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}])
def test_scaled_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = CambiaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope))
    theirs, _ = modeling_llama.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    ours = rotary_frequencies(config, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_the_same_loss_by_every_way_of_asking() -> None:
    model, ids = uneven().double(), tokens()
    ids[0, :4] = 5
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    full = model(ids, labels=labels)
    for targets in ({"labels": labels}, {"shift_labels": shifted}, {"labels": ids, "shift_labels": shifted}):
        for skip_logits in (False, True):
            output = model(ids, **targets, skip_logits=skip_logits)
            assert output.loss.item() == pytest.approx(full.loss.item(), rel=1e-12)
            assert (output.logits is None) == skip_logits
            halved = model(ids, **targets, skip_logits=skip_logits, num_items_in_batch=torch.tensor(5))
            assert halved.loss.item() == pytest.approx(full.loss.item() * 17 / 5, rel=1e-12)


def test_skipping_logits_without_targets_is_refused() -> None:
    with pytest.raises(ConfigError, match="shift_labels="):
        uneven()(tokens(), skip_logits=True)


def test_a_hooked_head_is_called() -> None:
    model, ids = uneven(), tokens()
    plain = model(ids, labels=ids, skip_logits=True).loss
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 0)
    hooked = model(ids, labels=ids, skip_logits=True).loss
    assert hooked.item() == pytest.approx(torch.tensor(31.0).log().item())
    assert hooked.item() != pytest.approx(plain.item())


def test_logits_to_keep() -> None:
    model, ids = uneven(), tokens()
    full = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=3).logits, full[:, -3:], atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([4, 2])).logits, full[:, [4, 2]], atol=1e-6)


def test_hidden_states() -> None:
    model, ids = uneven(), tokens()
    outputs = model.model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert model(ids).hidden_states is None
    assert torch.equal(model(inputs_embeds=outputs.hidden_states[0]).logits, model(ids).logits)


def test_a_position_never_sees_what_comes_later() -> None:
    model, ids = uneven(), tokens(2, 140)  # long enough for every form of attention
    changed = ids.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 31
    for kwargs in ({}, {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)}):
        before, after = model(ids, **kwargs).logits, model(changed, **kwargs).logits
        assert torch.equal(before[:, :100], after[:, :100])
        assert not torch.equal(before[:, 100], after[:, 100])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_cache_gives_the_same_tokens(cache: str) -> None:
    model, ids = uneven(), tokens(3, 5)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    slow = model.generate(ids, use_cache=False, **settings)
    fast = model.generate(ids, use_cache=True, cache_implementation=cache, disable_compile=True, **settings)
    assert torch.equal(slow, fast)
    assert slow.shape == (3, 25)


def test_cached_logits_in_pieces() -> None:
    model, ids = uneven(), tokens(2, 9)
    cache = None
    pieces = []
    for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert relative_error(torch.cat(pieces, 1), model(ids).logits) < 1e-5


def test_left_padding_changes_nothing() -> None:
    model, short = uneven(), tokens(1, 4)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), short), 1)
    mask = (torch.arange(7) >= 3).long()[None]
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(short, **settings)[:, 4:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 7:], alone)
    torch.manual_seed(1)
    sampled = model.generate(short, max_new_tokens=10, do_sample=True, pad_token_id=0)
    torch.manual_seed(1)
    assert torch.equal(sampled, model.generate(short, max_new_tokens=10, do_sample=True, pad_token_id=0))


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    model, ids = uneven(tie_word_embeddings=tied, layer_ids=[0, 7, 1]), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CambiaForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert AutoConfig.from_pretrained(tmp_path).layer_ids == [0, 7, 1]


def test_gradient_checkpointing() -> None:
    model, ids = uneven().train(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, expected)


def test_bfloat16_autocast_and_bfloat16_weights() -> None:
    model, ids = uneven(), tokens()
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, skip_logits=True)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    half = model.bfloat16()(ids)
    assert half.logits.dtype == torch.bfloat16
    assert relative_error(half.logits.float(), exact.logits) < 5e-2


def test_dropout_acts_in_training_only() -> None:
    model, ids = uneven(attention_dropout=0.5), tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_torch_compile() -> None:
    model, ids = uneven().train(), tokens()
    eager = model(ids, labels=ids, skip_logits=True).loss
    compiled = torch.compile(model, backend="aot_eager")(ids, labels=ids, skip_logits=True).loss
    compiled.backward()
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_lora_on_all_linear_layers() -> None:
    model, ids = uneven(), tokens()
    before = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert relative_error(adapted(input_ids=ids).logits, before) < 1e-6
    adapted(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert len(trained) == 3 * 7 * 2 and all("lora_" in name for name in trained)


def test_silent_layers_at_first(tmp_path: Path) -> None:
    """What the layers write is zero, everything else is as without; loading keeps what was saved."""
    sizes = {**UNEVEN, "attention_bias": True, "mlp_bias": True}
    torch.manual_seed(0)
    silent = CambiaForCausalLM(CambiaConfig(**sizes, zero_init_residual=True))
    writers = {name for name, _ in silent.named_parameters() if "o_proj" in name or "down_proj" in name}
    for name, parameter in silent.named_parameters():
        assert bool(parameter.any()) == (name not in writers and "bias" not in name), name
    embedded = silent.model.embed_tokens(tokens())
    expected = silent.lm_head(silent.model.norm(embedded))
    torch.testing.assert_close(silent(tokens(), use_cache=False).logits, expected)

    silent(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.any() for name, p in silent.named_parameters() if "o_proj.w" in name)
    disturbed(silent).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.zero_init_residual
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), silent.parameters(), strict=True))


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = CambiaForCausalLM(CambiaConfig(**UNEVEN))
    assert model(tokens().to("meta")).logits.shape == (2, 11, 31)


def test_rotary_angles_are_exact_in_float64() -> None:
    """Float32 angles would be wrong by 6e-5 at position 1000."""
    model = uneven().double()
    start = torch.arange(11)[None]
    near = model(tokens(1), position_ids=start).logits
    far = model(tokens(1), position_ids=start + 1000).logits
    assert relative_error(far, near) < 1e-10


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=2"),
        ({"num_attention_heads": [2, 4]}, "head_dim="),
        ({"num_attention_heads": 4, "head_dim": 5}, "head_dim=6"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head_dim=4"),
        ({"intermediate_size": [4, 4, 4]}, "one per layer"),
        ({"intermediate_size": [4, 0]}, "at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=1"),
        ({"vocab_size": 0}, "at least 1"),
        ({"layer_ids": [3, 3]}, "layer_ids"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "llama3"),
    ],
)
def test_illegal_sizes_are_refused_with_a_legal_one(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        CambiaConfig(**{"hidden_size": 24, "num_hidden_layers": 2, **changes})


def test_sizes_per_layer() -> None:
    config = CambiaConfig(**UNEVEN)
    assert [(config.ffn_size(i), config.num_heads(i), config.num_kv_heads(i)) for i in range(3)] == [
        (20, 4, 2),
        (7, 6, 3),
        (33, 3, 3),
    ]
    assert config.layer_ids == [0, 1, 2]
    plain = CambiaConfig(hidden_size=24, num_attention_heads=4)
    assert (plain.head_dim, plain.num_kv_heads(0), plain.ffn_size(5)) == (6, 4, 768)


def test_importing_the_packages_costs_nothing() -> None:
    code = "import sys, cambia.models, cambia.nn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
