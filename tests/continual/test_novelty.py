"""The novelty detector on made-up scores: rows, streams, growth, and what a restart must not change."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cambia.config import build, dump
from cambia.continual.novelty import NOVELTY_SCORES, Decision, NoveltyDetector, Readings
from cambia.errors import ConfigError

HELD_OUT = 400


def rows(
    kinds: Sequence[int | None], known: int, generator: torch.Generator, *, apart: float = 8.0
) -> Readings:
    """Windows of known domains, by number, or of something new (None), as readings.

    A window is `apart` nats stranger to a domain that is not its own, and some are hard for everybody.
    """
    num = len(kinds)
    hard = torch.randn(num, 1, generator=generator)
    own = torch.tensor([-1 if kind is None else kind for kind in kinds])[:, None] == torch.arange(known)
    noise = torch.randn(2, num, known, generator=generator)
    return Readings(
        domains=tuple(f"d{i}" for i in range(known)),
        losses=hard + 0.3 * noise[0] + apart * ~own,
        base_losses=hard[:, 0],
        densities=noise[1] - apart * ~own,
        background=torch.zeros(num),
        cosines=0.9 + 0.01 * noise[0] - 0.5 * ~own,
    )


def detector_of(known: int, seed: int = 0, **settings: Any) -> NoveltyDetector:
    generator = torch.Generator().manual_seed(1000 + seed)
    detector = NoveltyDetector(**settings)
    for kind in range(known):
        detector.remember(f"d{kind}", rows([kind] * HELD_OUT, known, generator))
    return detector


def stream(
    detector: NoveltyDetector, batches: Sequence[Sequence[int | None]], seed: int = 0, apart: float = 8.0
) -> list[Decision]:
    generator = torch.Generator().manual_seed(seed)
    known = len(detector.domains)
    return [detector.observe(detector.judge(rows(kinds, known, generator, apart=apart))) for kinds in batches]


# ---- rows ----------------------------------------------------------------------------------------


def test_each_row_is_told_apart() -> None:
    detector = detector_of(2)
    verdict = detector.judge(rows([0, 1, None, 0, None], 2, torch.Generator().manual_seed(1)))
    assert verdict.novel.tolist() == [False, False, True, False, True]
    assert verdict.nearest == ["d0", "d1", None, "d0", None]
    assert (verdict.p_value[verdict.novel] < 0.01).all()
    assert (verdict.scores[verdict.novel] > 5).all()


def test_without_known_domains_everything_is_novel() -> None:
    detector = NoveltyDetector()
    verdict = detector.judge(rows([None] * 4, 0, torch.Generator().manual_seed(1)))
    assert verdict.novel.all()
    assert verdict.nearest == [None] * 4
    assert not verdict.p_value.any()
    decisions = stream(detector, [[None] * 16] * 8)
    assert decisions[-1].reason == "novel: 128 of the last 128 windows are strange to everything"


def test_a_young_domain_rejects_nothing() -> None:
    """Nobody can be strange to what is hardly known: p-values are never below one in the windows."""
    detector = NoveltyDetector()
    detector.remember("d0", rows([0] * 30, 1, torch.Generator().manual_seed(1)))
    verdict = detector.judge(rows([None] * 16, 1, torch.Generator().manual_seed(2)))
    assert not verdict.novel.any()
    assert verdict.nearest == ["d0"] * 16


@pytest.mark.parametrize("count", [10, 30, 100])
def test_a_little_text_that_is_learned_is_enough_to_find_others_strange(count: int) -> None:
    """Nothing lies beyond the last of few windows by rank; by how far it lies, it does."""
    detector = NoveltyDetector()
    detector.remember("d0", rows([0] * count, 1, torch.Generator().manual_seed(1)))
    detector.complete("d0")
    others = detector.judge(rows([None] * 16, 1, torch.Generator().manual_seed(2), apart=30.0))
    assert others.novel.all()
    own = detector.judge(rows([0] * 400, 1, torch.Generator().manual_seed(3)))
    assert own.novel.double().mean() <= 0.02
    again = NoveltyDetector()
    again.load_state_dict(through_a_file(detector.state_dict()))
    assert again.judge(rows([None] * 16, 1, torch.Generator().manual_seed(2), apart=30.0)).novel.all()


@pytest.mark.parametrize("score", list(NOVELTY_SCORES))
def test_every_score_gives_a_number_for_each_row_and_domain(score: str) -> None:
    detector = detector_of(3, scores=[score])
    verdict = detector.judge(rows([0, None], 3, torch.Generator().manual_seed(1)))
    assert verdict.strangeness.shape == (2, 3)
    assert verdict.strangeness.isfinite().all()


@pytest.mark.parametrize("score", ["likelihood", "ratio", "mahalanobis", "cosine"])
def test_a_far_window_is_strange_by_every_score_but_entropy(score: str) -> None:
    detector = detector_of(3, scores=[score])
    verdict = detector.judge(rows([0, 1, 2, None], 3, torch.Generator().manual_seed(1)))
    assert verdict.novel.tolist() == [False, False, False, True]


def test_a_score_that_its_readings_lack_is_named() -> None:
    detector = NoveltyDetector(scores=["ratio"])
    with pytest.raises(ConfigError, match="base_losses="):
        detector.remember("d0", Readings(("d0",), losses=torch.zeros(2, 1)))


def mine(readings: Readings) -> Tensor:
    return readings.losses if readings.losses is not None else torch.zeros(0)


def test_a_score_of_ones_own() -> None:
    detector = detector_of(2, scores=[f"{__name__}:mine"])
    same = detector_of(2, scores=["likelihood"])
    readings = rows([0, None], 2, torch.Generator().manual_seed(1))
    assert torch.equal(detector.judge(readings).scores, same.judge(readings).scores)


def test_the_order_of_domains_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    readings = rows([0, 1, None, 2], 3, generator)
    turned = Readings(
        readings.domains[::-1],
        **{name: value.flip(1) if value.dim() == 2 else value for name, value in vars_of(readings).items()},
    )
    detector = detector_of(3)
    here, there = detector.judge(readings), detector.judge(turned)
    assert here.nearest == there.nearest
    assert torch.equal(here.p_value, there.p_value)


def vars_of(readings: Readings) -> dict[str, Tensor]:
    names = ("losses", "base_losses", "densities", "background", "cosines")
    return {name: getattr(readings, name) for name in names}


def test_readings_of_other_domains_are_refused() -> None:
    detector = detector_of(2)
    with pytest.raises(ConfigError, match=r"known are \['d0', 'd1'\]"):
        detector.judge(rows([0], 1, torch.Generator()))
    detector.forget("d1")
    assert detector.judge(rows([0], 1, torch.Generator())).nearest == ["d0"]


# ---- streams -------------------------------------------------------------------------------------

KNOWN = [0, 1] * 8
NEW = [None] * 16


@pytest.mark.parametrize("rule", ["martingale", "cusum"])
def test_a_new_domain_is_found_within_five_batches(rule: Any) -> None:
    detector = detector_of(2, rule=rule)
    decisions = stream(detector, [KNOWN] * 300 + [NEW] * 8)
    assert not any(decision.reason for decision in decisions[:300])
    found = next(i for i, decision in enumerate(decisions) if decision.reason)
    assert found - 300 < 6
    assert "strange to d0, d1" in (decisions[found].reason or "")


@pytest.mark.parametrize("rule", ["martingale", "cusum"])
def test_known_domains_in_any_order_are_no_news(rule: Any) -> None:
    """Changes between known domains, however sudden: a domain that comes back is not new."""
    detector = detector_of(2, rule=rule)
    pattern: list[Sequence[int | None]] = [[0] * 16] * 50 + [[1] * 16] * 50
    assert not any(decision.reason for decision in stream(detector, pattern * 5))


def test_a_domain_that_comes_bit_by_bit_is_found() -> None:
    mixed = [[0] * (16 - new) + [None] * new for new in range(17) for _ in range(10)]
    decisions = stream(detector_of(2), mixed)
    found = next(i for i, decision in enumerate(decisions) if decision.reason)
    assert 10 < found < 90


def test_a_short_burst_is_no_news_and_leaves_quarantine() -> None:
    decisions = stream(detector_of(2), [KNOWN] * 50 + [NEW] * 2 + [KNOWN] * 50)
    assert not any(decision.reason for decision in decisions)
    assert decisions[51].novel_windows >= 30
    assert decisions[-1].novel_windows == 0


def test_after_a_growth_there_is_a_cool_down() -> None:
    detector = detector_of(2, cooldown_windows=160)
    assert stream(detector, [NEW] * 8)[-1].reason
    detector.reset()
    decisions = stream(detector, [NEW] * 14)
    assert not any(decision.reason for decision in decisions[:9])
    assert decisions[-1].reason


@pytest.mark.parametrize(("rule", "stated"), [("martingale", 0.01), ("cusum", 200 * 16 / 1_600_000)])
def test_no_false_alarms_on_many_stationary_streams(rule: Any, stated: float) -> None:
    """Forty streams of 200 batches: the stated rate is so low that one alarm would be too many."""
    for seed in range(40):
        detector = detector_of(1, seed, rule=rule)
        readings = rows([0] * 3200, 1, torch.Generator().manual_seed(seed))
        verdict = detector.judge(readings)
        alarms = [
            detector.observe(verdict.rows(slice(first, first + 16))).reason for first in range(0, 3200, 16)
        ]
        assert not any(alarms), f"stream {seed}, stated {stated}"


def test_the_risk_of_the_held_out_windows_is_told() -> None:
    few, many = NoveltyDetector(), NoveltyDetector()
    few.remember("d0", rows([0] * 40, 1, torch.Generator()))
    many.remember("d0", rows([0] * 1000, 1, torch.Generator()))
    assert many.risk()["d0"] < 0.001 < few.risk()["d0"] <= 1


# ---- restart -------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 29), rule=st.sampled_from(["martingale", "cusum"]))
def test_it_goes_on_where_it_was_saved(cut: int, rule: Any) -> None:
    batches = [KNOWN] * 10 + [[0] * 12 + [None] * 4] * 10 + [NEW] * 10
    detector, again = detector_of(2, rule=rule), NoveltyDetector(rule=rule)
    generator = torch.Generator().manual_seed(5)
    for at, kinds in enumerate(batches):
        if at == cut:
            again.load_state_dict(through_a_file(detector.state_dict()))
        readings = rows(kinds, 2, generator)
        decision = detector.observe(detector.judge(readings))
        if at >= cut:
            assert again.observe(again.judge(readings)) == decision
        if decision.reason:
            detector.reset()
            if at >= cut:
                again.reset()


def test_its_settings_are_plain_values() -> None:
    detector = build(NoveltyDetector, {"rule": "cusum", "levels": [0.05], "run_length_windows": 10_000})
    assert build(NoveltyDetector, dump(detector)) == detector


@pytest.mark.parametrize("settings", [{"scores": []}, {"levels": []}, {"levels": [0.0]}])
def test_nonsense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least one of each"):
        NoveltyDetector(**settings)


def test_an_unknown_score_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'likelihood'"):
        NoveltyDetector(scores=["likelyhood"])
