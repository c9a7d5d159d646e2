"""What the benchmarks of experts measure with: who answers, what is new, a foreign model's tokenizer."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cambia import CambiaConfig, CambiaForCausalLM
from cambia.models import LoraExperts, LoraShape

DOMAINS = {"low": 20, "high": 120}


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """Modules of benchmarks/ by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module


# ---- who answers ---------------------------------------------------------------------------------


def text(domain: str, rows: int, seed: int) -> Tensor:
    """(N, 128) of a domain that has bytes of its own."""
    generator = torch.Generator().manual_seed(seed)
    return DOMAINS[domain] + torch.randint(0, 40, (rows, 128), generator=generator)


@pytest.fixture(scope="module")
def learned(parts: Any) -> Any:
    """Two experts that say something, of which one is not the right one for `high`: that is the base's.

    With rank 1 there is one direction, and PEFT need not search for it.
    """
    torch.manual_seed(0)
    config = CambiaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    experts = LoraExperts(CambiaForCausalLM(config), LoraShape(rank=1, tables="none", gains=False))
    for name in ("expert", "other"):
        with torch.no_grad():
            for parameter in experts.add(name).parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        experts.seal(name)
    experts.calibrate("expert", text("low", 24, 0))
    experts.calibrate("other", text("high", 24, 0))
    return parts("routes.deciders").Learned(experts, None, {"low": "expert", "high": None})


def test_losses_are_those_of_whoever_was_chosen(parts: Any, learned: Any) -> None:
    deciders: ModuleType = parts("routes.deciders")
    windows = {domain: text(domain, 6, 1) for domain in DOMAINS}
    found = deciders.compared(learned, windows, (16, 64))
    assert found["right"]["n-grams"] == {"low": [1.0, 1.0], "high": [0.0, 0.0]}  # nobody is the base's
    for domain, who in (("low", "expert"), ("high", "other")):
        assert found["losses"]["n-grams"][domain] == found["single"][who][domain]
    for domain, right in learned.right.items():
        assert found["losses"]["oracle"][domain] == found["single"][str(right)][domain]
    # What is scored is what stands behind the prefix, and nothing else of the window.
    with torch.no_grad():
        logits = learned.experts.model(input_ids=windows["low"]).logits[:, 63:-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), windows["low"][:, 64:].flatten())
    assert found["losses"]["base"]["low"] == pytest.approx(expected.item() / 0.6931471805599453, rel=1e-5)


def test_arrow_of_peft_says_what_ours_says(parts: Any, learned: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    in_peft, deciders = parts("routes.in_peft"), parts("routes.deciders")
    windows = {"low": text("low", 3, 2)}
    adapters = in_peft.written(learned.experts, tmp_path)
    theirs = deciders.suffix_losses(in_peft.arrow(learned.experts, adapters, top_k=1), windows["low"])
    ours = deciders.by_tokens(learned.experts, windows)["low"]
    assert ours == pytest.approx(deciders.bits(theirs), rel=1e-4)


def test_the_gate_of_x_lora_learns_and_the_adapters_do_not(parts: Any, learned: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    in_peft = parts("routes.in_peft")
    before = {name: p.clone() for name, p in learned.experts.named_parameters()}
    rows = torch.cat([text(domain, 2, 3) for domain in DOMAINS])
    adapters = in_peft.written(learned.experts, tmp_path)
    gated, losses = in_peft.xlora(learned.experts, adapters, [rows] * 6, rate=0.01)
    assert losses[-1] < losses[0]
    taught = [name for name, parameter in gated.named_parameters() if parameter.requires_grad]
    assert len(taught) == 2 and all("classifier" in name for name in taught)
    assert all(torch.equal(before[name], p) for name, p in learned.experts.named_parameters())


# ---- what is new ---------------------------------------------------------------------------------


def test_auroc_counts_pairs(parts: Any) -> None:
    detectors = parts("routes.detectors")
    assert detectors.auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0])) == 1.0
    assert detectors.auroc(torch.tensor([1.0, 2.0]), torch.tensor([2.0])) == 0.75
    assert detectors.in_batches(torch.tensor([1.0, 3.0, 5.0]), 2).tolist() == [2.0]


def test_other_text_is_noticed_and_more_of_the_same_is_not(parts: Any) -> None:
    detectors = parts("routes.detectors")
    amount = detectors.Amount(rows=320, batches=6, trials=2)  # with less nothing is rare enough

    def rows(domain: str, count: int, seed: int) -> Any:
        ids = text(domain, count, seed)
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(count, 4, generator=generator) + (domain == "high") * 5
        return detectors.ReadRows(ids, ids, 5 + torch.randn(count, generator=generator).double(), features)

    background = detectors.FeatureGaussian(4)
    background.observe(3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(9)))
    background.seal()
    train = {domain: rows(domain, amount.rows, 3) for domain in DOMAINS}
    test = {domain: rows(domain, 96, 4) for domain in DOMAINS}
    (change,) = detectors.detected(detectors.Texts(train, test, background, 264), list(DOMAINS), amount)
    assert (change["known"], change["new"]) == (["low"], "high")
    together = change["scores"][detectors.TOGETHER]
    assert together["window"] == together["batch"] == 1.0
    assert together["delays"] == [3, 4] and (together["false"], together["quiet"]) == (0, 12)
    assert (
        change["scores"]["entropy"]["window"] == 0.5
    )  # one known domain leaves nothing to be undecided about


# ---- the tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vocabulary in the format of stories260K's."""
    spelled = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    joined = [" a", "ab", " ab", "bb", "ba", "bba"]
    letters = [" ", "a", "b", "\n", "é"]
    content = struct.pack("i", 8)
    for number, piece in enumerate([*spelled, *joined, *letters]):
        score = float(len(spelled) - number) if number >= len(spelled) else 0.0
        content += struct.pack("fi", score, len(piece.encode())) + piece.encode()
    path = tmp_path_factory.mktemp("pieces") / "tok.bin"
    path.write_bytes(content)
    return parts("peers.llama").Pieces(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.text(alphabet="ab \né—", min_size=1, max_size=12))
def test_the_tokenizer_of_a_foreign_model_is_its_own(parts: Any, pieces: Any, words: str) -> None:
    stories = parts("forgetting.stories")
    tokenizer, expected = stories.tokenizer_of(pieces), pieces(words)
    assert tokenizer(words)["input_ids"] == expected
    assert tokenizer.decode(expected) == words
    # A space is put before every text.
    assert int(stories.piece_bytes(pieces)[expected].sum()) == len(words.encode()) + 1
