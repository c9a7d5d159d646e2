"""The distribution that tokens are drawn from is that of transformers, and has true gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cambia.decoding.drawing import Drawing, Noise, history_of
from cambia.decoding.odds import RowParameters, kept, soft_nucleus, warped
from cambia.decoding.parameters import PRESETS, SPANS, DecodingParameters, Span
from cambia.errors import ConfigError

PARAMETERS = st.builds(
    DecodingParameters,
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.5),
    top_k=st.integers(0, 12),
    repetition_penalty=st.floats(0.5, 2),
)


def theirs(parameters: DecodingParameters) -> LogitsProcessorList:
    """The processors of transformers, in its order."""
    found: list = [RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty)]
    found.append(TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        found.append(TopKLogitsWarper(parameters.top_k))
    found += [TopPLogitsWarper(parameters.top_p), MinPLogitsWarper(parameters.min_p)]
    return LogitsProcessorList(found)


@given(st.lists(PARAMETERS, min_size=1, max_size=4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_rows_have_the_odds_of_transformers(rows: list[DecodingParameters], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(rows), 9, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 9, (len(rows), 4), generator=generator)
    mine = warped(logits, RowParameters.by_row(rows), history_of(ids, None, 9)).softmax(-1)
    for row, parameters in enumerate(rows):
        other = theirs(parameters)(ids[row, None], logits[row, None].clone()).softmax(-1)
        torch.testing.assert_close(mine[row, None], other, rtol=1e-6, atol=1e-9)


def test_penalties_count_what_was_written_and_no_padding() -> None:
    ids, mask = torch.tensor([[0, 0, 3]]), torch.tensor([[0, 0, 1]])
    drawing = Drawing(
        RowParameters(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), None, mask
    )
    logits = torch.ones(1, 5)
    assert drawing(ids, logits).tolist() == [[1.0, 1.0, 1.0, 0.5, 1.0]]
    drawing(torch.tensor([[0, 0, 3, 4]]), logits)
    last = drawing(torch.tensor([[0, 0, 3, 4, 4]]), logits)
    assert last.tolist() == [[1.0, 1.0, 1.0, 0.5, 0.5 - 0.5 - 2 * 0.25]]


def test_zero_temperature_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    rows = [DecodingParameters(temperature=0.0), DecodingParameters(temperature=2.0)]
    odds = warped(logits, RowParameters.by_row(rows)).softmax(-1)
    assert odds[0].tolist() == [0, 1, 0]
    torch.testing.assert_close(odds[1], (logits[1] / 2).softmax(-1))
    assert warped(logits, RowParameters.of(PRESETS["greedy"])).softmax(-1)[0].tolist() == [0, 1, 0]


def test_neutral_parameters_leave_logits_as_they_are() -> None:
    logits = torch.randn(3, 7)
    assert warped(logits, RowParameters.of(DecodingParameters())) is logits
    some = kept(logits[:2], RowParameters.by_row([DecodingParameters(), DecodingParameters(top_p=0.5)]))
    assert bool(some[0].all()) and not bool(some[1].all())


def test_what_is_drawn_has_the_odds() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    parameters = DecodingParameters(temperature=0.7, top_p=0.9)
    odds = warped(logits, RowParameters.of(parameters)).softmax(-1)[0]
    many = 20_000
    drawing = Drawing(RowParameters.of(parameters), Noise(seed=1))
    drawn = drawing(torch.zeros(many, 1, dtype=torch.long), logits.expand(many, -1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=4) / many
    assert (counts - odds).abs().max() < 4 * math.sqrt(0.25 / many)
    assert counts[odds == 0].sum() == 0


def test_rows_that_share_noise_draw_alike() -> None:
    logits = torch.randn(1, 50).expand(6, -1)
    shared = Drawing(RowParameters(), Noise(3, torch.tensor([0, 1, 0, 1, 0, 1])))
    drawn = shared(torch.zeros(6, 1, dtype=torch.long), logits).argmax(-1)
    assert drawn[0] == drawn[2] == drawn[4] and drawn[1] == drawn[3] == drawn[5]


@given(st.integers(0, 10**6), st.floats(0.2, 0.95))
@settings(max_examples=30, deadline=None)
def test_a_soft_nucleus_is_what_drawn_thresholds_give(seed: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    width = 0.5
    soft = soft_nucleus(logits, torch.tensor([top_p], dtype=torch.float64), width).exp()[0]
    assert abs(float(soft.sum()) - 1) < 1e-9
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # of the logistic distribution
    thresholds = torch.sigmoid(
        torch.logit(torch.tensor(top_p, dtype=torch.float64)) + width * torch.logit(places)
    )
    hard = warped(logits.expand(20_000, -1), RowParameters(top_p=thresholds)).softmax(-1).mean(0)
    torch.testing.assert_close(soft, hard, rtol=0, atol=2e-4)


def test_gradients_of_the_odds_are_those_of_finite_differences() -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64)
    top_p = torch.rand(2, 5, dtype=torch.float64) * 0.6 + 0.2

    def odds(temperature: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        return soft_nucleus(logits / temperature, threshold, 0.3).exp()

    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(odds, (temperature, top_p.requires_grad_()))
    seen = history_of(torch.randint(0, 11, (2, 4)), None, 11)
    seen.written.copy_(torch.randint(0, 3, (2, 11)))
    given = torch.tensor([0.7, 1.3, 0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def penalised(values: torch.Tensor) -> torch.Tensor:
        temperature, repetition, presence, frequency = values
        every = RowParameters(
            temperature=temperature,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        return warped(logits[:, 0], every, seen).log_softmax(-1)

    assert torch.autograd.gradcheck(penalised, given)


def test_entropy_rises_with_temperature() -> None:
    logits = torch.randn(1, 30)
    entropies = [
        float(Categorical(logits=warped(logits, RowParameters(temperature=t))).entropy())
        for t in (0.3, 0.8, 1.5)
    ]
    assert entropies == sorted(entropies)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"topp": 0.9}, "did you mean 'top_p'")],
)
def test_parameters_outside_their_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingParameters.of(values)


def test_spans_are_lines_between_their_ends() -> None:
    for span in SPANS.values():
        assert span.at(0) == span.low and span.at(1) == pytest.approx(span.high)
        assert span.place(span.at(0.37)) == pytest.approx(0.37)
        assert span.at(7) == pytest.approx(span.high)
    assert [Span(1, 100, log=True).at(x) for x in (0, 0.5, 1)] == pytest.approx([1, 10, 100])
