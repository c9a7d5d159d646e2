"""Fluency under a frozen reference: nats per byte, whatever its tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cambia.data.tokenizers import BytesTokenizer, Tokenizer, build_tokenizer
from cambia.decoding.rewards import FluencyReward, Material, Samples
from cambia.decoding.rewards.fluency import nats_per_byte
from cambia.errors import CheckpointError, ConfigError
from tests.conftest import tiny

TOKENIZER = build_tokenizer(BytesTokenizer())


def by_hand(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, text: str) -> float:
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt + text).tolist()]
    with torch.no_grad():
        odds = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    first = 1 + len(tokenizer.encode(prompt))
    nats = -sum(odds[place - 1, ids[place]].item() for place in range(first, len(ids)))
    return nats / len(text.encode())


def test_nats_per_byte_of_what_stands_behind_the_prompt() -> None:
    model = tiny(vocab_size=257)
    prompts, texts = ["a tree", "", "ab" * 60, "x"], [" grows", "né", "rest", ""]
    found = nats_per_byte(model, TOKENIZER, prompts, texts).tolist()
    for place in (0, 1):
        assert found[place] == pytest.approx(
            by_hand(model, TOKENIZER, prompts[place], texts[place]), rel=1e-4
        )
    assert math.isfinite(found[2])  # the prompt is longer than the model reads
    assert found[3] == math.log(256)
    assert math.isfinite(nats_per_byte(model, TOKENIZER, ["ab"], ["c" * 100]).item())


def samples(texts: list[str]) -> Samples:
    return Samples(["a"] * len(texts), texts, [list(text.encode()) for text in texts], texts)


def test_people_score_one_and_what_is_too_likely_or_too_strange_less(tmp_path: Path) -> None:
    model = tiny(vocab_size=257)
    model.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(97, 123, (60, 20), generator=generator)
    strange = ["".join(map(chr, row)) for row in drawn.tolist()]
    order = sorted(strange, key=lambda text: nats_per_byte(model, TOKENIZER, ["a"], [text]).item())
    likely, human, unlikely = (samples(sorted(order[i : i + 20])) for i in (0, 20, 40))
    reward = FluencyReward(str(tmp_path))
    with pytest.raises(ConfigError, match="call begin"):
        reward.score(human)
    reward.begin(Material(human, unlikely, lambda texts: torch.zeros(len(texts), 1)))
    values = [reward.score(each).value for each in (human, unlikely, likely)]
    assert values[0] == pytest.approx(1, abs=0.3) and values[1] == pytest.approx(0, abs=0.3)
    assert values[2] < 0.5
    lowest = FluencyReward(str(tmp_path), target="lowest")
    lowest.begin(Material(human, unlikely, lambda texts: torch.zeros(len(texts), 1)))
    values = [lowest.score(each).value for each in (human, unlikely, likely)]
    assert values[2] > values[0] > values[1]


def test_a_reference_that_is_not_there_is_named(tmp_path: Path) -> None:
    reward = FluencyReward(str(tmp_path))
    nobody = samples(["a"])
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        reward.begin(Material(nobody, nobody, lambda texts: torch.zeros(len(texts), 1)))
