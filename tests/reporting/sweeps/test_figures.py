from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cambia.reporting import load_sweep
from cambia.reporting.curves import window_of
from cambia.reporting.drawing import to_svg
from cambia.reporting.sweeps.figures import (
    axis_drawing,
    forest_drawing,
    is_logarithmic,
    is_numeric,
    split_axis,
    tradeoff_drawing,
    wrapped,
)
from cambia.reporting.sweeps.tables import shortened
from tests.sweep_records import Choice, Outcome, cell, write_cells, write_sweep


def steady(choice: Choice) -> Outcome:
    return {"loss": 2.0 + 0.01 * choice["seed"]}


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([3e-4, 1e-3, 3e-3, 1e-2], True),
        ([1, 100], True),
        ([64, 128, 256, 512, 1024], True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], False),
        ([100, 200, 300], False),
        ([0, 0.1, 1, 10], False),
        ([-1, 10], False),
        ([5], False),
    ],
)
def test_decades_are_drawn_by_ratios(values: list[float], is_log: bool) -> None:
    assert is_logarithmic(values) == is_log
    assert is_logarithmic(values[::-1]) == is_log


def test_what_is_a_number() -> None:
    assert is_numeric([1, 2.5])
    assert not is_numeric([True, False]) and not is_numeric([None, 1]) and not is_numeric(["1"])


def test_what_lies_far_off_is_at_the_edge_and_said(runs: Path) -> None:
    assert window_of(np.array([2.0, 2.1, 2.2, 2.3, 2.1, 2.2, 8.0])).high < 3
    assert window_of(np.array([2.0, 8.0])).high > 8
    assert window_of(np.array([2.0, 2.0])).high > window_of(np.array([2.0, 2.0])).low
    write_sweep(
        runs / "grid",
        {"rate": [0.001, 0.01, 0.1, 1.0], "seed": [0, 1, 2, 3]},
        lambda c: {"loss": (7.5 if c["rate"] == 1.0 and c["seed"] == 0 else 2.0) + 0.01 * c["seed"]},
    )
    drawing = axis_drawing(load_sweep("grid"), "loss", "rate")
    assert drawing is not None
    assert "Arrow heads at the edge: 1 beyond it, as far as 7.5000." in drawing.caption
    assert drawing.figure.axes[0].get_ylim()[1] < 3
    assert drawing.figure.axes[0].get_xscale() == "log"


def test_cells_left_out_are_said(runs: Path) -> None:
    write_sweep(
        runs / "grid", {"rate": [1, 2], "seed": [0, 1]}, lambda c: "failed" if c["rate"] == 2 else steady(c)
    )
    drawing = axis_drawing(load_sweep("grid"), "loss", "rate")
    assert drawing is not None and "Not drawn: 2 failed." in drawing.caption
    assert "means over seed" in drawing.caption


def test_nothing_to_draw(runs: Path) -> None:
    write_sweep(runs / "grid", {"rate": [1, 2], "seed": [0]}, lambda _: "failed")
    assert axis_drawing(load_sweep("grid"), "loss", "rate") is None
    write_sweep(runs / "many", {"arm": [f"arm {i}" for i in range(70)], "seed": [0]}, steady)
    sweep = load_sweep("many")
    assert axis_drawing(sweep, "loss", "arm") is None
    assert forest_drawing("loss", sweep.paired("loss", "arm").rows, "arm 0") is None
    write_cells(runs / "apart", [(cell({"arm": i, "seed": i}), {"loss": 1.0}) for i in (0, 1)], {})
    assert forest_drawing("loss", load_sweep("apart").paired("loss", "arm").rows, "0") is None


def test_lines_are_the_values_of_an_axis_with_few(runs: Path) -> None:
    write_sweep(
        runs / "grid", {"rate": [1, 2, 3], "width": list(range(9)), "arm": ["a", "b"], "seed": [0]}, steady
    )
    sweep = load_sweep("grid")
    assert [split_axis(sweep, axis) for axis in sweep.varied] == ["arm", "rate", "rate"]
    drawing = axis_drawing(sweep, "loss", "rate")
    assert drawing is not None and "means over width" in drawing.caption
    names = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert names == ["arm = a", "arm = b"]


def test_means_that_do_not_compare_are_not_joined(runs: Path) -> None:
    cells = [
        (cell({"rate": rate, "width": width, "seed": 0}), {"loss": rate * width})
        for rate, width in ((1, 10), (2, 20), (3, 5))
    ]
    write_cells(runs / "search", cells, {})
    drawing = axis_drawing(load_sweep("search"), "loss", "rate")
    assert drawing is not None and "Where no mean is drawn" in drawing.caption
    assert drawing.figure.legends == []
    assert not any(line.get_linestyle() == "-" for line in drawing.figure.axes[0].lines)


def test_labels_do_not_overlap(runs: Path) -> None:
    write_sweep(runs / "grid", {"rate": [0, 0.001, 0.01, 0.1, 1, 10, 100], "seed": [0]}, steady)
    drawing = axis_drawing(load_sweep("grid"), "loss", "rate")
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    labels = [text for text in drawing.figure.axes[0].get_xticklabels() if text.get_text()]
    assert len(labels) >= 3
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_rows_do_not_overlap(runs: Path) -> None:
    names = [f"{i} " + "a name as people give them to groups of settings " * 2 + str(i) for i in range(5)]
    write_sweep(runs / "grid", {"arm": names, "seed": [0, 1]}, steady)
    drawing = axis_drawing(load_sweep("grid"), "loss", "arm")
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawing.figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_names_keep_both_ends() -> None:
    name = "begin" + "x" * 200 + "end"
    assert len(shortened(name, 30)) == 30
    assert shortened(name, 30).startswith("begin") and shortened(name, 30).endswith("end")
    assert shortened("short", 30) == "short"
    assert wrapped("") == " "
    assert wrapped(name).count("\n") <= 2


def test_a_forest_has_a_row_per_value(runs: Path) -> None:
    write_sweep(
        runs / "grid",
        {"arm": ["a", "b", "$c$"], "seed": [0, 1, 2]},
        lambda c: {"loss": 2.0 + ord(c["arm"][0]) / 50 * (1 + c["seed"] / 9)},
    )
    rows = load_sweep("grid").paired("loss", "arm").rows
    drawing = forest_drawing("loss", rows, "arm = a")
    assert drawing is not None
    svg = to_svg(drawing.figure, "forest", "Paired differences")
    assert "$c$" in svg and "n=3" in svg and "difference from arm = a" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)


# ---- what is learned against what is forgotten ---------------------------------------------------


def traded(choice: Choice) -> Outcome:
    """Whatever is learned better is forgotten more."""
    place = "abc".index(choice["method"]) + 0.1 * choice["seed"]
    return {"learning_loss": 2.0 + 0.1 * place, "forgetting": 1.0 - 0.2 * place}


def test_choices_by_what_they_learn_and_forget(runs: Path) -> None:
    write_sweep(runs / "methods", {"method": ["a", "b", "c"], "seed": [0, 1]}, traded)
    drawing = tradeoff_drawing(load_sweep("methods"))
    assert drawing is not None
    assert drawing.caption.startswith("Each mark is a choice of method, the mean over seed; its cross")
    (axes,) = drawing.figure.axes
    assert {"a", "b", "c"} <= {text.get_text() for text in axes.texts}
    places = [line.get_xydata()[0] for line in axes.lines if line.get_linestyle() == "None"]
    assert np.allclose(places, [(2.005, 0.99), (2.105, 0.79), (2.205, 0.59)])


def test_numbers_are_named_by_their_axis(runs: Path) -> None:
    axes = {"method": ["a", "b"], "training.rate": [0.1, 1.0], "seed": [0]}
    write_sweep(runs / "grid", axes, traded)
    drawing = tradeoff_drawing(load_sweep("grid"))
    assert drawing is not None
    names = {text.get_text() for text in drawing.figure.axes[0].texts}
    assert {"a, rate 0.1", "a, rate 1", "b, rate 0.1", "b, rate 1"} <= names
    assert drawing.caption == "Each mark is a choice of method and training.rate."


def test_many_choices_are_averaged_and_few_are_not_drawn(runs: Path) -> None:
    axes = {"method": ["a", "b", "c"], "width": list(range(10)), "seed": [0]}
    write_sweep(runs / "many", axes, traded)
    drawing = tradeoff_drawing(load_sweep("many"))
    assert drawing is not None and "method, the mean over width" in drawing.caption
    write_sweep(runs / "few", {"method": ["a", "b"], "seed": [0, 1]}, traded)
    assert tradeoff_drawing(load_sweep("few")) is None
    write_sweep(runs / "one", {"method": ["a", "b", "c"], "seed": [0]}, lambda _: {"forgetting": 1.0})
    assert tradeoff_drawing(load_sweep("one")) is None


def test_choices_without_both_numbers_are_left_out_and_said(runs: Path) -> None:
    methods = ["a", "b", "c", "d"]
    axes = {"method": methods, "seed": [0]}
    write_sweep(runs / "gaps", axes, lambda c: "failed" if c["method"] == "d" else traded(c))
    drawing = tradeoff_drawing(load_sweep("gaps"))
    assert drawing is not None and drawing.caption.endswith("Not drawn: 1 failed.")
