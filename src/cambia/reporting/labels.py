"""Names beside marks in a picture, placed so that none lies on another, on a mark, or beyond the edge.

Each label in turn takes the first free place around its mark, the near ones first; one that has to go far
is joined to its mark by a thin line.

>>> labels = [free_label(axes, name, place, COLORS["leaf"]) for name, place in marks.items()]
>>> place_labels(figure, axes, labels)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from cambia.reporting.drawing import LETTER_SIZE, lay_out

_MARK = 4.0  # half a mark's width, points
_DISTANCES = (0.0, 4.0, 9.0, 16.0, 26.0, 38.0, 55.0, 75.0, 100.0, 130.0)  # from the mark's edge, points
_HAIR = np.array([[-1.0], [1.0]])  # a line has no width of its own
_NEAR = 9.0  # up to there it is plain which mark is meant
_SIDES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1), (0.5, 1), (0.5, -1))
"""Where a label may be: 1 and -1 are right and left of the mark, or above and below; 0 is level with it."""


def free_label(axes: Axes, name: str, place: tuple[float, float], color: str) -> Annotation:
    """A label that `place_labels` can move.

    Args:
        place: of its mark, in data coordinates.
        color: of the letters, as matplotlib writes it.
    """
    label = axes.annotate(
        name,
        place,
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        size=LETTER_SIZE,
        color=color,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        zorder=5,
        parse_math=False,
    )
    label.set_in_layout(False)  # it must not push the axes that it is placed in
    return label


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Annotation], *, taken: Sequence[Artist] = ()
) -> None:
    """Move labels to free places.

    Args:
        labels: from `free_label`.
        taken: what else they must not cover.
    """
    lay_out(figure)  # only then is it known how large everything is
    points = 72 / figure.dpi
    edge = points * axes.get_window_extent().get_points()
    marks = [points * axes.transData.transform(label.xy) for label in labels]
    blocked = [points * artist.get_window_extent().get_points() + _HAIR for artist in taken]
    blocked += [np.array([mark - _MARK, mark + _MARK]) for mark in marks]
    for label, mark in zip(labels, marks, strict=True):
        letters = points * Text.get_window_extent(label).get_points()
        places = list(_places(mark, letters[1] - letters[0] + 2))
        distance, box = min(places, key=lambda place: (_hidden(place[1], blocked, edge), place[0]))
        blocked.append(box)
        x, y = box.mean(axis=0) - mark
        label.set_position((x, y))
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(distance > _NEAR)


def _places(mark: np.ndarray, size: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """Boxes around a mark, (2, 2), with their distance from it, near ones first."""
    for distance in _DISTANCES:
        for side in _SIDES:
            middle = mark + np.array(side) * (_MARK + distance + size / 2)
            yield distance, np.array([middle - size / 2, middle + size / 2])


def _hidden(box: np.ndarray, blocked: Sequence[np.ndarray], edge: np.ndarray) -> float:
    """How much of a box lies on something else or beyond the edge, square points."""
    outside = float(np.prod(box[1] - box[0])) - _shared(box, edge)
    return outside + sum(_shared(box, other) for other in blocked)


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])
    return float(np.prod(sides)) if (sides > 0).all() else 0.0
