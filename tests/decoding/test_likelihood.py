"""A fit finds the parameters that a text was written with, and weights that make it likelier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from cambia.decoding import DecodingParameters, DecodingPolicy
from cambia.decoding.likelihood import LikelihoodFit, Text, mean_loss, past_of, token_losses
from cambia.decoding.odds import History, RowParameters, warped
from cambia.errors import ConfigError, DataError
from tests.decoding.test_policy import made

EARLY, LATE = torch.arange(300), torch.arange(300, 400)


def written(parameters: DecodingParameters, rows: int = 400) -> Tensor:
    """Text of a model with known parameters: the best that a fit can find."""
    model = made("llama")
    model.generation_config.eos_token_id = None
    first = torch.arange(3, 23).repeat(rows // 20)[:, None]
    return DecodingPolicy(parameters).generate(model, first, max_new_tokens=15, seed=4)


def test_it_finds_what_text_was_written_with() -> None:
    known = DecodingParameters(temperature=0.6, repetition_penalty=1.4, frequency_penalty=0.3)
    rows = Text(written(known))
    fit = LikelihoodFit(
        ("temperature", "repetition_penalty", "frequency_penalty"), steps=250, batch_size=64, rate=0.03
    )
    found = fit.run(DecodingPolicy(), made("llama"), rows.chosen(EARLY), rows.chosen(LATE))
    assert found.policy.parameters.temperature == pytest.approx(0.6, abs=0.04)
    assert found.policy.parameters.repetition_penalty == pytest.approx(1.4, abs=0.15)
    assert found.policy.parameters.frequency_penalty == pytest.approx(0.3, abs=0.1)
    assert found.after < found.before - 0.05
    assert found.after <= mean_loss(DecodingPolicy(known), made("llama"), rows.chosen(LATE)) + 0.01


@pytest.mark.parametrize("family", ["native", "gpt2"])
def test_weights_of_a_damaged_model_are_put_right(family: str) -> None:
    model = made(family)
    model.generation_config.eos_token_id = None
    rows = Text(DecodingPolicy().generate(model, torch.arange(3, 23).repeat(10)[:, None], max_new_tokens=15))
    some, held = rows.chosen(torch.arange(150)), rows.chosen(torch.arange(150, 200))
    damaged = DecodingPolicy.of(model, layers=True, heads=True)
    assert damaged.layer_weights is not None and damaged.head_weights is not None
    damaged.layer_weights[1] = 0.8
    damaged.head_weights[0][0] = 0.2
    before = copy.deepcopy(damaged)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    found = LikelihoodFit((), steps=80, batch_size=64, rate=0.03).run(damaged, model, some, held)
    assert found.after < found.before - 0.5 * (found.before - mean_loss(DecodingPolicy(), model, held))
    assert torch.equal(damaged.layer_weights, before.layer_weights), "what is given stays as it is"
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_past_of_each_token_is_what_writing_sees() -> None:
    ids = torch.tensor([[4, 4, 7, 4, 2]])
    past = past_of(ids, 8)
    assert past.seen[0, :, 4].tolist() == [True] * 4 and past.seen[0, :, 7].tolist() == [
        False,
        False,
        True,
        True,
    ]
    assert past.written[0, :, 4].tolist() == [0, 1, 1, 2], "the first is a prompt"
    logits = torch.randn(1, 4, 8)
    given = RowParameters(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3)
    losses = token_losses(logits, ids, given)
    last = warped(logits[:, 3], given, History(past.seen[:, 3], past.written[:, 3]))
    torch.testing.assert_close(losses[0, 3], -last.log_softmax(-1)[0, 2])


def test_what_has_no_likelihood_is_refused() -> None:
    model, rows = made("llama"), Text(torch.zeros(4, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match="top_p"):
        LikelihoodFit(("top_p",)).run(DecodingPolicy(), model, rows, rows)
    with pytest.raises(ConfigError, match="impossible"):
        LikelihoodFit().run(DecodingPolicy(DecodingParameters(top_p=0.9)), model, rows, rows)
    with pytest.raises(ConfigError, match="nothing is learned"):
        LikelihoodFit(()).run(DecodingPolicy(), model, rows, rows)
    with pytest.raises(DataError, match="longer text"):
        LikelihoodFit().run(DecodingPolicy(), model, rows.chosen(torch.arange(0)), rows)
