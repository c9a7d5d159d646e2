"""The benchmark of operations to one loss: what it reads off curves, and that its arms are what they say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia import bench
from cambia.growth import grow
from cambia.growth.carry import OptimizerHolder
from cambia.growth.rewarm import SliceWarmup
from tests.conftest import tiny
from tests.laws.examples import loss_of, tokens


@pytest.fixture(scope="module", autouse=True)
def beside_the_benchmarks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(bench.FOLDER))
        yield


def curve(*points: tuple[float, float]) -> list[Any]:
    from compute.curves import Ended

    return [Ended(flops, bits, bits) for flops, bits in points]


@given(scale=st.floats(1.0, 50.0), power=st.floats(0.02, 0.5), share=st.floats(0.3, 1.4))
def test_operations_to_a_loss_are_read_off_a_power_law_exactly(scale, power, share):
    from compute.curves import saving, spent_to

    def bits(flops: float) -> float:
        return scale * flops**-power

    points = curve(*((f, bits(f)) for f in (5e12, 7e12, 1e13)))
    assert spent_to(points, bits(share * 1e13)) == pytest.approx(share * 1e13, rel=1e-9)
    assert saving(points, 0.5 * share * 1e13, bits(share * 1e13)) == pytest.approx(0.5)


def test_a_run_takes_what_its_steps_at_each_size_and_its_growths_take():
    from compute.clock import Pace
    from compute.curves import Ran

    pace = Pace(steps=(1.0, 2.0, 4.0), growths=(10.0, 20.0))
    tokens = {"seed": 0, "ends": (), "tokens": 3200}
    assert pace.seconds(Ran(**tokens, grown_at=()), 32) == 100
    assert pace.seconds(Ran(**tokens, grown_at=(0.5,)), 32) == pytest.approx(50 + 100 + 10)
    assert pace.seconds(Ran(**tokens, grown_at=(0.5, 0.5, 0.75)), 32) == pytest.approx(50 + 50 + 100 + 30)


def test_a_short_run_grows_as_often_as_the_long_one():
    from compute.arms import arms
    from compute.clock import STEPS, short
    from compute_to_loss import QUICK

    every = {arm: short(tree) for arm, tree in arms(QUICK, (3,)).items()}
    steps = {arm: tree["training.steps"] for arm, tree in every.items()}
    assert (steps["A"], steps["B-both"], steps["B-depth"], steps["G-efficiency"]) == (
        STEPS,
        3 * STEPS,
        3 * STEPS,
        3 * STEPS,
    )
    assert {rule["when"]["at_fractions"][0] for rule in every["B-width"]["growth.rules"]} == {0.5}
    *wide, deep = (rule["when"]["at_fractions"] for rule in every["B-both"]["growth.rules"])
    assert wide == [[1 / 3]] * 3 and deep == [2 / 3], "first wider, then deeper"


def test_a_run_that_is_worse_than_what_it_cost_has_saved_less_than_nothing():
    from compute.curves import saving, spent_to

    points = curve((5.0, 2.2), (10.0, 2.0))
    assert saving(points, 6.0, 2.3) < 0
    assert spent_to(curve((5.0, 2.0), (10.0, 2.1)), 2.05) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="two points"):
        spent_to(points[:1], 2.0)


def test_arms_cost_what_they_are_said_to():
    from compute.arms import arms
    from compute_to_loss import PRESETS

    for name, preset in PRESETS.items():
        if name == "gpu":
            continue
        sizes = preset.sizes
        every = arms(sizes, preset.fixed)
        assert set(preset.arms) <= set(every)
        spends = sizes.grown_share * sizes.steps * sizes.cost()
        for layers in preset.fixed:
            steps = every[f"D-{layers}"]["training.steps"]
            assert steps * sizes.cost(layers) == pytest.approx(1.25 * spends, rel=0.01)
            assert every[f"D-{layers}"]["evaluation.decayed_at"][-1] == pytest.approx(0.8)
        # E is as long as B-once is large, and its rate falls for as many steps.
        alone = every["E"]["training.steps"] * every["E"]["training.schedule.decay_fraction"]
        assert alone == pytest.approx(sizes.decay * sizes.steps, rel=0.01)


def test_the_control_forgets_and_warms_up_again_and_says_the_same():
    from compute.arms import Reborn

    model = tiny("cambia")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        loss_of(model, tokens(model, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    warmup = SliceWarmup(optimizer, steps=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    event = grow(
        model, Reborn(above=1), holders=[warmup, OptimizerHolder(optimizer)], check_batch=tokens(model)
    )
    assert event.logit_error == 0 and event.parameters_after == event.parameters_before
    born = {id(each.parameter) for each in warmup.newborns}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        again = ".layers.1." in name or ".layers.2." in name
        assert (id(parameter) in born) == again
        assert bool((optimizer.state[parameter]["exp_avg"] == 0).all()) == again


def test_the_readme_says_what_was_measured():
    from compute_to_loss import best_fixed, read, saved

    readme = (bench.FOLDER.parent / "README.md").read_text()
    for preset, length in (("choices", 7), ("middle", 14), ("long", 21)):
        found = read(json.loads((bench.FOLDER / f"compute_to_loss_{preset}.json").read_text()))
        large, best = (saved(found["B-depth"], found[arm]).told for arm in ("A", best_fixed(found)))
        assert f"| {length} | {large} | {best} |" in readme


@pytest.mark.slow
def test_all_arms_run_and_are_told(tmp_path, monkeypatch):
    import compute_to_loss as benchmark

    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(bench.FOLDER), prepend=":")
    text = [{"name": "t", "source": {"type": "generated", "task": "counting", "limit_bytes": 60_000}}]
    plain = benchmark.base
    monkeypatch.setattr(benchmark, "base", lambda *given: {**plain(*given), "data": {"tasks": text}})
    sizes = replace(benchmark.QUICK, tokens=60_000, hidden=32, ffn=48, layers=4, heads=2, kv_heads=2)
    preset = benchmark.Preset(
        sizes, arms=benchmark.EVERY, seeds=2, few=1, rates=(0.008,), fixed=(1, 2), scored_bytes=4000
    )
    tuning = benchmark.tuned("smoke", preset, tmp_path)
    found = benchmark.trained("smoke", preset, tmp_path, tuning["rates"])
    assert {arm: len(runs) for arm, runs in found.items() if len(runs) > 1}.keys() >= {"A", "B-depth"}
    every = benchmark.arms(sizes, preset.fixed)
    pace = benchmark.paces(benchmark.base(preset, tmp_path), {arm: every[arm] for arm in benchmark.EVERY})
    assert len(pace["B-depth"].steps) == 3 and len(pace["B-both"].growths) == 2 and not pace["A"].growths
    told = benchmark.markdown(
        {
            "name": "smoke",
            "preset": {"rates": [0.008], "sizes": asdict(sizes)},
            "tuning": tuning,
            "pace": {arm: each.as_dict() for arm, each in pace.items()},
            "arms": {arm: [one.as_dict() for one in runs] for arm, runs in found.items()},
        }
    )
    assert all(f"| {arm} |" in told for arm in benchmark.EVERY)
    assert benchmark.curves_figure(found).axes[0].get_lines()
