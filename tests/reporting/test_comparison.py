"""Runs side by side: read at equal places, marked where they must not be compared."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cambia import files
from cambia.errors import RunError
from cambia.models.saved import STATE_JSON
from cambia.reporting import compare, load_for_comparison, load_run, print_comparison, write_comparison
from cambia.reporting.run import Run

Make = Callable[..., Run]


@pytest.fixture
def made(make_run: Callable[..., Path]) -> Make:
    """Writes a synthetic run and reads it."""
    return lambda *names, **settings: load_run(make_run(*names, **settings))


def test_losses_are_read_at_equal_places(made: Make) -> None:
    long = made("long", tasks=["english"], steps=400, growth_steps=(100,))
    short = made("short", tasks=["english"], steps=200, growth_steps=())
    comparison = compare([long, short])
    first, second = comparison.rows
    assert comparison.tokens == short.metrics["tokens"][-1]
    assert comparison.flops == short.metrics["flops"][-1]
    assert second.at_equal_tokens == second.end == second.at_equal_flops
    bits = long.metrics["validation_bits_per_byte"]
    assert first.at_equal_tokens.bits_per_byte == pytest.approx(bits[199])
    assert first.end.bits_per_byte == pytest.approx(bits[399])
    # The larger one spends more on a token, so at equal operations it has seen less, and knows less.
    assert first.at_equal_flops.bits_per_byte > first.at_equal_tokens.bits_per_byte
    assert second.end.decayed and first.end.decayed
    assert not first.at_equal_tokens.decayed and not first.at_equal_flops.decayed


def test_sizes_that_two_runs_had_are_compared(made: Make) -> None:
    grown = made("grown", tasks=["english"], steps=200, growth_steps=(100,))
    small = made("small", tasks=["english"], steps=200, growth_steps=())
    comparison = compare([grown, small])
    assert comparison.sizes == [1_049_216]
    reading, tokens = comparison.rows[0].by_parameters[1_049_216]
    assert tokens == 99 * 16 * 256
    assert reading.bits_per_byte > comparison.rows[1].by_parameters[1_049_216][0].bits_per_byte


def test_what_happened_around_growth(made: Make) -> None:
    run = made("grown", tasks=["english"], steps=200, growth_steps=(100,), exactness=("none",))
    (event,) = compare([run, run]).rows[0].stability
    loss, norm = run.metrics["loss"], run.metrics["grad_norm"]
    assert event.step == 100 and event.jump == pytest.approx(0.21)
    assert event.loss_change == pytest.approx(loss[100:130].mean() - loss[70:100].mean())
    assert event.norm_ratio == pytest.approx(norm[100:130].max() / np.median(norm[70:100]))


def test_a_run_is_compared_with_its_own_checkpoint(made: Make) -> None:
    run = made("one", tasks=["english"], steps=200, growth_steps=(50, 150))
    folder = run.folder / "ckpt_step100"
    folder.mkdir()
    files.write_json(folder / "config.json", {"model_type": "cambia"})  # a model's, and no run's
    files.write_json(folder / STATE_JSON, {"progress": {"step": 100}})
    early = load_for_comparison(folder)
    assert early.name == "one/ckpt_step100"
    assert (early.steps, len(early.growth)) == (100, 1)
    first, second = compare([early, load_for_comparison(run.folder)]).rows
    assert first.tokens == 100 * 16 * 256 < second.tokens
    with pytest.raises(RunError, match=r"has no checkpoint 'ckpt_step7'; it has none"):
        load_for_comparison(run.folder / "ckpt_step7")
    with pytest.raises(RunError, match="there is no run"):
        load_for_comparison("nowhere")


def test_what_cannot_be_compared_is_refused(made: Make) -> None:
    run = made("one")
    with pytest.raises(RunError, match="at least two runs"):
        compare([run])
    with pytest.raises(RunError, match="'blind' measured no validation loss"):
        compare([run, made("blind", validation_every=None)])


def test_tables_and_page_say_the_same(made: Make, tmp_path: Path) -> None:
    runs = [
        made("grown <b>", tasks=["english"], steps=200, growth_steps=(100,)),
        made("small", tasks=["english"], steps=100, growth_steps=()),
    ]
    comparison = compare(runs)
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    told = console.export_text()
    assert "not to be compared" in told and "At equal parameters" in told and "Around growth" in told
    page = write_comparison(comparison, tmp_path / "comparison.html").read_text()
    assert "grown &lt;b&gt;" in page and "<b>" not in page.replace("</b>", "").split("<svg")[0]
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    for row in comparison.rows:
        assert f"{row.end.bits_per_byte:.4f}" in told and f"{row.end.bits_per_byte:.4f}" in page


def test_a_place_before_the_first_measurement_is_not_measured(made: Make) -> None:
    late = made("late", tasks=["english"], steps=200, validation_every=150, growth_steps=())
    short = made("short", tasks=["english"], steps=50, growth_steps=())
    reading = compare([late, short]).rows[0].at_equal_tokens
    assert math.isnan(reading.bits_per_byte)
