"""The known collapse, with a model that somebody trained: its own likelihood asks for loops."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cambia.decoding.rewards import MatchReward, Material, Samples

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROMPT, LENGTH = 16, 40


@torch.no_grad()
def written(model: nn.Module, prompts: Tensor, temperature: float) -> Tensor:
    """(N, LENGTH) tokens behind prompts (N, T)."""
    generator = torch.Generator().manual_seed(0)
    token, past, rows = prompts, None, []
    for _ in range(LENGTH):
        outputs = model(input_ids=token, past_key_values=past, use_cache=True)
        past, logits = outputs.past_key_values, outputs.logits[:, -1]
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        rows.append(token)
    return torch.cat(rows, 1)


@torch.no_grad()
def nats(model: nn.Module, prompts: Tensor, rows: Tensor) -> float:
    odds = model(input_ids=torch.cat([prompts, rows], 1)).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    return -odds.gather(-1, rows[..., None]).mean().item()


@pytest.mark.slow
@pytest.mark.skipif("CAMBIA_DATA" not in os.environ, reason="CAMBIA_DATA is not set: no stories260K")
def test_self_judged_likelihood_asks_for_loops_and_the_match_refuses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from forgetting.stories import tokenizer_of
    from peers.llama import BEGIN, Pieces, stories

    folder = Path(os.environ["CAMBIA_DATA"]) / "stories260K"
    model, tokenizer = stories(folder).eval(), tokenizer_of(Pieces(folder / "tok512.bin"))
    text = gzip.decompress((folder / "tinystories_sample.txt.gz").read_bytes()).decode()[:60_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // (PROMPT + LENGTH) * (PROMPT + LENGTH)].view(-1, PROMPT + LENGTH)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    prompts = torch.cat([torch.full((len(windows), 1), BEGIN), windows[:, :PROMPT]], 1)
    human = windows[:, PROMPT:]
    calibrated, scored = slice(0, 160), slice(160, 224)

    def samples(rows: Tensor, of: slice) -> Samples:
        texts = [str(tokenizer.decode(row)) for row in rows.tolist()]
        return Samples([str(row) for row in prompts[of].tolist()], texts, rows.tolist(), texts)

    plain = samples(written(model, prompts[calibrated], 1.0), calibrated)
    reward = MatchReward(mauve_share=0)
    reward.begin(Material(samples(human[calibrated], calibrated), plain, lambda texts: torch.zeros(0)))
    kinds = {"people": human[scored], **{t: written(model, prompts[scored], t) for t in (1.0, 0.8, 0.0)}}
    surprise = {kind: nats(model, prompts[scored], rows) for kind, rows in kinds.items()}
    match = {kind: reward.score(samples(rows, scored)) for kind, rows in kinds.items()}
    assert min(surprise, key=surprise.__getitem__) == 0.0
    values = {kind: score.value for kind, score in match.items()}
    assert min(values, key=values.__getitem__) == 0.0 and values[0.0] < -2
    assert max(values, key=values.__getitem__) == "people"
    assert np.isclose(values["people"], 1, atol=0.4) and np.isclose(values[1.0], 0, atol=0.4)
    assert match[0.0].parts["repetition"] < -0.2
    assert match[1.0].parts["repetition"] > -0.02
