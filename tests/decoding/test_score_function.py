"""Gradients estimated from rewards are those of the expected reward, and find a known top."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cambia.decoding import DecodingParameters, DecodingPolicy, score_function
from cambia.decoding.score_function import ScoreFunction
from cambia.errors import ConfigError
from tests.decoding.test_policy import made

START = DecodingParameters(temperature=0.9, top_p=0.8, repetition_penalty=1.1)
PROMPT = torch.tensor([[5, 9, 4]])


def worth(rows: Tensor) -> Tensor:
    """Any function of two tokens."""
    return torch.sin(rows[:, -2].double() * 1.7) + torch.cos(rows[:, -1].double() * 0.9)


def learner(settings: ScoreFunction, policy: DecodingPolicy | None = None):
    model = made("llama")
    model.generation_config.eos_token_id = None
    return settings.learner(policy or DecodingPolicy(START), model, seed=1)


def test_the_estimate_agrees_with_finite_differences_of_the_expected_reward() -> None:
    """All 23 x 23 texts of two tokens, each with its probability, at parameters a little to either side."""
    one = learner(ScoreFunction(("temperature", "top_p", "repetition_penalty"), texts=2))
    every = torch.tensor([[*PROMPT[0].tolist(), *pair] for pair in itertools.product(range(23), repeat=2)])

    def expected() -> float:
        with torch.no_grad():
            chance = one._written_again(every, 3, torch.ones(len(every), 2))[0].exp()
        assert float(chance.sum()) == pytest.approx(1.0, abs=1e-6)
        return float((chance * worth(every)).sum())

    slopes = {}
    for name, raw in one.parameters.lines.items():
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                raw += sign * 1e-3
            found.append(expected())
            with torch.no_grad():
                raw -= sign * 1e-3
        slopes[name] = (found[0] - found[1]) / 2e-3
    estimates: dict[str, list[float]] = {name: [] for name in slopes}
    for _ in range(40):
        rows = one.write(PROMPT.expand(250, -1), 2)
        one.updates += 1  # so that the next noise is another
        one.optimizer.zero_grad()
        for part in one.losses(rows, worth(rows), 3):
            part.loss.backward()
        for name, raw in one.parameters.lines.items():
            estimates[name].append(-float(raw.grad))
    for name, slope in slopes.items():
        found = torch.tensor(estimates[name], dtype=torch.float64)
        error = float(found.std()) / len(found) ** 0.5
        assert abs(float(found.mean()) - slope) < 4 * error + 1e-4, name
        assert error < 0.1 * max(abs(each) for each in slopes.values()), "or the test says nothing"


def test_it_finds_a_known_top() -> None:
    """The likelier a token, the more it is worth: a low temperature writes nothing else."""
    one = learner(ScoreFunction(("temperature",), texts=8, rate=0.05), DecodingPolicy())
    logits = one.model(input_ids=PROMPT).logits[0, -1].detach()
    chances = (logits / 0.5).softmax(-1)

    def sure(rows: Tensor) -> Tensor:
        return chances[rows[:, -1]].double()

    rewards = [one.step(PROMPT.expand(32, -1), sure, new_tokens=1).reward for _ in range(40)]
    assert rewards[-1] > rewards[0]
    assert one.policy.parameters.temperature < 0.6


def test_a_head_for_each_token_learns_where_to_be_careful() -> None:
    """One reward at each of two prompts: to be sure behind one, and varied behind the other."""
    policy = DecodingPolicy.of(made("llama"), DecodingParameters(top_p=0.9), context=True)
    one = learner(ScoreFunction((), texts=8, rate=0.05), policy)
    prompts = torch.tensor([[5, 9, 4], [8, 12, 20]]).repeat(16, 1)
    likeliest = one.model(input_ids=prompts).logits[:, -1].argmax(-1).repeat_interleave(8)
    careful = (torch.arange(len(likeliest)) // 8) % 2 == 0

    def reward(rows: Tensor) -> Tensor:
        right = (rows[:, -1] == likeliest).double()
        return torch.where(careful, right, -right)

    for _ in range(40):
        one.step(prompts, reward, new_tokens=1)
    with torch.no_grad():
        states = one.model.model(input_ids=prompts[:2]).last_hidden_state[:, -1]
        temperature, top_p = one.policy.context(states, 1.0, 0.9)
    assert temperature[0] < 0.8 < 1.2 < temperature[1] or top_p[0] < top_p[1] - 0.1


def test_divergence_holds_it_back_and_it_goes_on_where_it_stopped() -> None:
    def reward(rows: Tensor) -> Tensor:
        return -rows[:, -1].double()

    free, held = (learner(ScoreFunction(("temperature",), divergence=cost)) for cost in (0.0, 100.0))
    moved = []
    for one in (free, held):
        for _ in range(12):
            update = one.step(PROMPT.expand(16, -1), reward, new_tokens=3)
        moved.append(update.divergence)
    assert moved[1] < 0.5 * moved[0]
    assert update.tokens == 16 * 4 * 3
    again = learner(ScoreFunction(("temperature",), divergence=100.0))
    again.load_state_dict(held.state_dict())
    for one in (held, again):
        one.step(PROMPT.expand(16, -1), reward, new_tokens=3)
    assert again.policy.parameters == held.policy.parameters


def test_what_cannot_be_learned_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k"):
        learner(ScoreFunction(("top_k",)))
    with pytest.raises(ConfigError, match="temperature above 0"):
        learner(ScoreFunction(), DecodingPolicy(DecodingParameters(temperature=0.0)))
    with pytest.raises(ConfigError, match="nothing is learned"):
        learner(ScoreFunction(()))
    with pytest.raises(ConfigError, match="not a number"):
        learner(ScoreFunction()).step(PROMPT, lambda rows: torch.full((len(rows),), torch.nan), new_tokens=2)


def test_more_rows_than_fit_are_learned_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ScoreFunction(("temperature", "top_p"), divergence=0.3, entropy=0.1)
    found = []
    for most in (score_function._MOST_ODDS, 1):
        monkeypatch.setattr(score_function, "_MOST_ODDS", most)
        one = learner(settings)
        step = one.step(PROMPT.expand(3, -1), worth, new_tokens=2)
        found.append((step, [line.item() for line in one.parameters.tensors()]))
    (whole, lines), (parts, again) = found
    assert again == pytest.approx(lines, abs=1e-6)
    assert (parts.divergence, parts.entropy) == pytest.approx((whole.divergence, whole.entropy))
    assert parts.reward == whole.reward and whole.entropy > 0


def test_a_bonus_for_entropy_warms() -> None:
    found = {}
    for entropy in (0.0, 5.0):
        one = learner(ScoreFunction(("temperature",), entropy=entropy))
        for _ in range(10):
            one.step(PROMPT.expand(4, -1), lambda rows: torch.zeros(len(rows)), new_tokens=2)
        found[entropy] = one.policy.parameters.temperature
    assert found[5.0] > found[0.0] + 0.1
    assert found[0.0] == pytest.approx(START.temperature)


def test_what_leaves_its_range_stays_at_the_edge_and_comes_back() -> None:
    one = learner(ScoreFunction(("temperature",), entropy=5.0, rate=1.0))
    for _ in range(6):
        one.step(PROMPT, lambda rows: torch.zeros(len(rows)), new_tokens=2)
    assert one.policy.parameters.temperature == pytest.approx(5.0)
    one.settings = ScoreFunction(("temperature",), entropy=-5.0, rate=1.0)
    for _ in range(30):
        one.step(PROMPT, lambda rows: torch.zeros(len(rows)), new_tokens=2)
    assert one.policy.parameters.temperature < 4.0
