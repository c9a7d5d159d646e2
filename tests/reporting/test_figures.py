from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cambia.reporting
from cambia import rundir
from cambia.reporting import load_run
from cambia.reporting.curves import corners, smoothed, thinned
from cambia.reporting.drawing import COLORS, to_svg
from cambia.reporting.figures import FIGURES, jump_figure, loss_figure, task_labels

Make = Callable[..., Path]
FOLDER = Path(cambia.reporting.__file__).parent
DRAWN = {"decoding_figures", "drawing", "labels", "figures", "task_figures", "stream_figures"}


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_stands_inside_a_page(make_run: Make, name: str) -> None:
    figure = FIGURES[name](load_run(make_run(steps=50, growth_steps=(30, 80))))
    assert figure is not None
    svg = to_svg(figure, name, 'a "title"')
    assert svg.startswith("<svg viewBox=")
    assert 'aria-label="a &quot;title&quot;"' in svg
    assert "http" not in svg
    assert "xlink" not in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert all(found.startswith(f"{name}-") for found in ids)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    assert all(first or second in ids for first, second in used)


@pytest.mark.parametrize("name", FIGURES)
def test_every_color_follows_the_theme(make_run: Make, name: str) -> None:
    figure = FIGURES[name](load_run(make_run(steps=50, growth_steps=(30, 80))))
    assert figure is not None
    svg = to_svg(figure, name, name)
    assert not re.search(r"#[0-9a-f]{6}", svg)
    css = resources.files("cambia.reporting").joinpath("report.css").read_text()
    light, dark, paper = (block.split("}")[0] for block in css.split(":root {")[1:])
    for variable in set(re.findall(r"var\(--([a-z-]+)\)", svg)) | COLORS.keys():
        assert all(f"--{variable}: #" in block for block in (light, dark, paper))
    # The light page shows what a saved figure shows.
    assert all(f"--{variable}: {color};" in light for variable, color in COLORS.items())


def test_equal_runs_give_equal_pictures(make_run: Make) -> None:
    run = load_run(make_run(steps=20))
    first, second = (loss_figure(run) for _ in range(2))
    assert first is not None
    assert second is not None
    assert to_svg(first, "loss", "x") == to_svg(second, "loss", "x")


def test_nothing_logged_gives_no_picture(make_run: Make) -> None:
    run = load_run(make_run(stop_at=0, summary=None))
    assert [draw(run) for draw in FIGURES.values()] == [None] * 4


def test_the_jump_axis_never_magnifies_rounding(make_run: Make) -> None:
    figure = jump_figure(load_run(make_run(steps=50, growth_steps=(30,))))
    assert figure is not None
    low, high = figure.axes[0].get_xlim()
    assert high - low >= 0.1
    assert "jump +2.4e-07" in [text.get_text() for text in figure.axes[0].texts]


def test_a_spike_is_cut_off_and_said(make_run: Make) -> None:
    folder = make_run(tasks=["only"], steps=60, growth_steps=())
    text = (folder / rundir.METRICS).read_text().splitlines()
    cells = text[40].split(",")
    text[40] = ",".join([*cells[:4], "25000.0", *cells[5:]])
    (folder / rundir.METRICS).write_text("\n".join(text) + "\n")
    figure = loss_figure(load_run(folder))
    assert figure is not None
    assert figure.axes[0].get_ylim()[1] < 10
    assert "each logged step (1 above the axis)" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]


def test_names_that_do_not_fit_become_numbers(make_run: Make) -> None:
    short = load_run(make_run("short", steps=5))
    long = load_run(
        make_run("long", steps=5, tasks=["a name that is long indeed, number " + c for c in "abc"])
    )
    assert task_labels(short) == ["english", "python", "legal"]
    assert task_labels(long) == ["1", "2", "3"]


def test_labels_do_not_overlap(make_run: Make) -> None:
    # Growth events at neighboring steps share a label, and tasks stand side by side.
    run = load_run(make_run(steps=100, growth_steps=(100, 102, 105, 180, 299)))
    figure = loss_figure(run)
    assert figure is not None
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == ["english", "python", "legal", "1-3", "4", "5"]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_only_figures_import_matplotlib_and_only_pages_import_figures() -> None:
    importers: dict[str, set[str]] = {"matplotlib": set(), "figures": set()}
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert "pyplot" not in name
                own = name.startswith("cambia.reporting") and name.rpartition(".")[2] in DRAWN
                for wanted in ["matplotlib"] * name.startswith("matplotlib") + ["figures"] * own:
                    importers[wanted].add(path.relative_to(FOLDER).as_posix())
    figures = {
        "decoding_figures.py",
        "drawing.py",
        "labels.py",
        "figures.py",
        "stream_figures.py",
        "task_figures.py",
        "sweeps/figures.py",
    }
    pages = {"page.py", "side_by_side.py", "sweeps/page.py", "sweeps/comparison.py"}
    pages.add("__init__.py")  # for type checkers alone
    assert importers["matplotlib"] == figures
    assert importers["figures"] - figures == pages


# ---- curves --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.floats(-3, 3), st.floats(-10, 10))
def test_smoothing_keeps_a_straight_line(size: int, slope: float, start: float) -> None:
    line = start + slope * np.arange(size)
    inner = slice(3, -3) if size > 12 else slice(0, 0)  # the median at the very ends may bend it by a value
    assert np.allclose(smoothed(line)[inner], line[inner], atol=2 * abs(slope) + 1e-6)
    assert np.isfinite(smoothed(line)).all()


def test_smoothing_takes_noise_and_spikes_out_and_is_not_late() -> None:
    random = np.random.default_rng(0)
    place = np.arange(400)
    clean = 2 + 6 * np.exp(-place / 40)
    noisy = clean + 0.1 * random.standard_normal(400)
    noisy[200] = 1e4
    error = smoothed(noisy) - clean
    assert np.abs(error).max() < 0.25
    assert np.abs(error).std() < 0.06


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20_000))
def test_thinning_keeps_the_extremes(size: int) -> None:
    y = np.random.default_rng(size).standard_normal(size)
    x, thin = thinned(np.arange(size), y)
    assert len(x) <= 1500
    assert (thin.min(), thin.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()


def test_corners_of_a_step_line() -> None:
    x, y = corners(np.arange(7), np.array([1, 1, 1, 2, 2, 3, 3]))
    assert x.tolist() == [0, 3, 5, 6]
    assert y.tolist() == [1, 2, 3, 3]
