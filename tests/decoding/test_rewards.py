"""What every reward owes, and the match with what people write."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import FieldError, build, dump
from cambia.decoding.rewards import (
    REWARDS,
    DiversityReward,
    FunctionReward,
    LengthReward,
    MatchReward,
    PatternReward,
    Reward,
    Samples,
    Score,
    StyleReward,
    Total,
    mean_of,
    refuse_constant,
    total,
)
from cambia.errors import ConfigError, DataError
from tests.decoding.texts import LOOPS, MODEL, PEOPLE, Writer, material, samples_of

MATERIAL = material()


def begun(reward: Reward) -> Reward:
    reward.begin(MATERIAL)
    return reward


def share_of_a(prompt: str, text: str) -> float:
    return text.count("a") / max(1, len(text))


def all_lengths(prompts: list[str], texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def one_too_few(prompts: list[str], texts: list[str]) -> list[int]:
    return all_lengths(prompts, texts)[1:]


def not_a_number(prompt: str, text: str) -> float:
    return 1.0 if text else float("nan")


def nothing(prompt: str, text: str) -> None:
    return None


class Vowels(Reward):
    """Somebody's own."""

    def measure(self, samples: Samples) -> Score:
        return mean_of(torch.tensor([float(sum(map(text.count, "aeiou"))) for text in samples.texts]))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reward]:
    """One of each kind that needs no model, ready to score, and their sum."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n".join(Writer(3.0).write(60, seed=5).texts))
    kinds = {
        "match": MatchReward(),
        "match without features": MatchReward(mauve_share=0, order=3),
        "length": LengthReward(),
        "length in bytes": LengthReward(30, unit="bytes"),
        "diversity": DiversityReward(),
        "most diversity": DiversityReward(target="most"),
        "style": StyleReward(str(corpus)),
        "pattern": PatternReward("ab|ba"),
        "function": FunctionReward(f"{__name__}:share_of_a"),
        "functions": FunctionReward(f"{__name__}:all_lengths", together=True),
    }
    return {name: begun(reward) for name, reward in {**kinds, "total": total([*kinds.values()])}.items()}


some_rows = st.lists(st.lists(st.integers(0, 15), max_size=12), min_size=1, max_size=3)


@given(rows=some_rows, random=st.randoms(use_true_random=False))
def test_every_reward_is_a_mean_of_shares_in_any_order(
    every: dict[str, Reward], rows: list[list[int]], random: Random
) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    samples = samples_of(rows)
    for name, reward in every.items():
        score, mixed = reward.score(samples), reward.score(samples.chosen(order))
        assert score.each.shape == (len(samples),), name
        assert score.each.mean().item() == pytest.approx(score.value, abs=1e-8), name
        assert mixed.value == pytest.approx(score.value, abs=1e-8), name
        torch.testing.assert_close(mixed.each, score.each[order], rtol=1e-6, atol=1e-8)
        assert abs(score.value) < 500, name
        if score.parts:
            assert sum(score.parts.values()) == pytest.approx(score.value, abs=1e-8), name


@pytest.mark.parametrize("number", [24, 200])
@pytest.mark.parametrize("kind", [MatchReward, DiversityReward])
def test_people_score_one_and_the_plain_model_zero_at_any_number(kind: type[Reward], number: int) -> None:
    reward = begun(kind())

    def mean(writer: Writer) -> float:
        return float(np.mean([reward.score(writer.write(number, seed=seed)).value for seed in range(10, 14)]))

    assert mean(PEOPLE) == pytest.approx(1, abs=0.25)
    # People and model repeat themselves too little for a scale of its own: there the model has more than 0.
    assert mean(MODEL) == pytest.approx(0, abs=0.35 if kind is MatchReward else 0.4)
    assert mean(LOOPS) < -1


def test_what_a_model_finds_likeliest_matches_least() -> None:
    """The known collapse: by the model's own likelihood the best text is a loop."""
    reward = begun(MatchReward())
    texts = [PEOPLE.write(64, seed=3), MODEL.write(64, seed=3), LOOPS.write(64, seed=3)]
    surprise = [MODEL.nats_per_letter(each) for each in texts]
    match = [reward.score(each).value for each in texts]
    assert np.argmin(surprise) == 2
    assert np.argmin(match) == 2 and np.argmax(match) == 0
    assert reward.score(texts[2]).parts["repetition"] < -0.5
    assert reward.score(texts[0]).parts["repetition"] > -0.02


def test_shares_are_what_one_more_of_a_kind_would_change() -> None:
    reward = MatchReward(mauve_share=0.5, repetition_tokens=2)
    reward.begin(MATERIAL)
    odd = [[], [3], [5, 5, 5, 5, 5, 5, 5], *LOOPS.write(4, seed=7).tokens]
    samples = samples_of([*MODEL.write(20, seed=7).tokens, *odd])
    number, score, parts = len(samples), reward.score(samples), reward.weighed(samples)
    for place in range(number):
        step = torch.zeros(number, dtype=torch.float64)
        step[place] = 1e-5
        up, down = (sum(parts(1 + sign * step).values(), torch.zeros(())) for sign in (1, -1))
        slope = number * (up - down).item() / 2e-5
        assert score.each[place].item() == pytest.approx(score.value + slope, rel=1e-4, abs=1e-5)
    assert score.each.std() > 0.1


def test_the_same_material_gives_the_same_reward() -> None:
    samples = MODEL.write(16, seed=8)
    first, second = (begun(MatchReward()).score(samples) for _ in range(2))
    assert first.parts == second.parts and torch.equal(first.each, second.each)


# ---- sums, settings, one's own -------------------------------------------------------------------


def test_a_sum_shows_its_parts() -> None:
    rewards: list[dict[str, Any]] = [
        {"type": "match", "mauve_share": 0.25},
        {"type": "length", "target": 20, "weight": 0.1},
        {"type": "length", "target": 40, "unit": "bytes"},
        {"type": f"{__name__}:Vowels", "weight": 2},
    ]
    reward = build(Total, {"rewards": rewards})
    assert [each["type"] for each in dump(reward)["rewards"]] == [each["type"] for each in rewards]
    assert build(Total, dump(reward)) == reward
    samples = MODEL.write(12, seed=9)
    score = begun(reward).score(samples)
    names = ["match.n_grams", "match.mauve", "match.repetition", "length", "length_2", "Vowels"]
    assert list(score.parts) == names
    assert score.parts["length"] == pytest.approx(0.1 * LengthReward(20).score(samples).value)
    assert score.parts["Vowels"] == pytest.approx(2 * Vowels().score(samples).value)


def test_an_unknown_reward_is_named() -> None:
    assert {home.partition(":")[2] for home in REWARDS.values()} == {
        f"{name.title()}Reward" for name in REWARDS
    }
    with pytest.raises(FieldError, match=r"rewards\.0\.type: 'matsch' is no reward; did you mean 'match'"):
        build(Total, {"rewards": [{"type": "matsch"}]})


def test_style_is_one_for_the_corpus_and_zero_for_people(every: dict[str, Reward]) -> None:
    own, general = Writer(3.0).write(64, seed=20), PEOPLE.write(64, seed=21)
    assert every["style"].score(own).value == pytest.approx(1, abs=0.25)
    assert every["style"].score(general).value == pytest.approx(0, abs=0.25)


# ---- bad input -----------------------------------------------------------------------------------


def test_a_reward_that_is_always_the_same_is_refused() -> None:
    sets = [writer.write(8, seed=1) for writer in (PEOPLE, MODEL, LOOPS)]
    never, length = PatternReward("never"), LengthReward(40)
    with pytest.raises(ConfigError, match="the reward is 0 for all of 3 sets"):
        refuse_constant([never.score(samples) for samples in sets])
    with pytest.raises(ConfigError, match="pattern 0, length 1"):
        refuse_constant([total([never, length]).score(samples) for samples in sets])
    refuse_constant([PatternReward("aa").score(samples) for samples in sets])
    refuse_constant([never.score(sets[0])])


def test_a_reward_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="gave nan for the continuation ''"):
        FunctionReward(f"{__name__}:not_a_number").score(samples_of([[1], []]))


ONE = samples_of([[1]])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: MatchReward().score(ONE), r"call begin\(material\) first"),
        (lambda: MatchReward().begin(material(4)), "calibrated on 4 of their texts; expected at least 8"),
        (lambda: MatchReward(mauve_share=2), "expected 0 to 1, or auto"),
        (lambda: PatternReward("("), "no regular expression"),
        (lambda: LengthReward(0), "expected at least 1, or human"),
        (lambda: FunctionReward("nowhere:f").score(ONE), "there is no module"),
        (lambda: FunctionReward(f"{__name__}:nothing").score(ONE), "returned no number"),
        (lambda: FunctionReward(f"{__name__}:one_too_few", together=True).score(ONE), "0 numbers for 1"),
        (lambda: total([]), "no rewards"),
        (lambda: samples_of([]), "as many of each"),
        (lambda: Samples(["a"], ["b", "c"], [[1]], ["d"]), "as many of each"),
    ],
)
def test_mistakes_are_named(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong()


def test_a_style_that_is_none_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "same.txt"
    corpus.write_text("\n\n".join(PEOPLE.write(60, seed=6).texts))
    with pytest.raises(ConfigError, match="cannot be told from what people write"):
        begun(StyleReward(str(corpus)))
    corpus.write_text("short")
    with pytest.raises(DataError, match="give more text"):
        begun(StyleReward(str(corpus)))
