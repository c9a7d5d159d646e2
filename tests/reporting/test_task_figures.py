"""The pictures of several tasks: what is drawn is what was measured, and every name can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from cambia.evaluation import TaskMatrix
from cambia.reporting import MethodPoint, forgetting_drawing, stability_plasticity
from cambia.reporting.curves import apart
from cambia.reporting.drawing import to_svg

TEN = [f"domain {i}" for i in range(10)]


def matrix(
    rows: Sequence[Sequence[float]], tasks: Sequence[str], trained: Sequence[Sequence[int]]
) -> TaskMatrix:
    return TaskMatrix(tuple(map(tuple, rows)), tuple(tasks), tuple(map(tuple, trained)), "own")


def names(axes: Axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def overlaps(figure: Figure, texts: Sequence[Text]) -> int:
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in texts]
    return sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- forgetting curves ---------------------------------------------------------------------------


def test_a_line_runs_from_a_tasks_first_training_to_the_end() -> None:
    rows = [[8.0, 8.0, 8.0], [2.0, 7.0, 7.0], [3.0, 1.5, 6.0], [1.9, 1.8, 5.0], [2.5, 1.9, 4.0]]
    drawing = forgetting_drawing(matrix(rows, ["a", "b", "held out"], [[0], [1], [0], []]))
    assert drawing is not None
    (axes,) = drawing.figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [line.get_xdata().tolist() for line in lines] == [[1, 2, 3, 4], [2, 3, 4]]
    assert [line.get_ydata().tolist() for line in lines] == [[2.0, 3.0, 1.9, 2.5], [1.5, 1.8, 1.9]]
    assert [np.asarray(dot.get_xdata()).tolist() for dot in dots] == [[1, 3], [2]]
    assert [np.asarray(dot.get_ydata()).tolist() for dot in dots] == [[2.0, 1.9], [1.5]]
    assert list(names(axes)) == ["a", "b"] and axes.get_ylabel() == "bits per byte"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "a again", "stage 4"]


def test_where_nothing_came_after_there_is_no_picture() -> None:
    assert forgetting_drawing(matrix([[8.0, 8.0], [2.0, 1.5]], "ab", [[0, 1]])) is None
    assert forgetting_drawing(matrix([[8.0]], "a", [])) is None
    assert forgetting_drawing(TaskMatrix((), (), (), "own")) is None
    assert forgetting_drawing(matrix([[8.0, 8.0], [2.0, 7.0], [2.1, 1.0]], "ab", [[0], [1]])) is not None


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_names_at_the_ends_never_overlap(spread: float) -> None:
    # Ten tasks that end at one place, or nearly.
    rows = [[8.0] * 10] + [[2.0 + spread * j * (i > j) for j in range(10)] for i in range(1, 11)]
    drawing = forgetting_drawing(matrix(rows, TEN, [[j] for j in range(10)]))
    assert drawing is not None
    (axes,) = drawing.figure.axes
    assert list(names(axes)) == TEN
    assert overlaps(drawing.figure, axes.texts) == 0
    # Stages have numbers where their names do not fit, and the caption says which is which.
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(1, 11)]
    assert "1: domain 0, 2: domain 1" in drawing.caption


def test_whatever_tasks_are_called_it_is_text_in_the_pages_colors() -> None:
    drawing = forgetting_drawing(
        matrix([[8.0, 8.0], [2.0, 7.0], [2.1, 1.0]], ["$x_1$ <b>", "日本語"], [[0], [1]])
    )
    assert drawing is not None
    svg = to_svg(drawing.figure, "kept", "x")
    assert "$x_1$ &lt;b&gt;" in svg and "日本語" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)


@given(st.lists(st.floats(-50, 50), max_size=12), st.floats(0.1, 10))
def test_places_are_moved_apart_and_no_further(places: list[float], gap: float) -> None:
    moved = apart(places, gap)
    order = np.argsort(places, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert moved.mean() == pytest.approx(np.mean(places), abs=1e-6) if places else len(moved) == 0
    assert np.allclose(apart(moved, gap), moved, atol=1e-9), "what is apart stays"


def test_only_neighbors_are_moved() -> None:
    assert apart([0.0, 10.0, 10.0, 30.0], 4.0).tolist() == [0.0, 8.0, 12.0, 30.0]
    assert apart([5.0, 1.0], 2.0).tolist() == [5.0, 1.0]


# ---- stability against plasticity ----------------------------------------------------------------

METHODS = [
    MethodPoint("naive", (1.94, 1.96), (2.8, 3.0)),
    MethodPoint("replay", (2.0, 2.02), (0.1, 0.14)),
    MethodPoint("ewc", (2.1,), (1.1,)),
    MethodPoint("experts", (2.05, 2.07), (0.0, 0.0)),
    MethodPoint("joint", (2.0, 2.02), (-0.02, 0.0)),
]


def marks(axes: Axes) -> list[Any]:
    return [line for line in axes.lines if line.get_linestyle() == "None"]


def test_a_mark_is_a_mean_and_its_cross_a_standard_deviation() -> None:
    figure = stability_plasticity(METHODS[:2])
    (axes,) = figure.axes
    found = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks(axes)]
    assert found == [pytest.approx((1.95, 2.9)), pytest.approx((2.01, 0.12))]
    crosses = [np.asarray(line.get_xydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    wide = [cross[:, 0] for cross in crosses if cross[0, 1] == cross[1, 1] and cross[0, 1] > 1]
    assert wide[0] == pytest.approx([1.95 - 0.01 * 2**0.5, 1.95 + 0.01 * 2**0.5])
    assert list(names(axes)) == ["naive", "replay"]
    assert "↙ better" in [text.get_text() for text in axes.texts]
    assert axes.get_yscale() == "linear"


def test_small_forgetting_beside_much_is_drawn_to_be_seen() -> None:
    (axes,) = stability_plasticity(METHODS).axes
    assert axes.get_yscale() == "symlog" and "logarithmic from 0.1" in axes.get_ylabel()
    heights = [axes.transData.transform((2.0, y))[1] for y in (0.0, 0.12, 2.9)]
    assert (heights[1] - heights[0]) > 0.2 * (heights[2] - heights[0])
    low, high = axes.get_ylim()
    assert low < -0.02 and high > 3.0


def test_a_method_that_learns_nothing_stands_at_the_edge() -> None:
    crowd = [MethodPoint(f"m{i}", (2.0 + 0.01 * i,), (0.5 + 0.1 * i,)) for i in range(6)]
    (axes,) = stability_plasticity([*crowd, MethodPoint("stuck", (6.0, 6.0), (0.1, 0.1))]).axes
    assert axes.get_xlim()[1] < 3
    assert "stuck (6.00)" in names(axes)
    assert marks(axes)[-1].get_marker() == ">"


def test_what_cannot_be_drawn_is_refused() -> None:
    for points in ([], [MethodPoint("a", (), ())], [MethodPoint("a", (1.0,), (1.0, 2.0))]):
        with pytest.raises(ValueError, match="at least one method"):
            stability_plasticity(points)


@given(st.lists(st.tuples(st.floats(1.5, 3.0), st.floats(0.0, 3.0)), min_size=1, max_size=14))
def test_names_of_methods_never_overlap(places: list[tuple[float, float]]) -> None:
    points = [MethodPoint(f"method {i}", (x, x + 0.01), (y, y + 0.02)) for i, (x, y) in enumerate(places)]
    figure = stability_plasticity(points)
    (axes,) = figure.axes
    assert overlaps(figure, axes.texts) == 0
    inside = axes.get_window_extent()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert all(box.x0 >= inside.x0 - 1 and box.x1 <= inside.x1 + 1 for box in boxes)
    assert all(box.y0 >= inside.y0 - 1 and box.y1 <= inside.y1 + 1 for box in boxes)


def test_twelve_methods_at_one_place_can_still_be_read() -> None:
    figure = stability_plasticity([MethodPoint(f"a method, number {i}", (2.0,), (0.0,)) for i in range(12)])
    (axes,) = figure.axes
    assert overlaps(figure, axes.texts) == 0
    joined = [label.arrow_patch.get_visible() for label in names(axes).values() if label.arrow_patch]
    assert not joined[0] and joined[-1], "what is far from its mark is joined to it"


def test_methods_are_drawn_in_the_pages_colors() -> None:
    svg = to_svg(stability_plasticity(METHODS), "tradeoff", "x")
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert to_svg(stability_plasticity(METHODS), "tradeoff", "x") == svg
