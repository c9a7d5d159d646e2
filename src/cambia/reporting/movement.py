"""How far weights moved from one checkpoint to the next.

Of a tensor w that became v it is told as |v - w| / max(|w|, |v|), with Frobenius norms: 0 where nothing
moved, about 1 and more where little is left of w, and finite where w is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from cambia.training.checkpoint import STATE_TENSORS

FURTHEST = 5
"""How many groups and tensors are told of."""
_GROUP = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Moved:
    """How far something moved, relative to its norm."""

    name: str
    relative: float


@dataclass(frozen=True)
class Movement:
    """How far the weights moved between two checkpoints."""

    before: str
    after: str
    relative: float
    """Of all weights together."""
    groups: tuple[Moved, ...]
    """Those that moved furthest: a layer, or what stands outside the layers."""
    tensors: tuple[Moved, ...]
    """Those that moved furthest."""
    reshaped: int
    """Tensors that are new or have another shape, and are left out."""


def movements(checkpoints: Sequence[Path]) -> tuple[Movement, ...]:
    """From each checkpoint to the next, of the weights as others load them.

    Args:
        checkpoints: folders, in the order of time. One that is gone by now is left out.
    """
    found: list[Movement] = []
    before: tuple[str, dict[str, Tensor]] | None = None
    for folder in checkpoints:
        weights = _weights(folder)
        if not weights:
            continue
        if before is not None:
            found.append(_movement(*before, folder.name, weights))
        before = (folder.name, weights)
    return tuple(found)


def _weights(folder: Path) -> dict[str, Tensor]:
    """Those of a model folder, by name; none where it is gone."""
    files = (path for path in sorted(folder.glob("*.safetensors")) if path.name != STATE_TENSORS)
    try:
        return {name: tensor for path in files for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        return {}


def _movement(before: str, old: Mapping[str, Tensor], after: str, new: Mapping[str, Tensor]) -> Movement:
    same = [name for name in new if name in old and old[name].shape == new[name].shape]
    squares = {name: _squares(old[name], new[name]) for name in same}
    return Movement(
        before=before,
        after=after,
        relative=_relative(squares.values()),
        groups=_furthest(squares, _group),
        tensors=_furthest(squares, str),
        reshaped=len(new) - len(same),
    )


def _squares(old: Tensor, new: Tensor) -> tuple[float, float, float]:
    """Squared norms of the change, of the old and of the new tensor."""
    old, new = old.double(), new.double()
    return float((new - old).square().sum()), float(old.square().sum()), float(new.square().sum())


def _relative(squares: Iterable[tuple[float, float, float]]) -> float:
    change, old, new = (math.fsum(values) for values in zip((0.0, 0.0, 0.0), *squares, strict=True))
    return math.sqrt(change / max(old, new)) if change else 0.0


def _furthest(
    squares: Mapping[str, tuple[float, float, float]], place: Callable[[str], str]
) -> tuple[Moved, ...]:
    """The places that moved furthest, of all that tensors belong to."""
    places: dict[str, list[tuple[float, float, float]]] = {}
    for name, values in squares.items():
        places.setdefault(place(name), []).append(values)
    moved = [Moved(name, _relative(values)) for name, values in places.items()]
    return tuple(sorted(moved, key=lambda each: -each.relative)[:FURTHEST])


def _group(name: str) -> str:
    """The layer that a tensor belongs to, or else its module: model.layers.3, model.embed_tokens."""
    layer = _GROUP.match(name)
    return layer[0] if layer else name.rpartition(".")[0] or name
