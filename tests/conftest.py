"""What tests share: tiny models of every growable family, seeds, threads and hypothesis settings."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# A process that is killed loses nothing that it has written, flushed to the disk or not: only a machine does.
# Flushing takes a tenth of the time of all tests.
os.fsync = lambda descriptor: None

# Few examples, the same ones in every run; `--hypothesis-profile=search` looks further.
settings.register_profile("quick", deadline=None, max_examples=15, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=300, database=None)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole programs first: they take longest, and at the end one worker would wait for another."""
    items.sort(key=lambda item: item.path.parent.name != "tests")


SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EPSILON = 1e-3
"""Of the norms: large, so that a growth that forgets it shows."""


def tiny(
    family: str = "llama",
    dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    **sizes: Any,
) -> PreTrainedModel:
    """A model of a growable family with a few thousand weights, none of them special.

    All weights are disturbed, norm gains and biases too, so that nothing is one or zero by chance.

    Args:
        family: a model type of `ARCHITECTURES`.
        dtype: of the weights; float32 by default.
        sizes: config fields other than `SIZES`, by the family's names or `LlamaConfig`'s.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import cambia.models.causal_lm  # noqa: F401 (registers the native family)
    from cambia.models.architectures import ARCHITECTURES

    names = ARCHITECTURES[family].fields if family in ARCHITECTURES else {}
    config = AutoConfig.for_model(family, **{names.get(k, k): v for k, v in {**SIZES, **sizes}.items()})
    if "head_dim" in vars(config) and "head_dim" not in sizes:  # Qwen3's default is 128, whatever the rest
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"):
        if name in vars(config):
            setattr(config, name, EPSILON)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):  # GPT-2's dropout
        if name in vars(config) and name not in sizes:
            setattr(config, name, 0.0)
    for name in ("bos_token_id", "eos_token_id"):  # GPT-2's are beyond so small a vocabulary
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= config.vocab_size:
            setattr(config, name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not `.to(dtype)`, which would round the rotary tables' frequencies as well.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter))
    return model


def checkpoint(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A model folder as transformers writes it, with a tokenizer of bytes and a vocabulary padded to 272."""
    from cambia.data.tokenizers import BytesTokenizer, build_tokenizer

    model = tiny(family, **{"vocab_size": 272, "bos_token_id": 256, "eos_token_id": 256, **sizes})
    model.save_pretrained(folder)
    build_tokenizer(BytesTokenizer()).save(folder)
    return folder


@pytest.fixture(name="tiny", scope="session")
def tiny_fixture() -> Callable[..., PreTrainedModel]:
    """The function `tiny`."""
    return tiny


Call = Callable[..., tuple[int, str, str]]
"""The words after `cambia` -> exit code, stdout, stderr."""


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command line in this process."""
    from cambia import cli

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def peers() -> Iterator[ModuleType]:
    """The package `peers` of benchmarks/, with those of its modules that need no other library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        for name in ("by_hand", "judging", "llama", "page", "process", "sides"):
            importlib.import_module(f"peers.{name}")
        yield sys.modules["peers"]


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> Iterator[None]:
    """Tiny tensors are slower with many threads."""
    torch = sys.modules.get("torch")  # a test of plain files does not wait for it
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test begins with the same random state."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
