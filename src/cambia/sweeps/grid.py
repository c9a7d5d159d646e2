"""A grid: a base recipe, axes, seeds, and the cells that follow.

    base: first_growth
    axes:
      optimizer.learning_rate: [1e-3, 3e-3]          # any setting is an axis
      method:                                        # or a group of settings, by name
        fixed: {growth.enabled: false}
        grown: {}
    seeds: [0, 1, 2]
    exclude:
      - {method: fixed, optimizer.learning_rate: 3e-3}

A cell is a whole Experiment. Its hash is that of everything that can change its results, so equal
configurations are one cell however they were asked for, and a grid that is extended keeps what it has.
All cells of a seed see the same data in the same order: the seed is theirs alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from cambia.config import (
    FieldError,
    apply_overrides,
    build,
    did_you_mean,
    dump,
    explain,
    load_yaml,
    parse_flags,
)
from cambia.errors import ConfigError
from cambia.experiment.tree import Experiment, experiment_from, plain_tree, read_tree
from cambia.sweepdir import CellRecord
from cambia.sweeps.search import Search

MOST_CELLS = 10_000
"""More than these are only made where somebody says so."""
_LABEL = 40
"""Characters of a value in a cell's name; its hash tells the rest apart."""


@dataclass
class Grid:
    """What a sweep consists of. The string under a field is its help."""

    base: str | dict[str, Any]
    """A recipe's name, a YAML file (beside the grid's own), or a whole tree of settings."""
    name: str | None = None
    """Of the sweep's folder under runs/; that of the grid's file where it is left out."""
    description: str = ""
    """What it should show, in a sentence."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings for all cells, laid over the base."""
    axes: dict[str, list[Any] | dict[str, dict[str, Any] | None]] = field(default_factory=dict)
    """A dotted setting -> its values, or a name of your own -> named groups of dotted settings."""
    seeds: list[Annotated[int, Ge(0)]] | Annotated[int, Gt(0)] = 1
    """The seeds, or how many, counted from 0. Every cell is run with each."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Choices that are left out, each a mapping of axes to values: {method: fixed, seed: [1, 2]}."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """Choices that are run first, in this order, so that a headline table is there soon."""
    search: Search | None = None
    """Values that are searched for instead of listed, for every combination of the axes."""
    workers: Annotated[int, Gt(0)] | None = None
    """Cells at a time; as many as the machine's cores have room for where it is left out."""
    threads: Annotated[int, Gt(0)] = 1
    """CPU threads of each cell, where neither base nor axes set `threads`."""
    cell_seconds: Annotated[float, Gt(0)] | None = None
    """A cell that takes longer at one go is stopped and has failed."""
    attempts: Annotated[int, Gt(0)] = 3
    """How many workers a cell may lose before it has failed."""
    keep_checkpoints: bool = True
    """False deletes the checkpoints of a cell that has finished."""

    def __post_init__(self) -> None:
        for axis, values in self.axes.items():
            if not values:
                raise FieldError(["axes", axis], "is empty; give it at least one value, or leave it out")
            if axis == "seed":
                raise FieldError(["axes", "seed"], "is always an axis: give the seeds as seeds: [0, 1, 2]")
        if self.seeds == []:
            raise FieldError(["seeds"], "is empty; give at least one")
        names = [*self.axes, "seed"]
        for place in ("exclude", "first"):
            for i, choice in enumerate(getattr(self, place)):
                for axis in choice:
                    if axis not in names:
                        raise FieldError([place, i], f"{axis!r} is no axis{did_you_mean(axis, names)}")

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def size(self) -> int:
        """Cells before any is excluded, without those that a search will think of."""
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        return math.prod(len(values) for values in self.axes.values()) * seeds


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    record: CellRecord
    tree: Mapping[str, Any]
    """The whole experiment, as plain values."""
    choice: Mapping[str, Any]
    """As in the record, with values that have parts as they are."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def hash(self) -> str:
        return self.record.hash

    def experiment(self) -> Experiment:
        return experiment_from(self.tree, source=self.name, flags={})


def read_grid(grid: str | Path | Mapping[str, Any] | Grid, flags: Mapping[str, Any] | None = None) -> Grid:
    """A grid from its YAML file, a mapping or as it is; its base is read, so that it stands alone.

    Args:
        grid: the file, the mapping (whose base may be an `Experiment`), or the object.
        flags: dotted settings of the experiment for all cells, laid over those of the grid.

    Raises:
        ConfigError: something in it is unknown, empty or contradicts itself.
    """
    source, folder, name = "grid", Path(), None
    if isinstance(grid, str | Path):
        path = Path(grid)
        source, folder, name = str(grid), path.parent, path.stem
        grid = load_yaml(path)
    if not isinstance(grid, Grid):
        base = grid.get("base")
        grid = _built({**grid, "base": plain_tree(base)} if isinstance(base, Experiment) else grid, source)
    if isinstance(grid.base, str):
        beside = folder / grid.base
        grid.base, _ = read_tree(
            beside if beside.suffix in (".yaml", ".yml") and beside.exists() else grid.base
        )
    grid.name = grid.name or name or "sweep"
    grid.settings = {**flat(grid.settings), **(flags or {})}
    grid.axes = {
        axis: {group: flat(settings or {}) for group, settings in values.items()}
        if isinstance(values, Mapping)
        else values
        for axis, values in grid.axes.items()
    }
    _refuse_overlaps(grid, flags or {})
    return grid


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as dotted ones: ``{"training": {"steps": 3}}`` -> ``{"training.steps": 3}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inside}": one for inside, one in flat(value).items()}
        else:
            found[key] = value
    return found


def _built(tree: Mapping[str, Any], source: str) -> Grid:
    try:
        return build(Grid, tree)
    except FieldError as error:
        raise explain(error, source=source, flags={}) from None


def plain_grid(grid: Grid) -> dict[str, Any]:
    """The grid as plain values: what grid.yaml holds."""
    return dump(grid)


# ---- cells ---------------------------------------------------------------------------------------


def cells_of(grid: Grid, *, yes: bool = False) -> list[Cell]:
    """Every cell of a grid, in the order in which they are to be run.

    Args:
        grid: as `read_grid` gives it.
        yes: make them even if there are very many.

    Raises:
        ConfigError: a setting is unknown or out of range, two cells are one configuration, nothing is left.
    """
    if grid.size > MOST_CELLS and not yes:
        raise ConfigError(f"the grid has {grid.size:,} cells: leave values out, or say --yes if you mean it")
    names = [*grid.axes, "seed"]
    values = [*(list(values) for values in grid.axes.values()), grid.seed_list]
    every = (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values))
    choices = [choice for choice in every if not any(matches(choice, one) for one in grid.exclude)]
    if not choices:
        raise ConfigError("no cell is left: exclude takes all of them")
    cells = [make_cell(grid, choice) for choice in choices]
    by_hash: dict[str, Cell] = {}
    for cell in cells:
        other = by_hash.setdefault(cell.hash, cell)
        if other is not cell:
            raise ConfigError(
                f"{_said(other.record.choice)} and {_said(cell.record.choice)} are one configuration: "
                "exclude one of them, or give it another value"
            )
    _refuse_unknown(grid, cells)
    seeds = {seed: i for i, seed in enumerate(grid.seed_list)}

    def priority(cell: Cell) -> tuple[int, int]:
        # What the grid puts first, then all cells of the first seed, of the second...
        choice = cell.record.choice
        place = next((i for i, one in enumerate(grid.first) if matches(choice, one)), len(grid.first))
        return place, seeds[choice["seed"]]

    return sorted(cells, key=priority)


def _refuse_unknown(grid: Grid, cells: Sequence[Cell]) -> None:
    """Refuse a search for what is no setting; values that don't fit together are the search's to learn."""
    if grid.search is None:
        return
    space, seed = grid.search.space, grid.seed_list[0]
    arms = [cell.choice for cell in cells if cell.choice["seed"] == seed] or [cells[0].choice]
    # What is a setting of one type may be none of another, and the search may choose the type.
    types = {key: room for key, room in space.items() if key.endswith(".type") and isinstance(room, list)}
    chosen = [{}, *(dict(zip(types, values, strict=True)) for values in itertools.product(*types.values()))]
    for choice, (key, room) in itertools.product(arms, space.items()):
        value = room[0] if isinstance(room, list) else room.low
        unknown = []
        for one in chosen:
            if not (said := _unknown(grid, choice, {**one, key: value})):
                break
            unknown.append(said)
        else:
            raise ConfigError(f"search.space: {max(unknown, key=lambda said: 'did you mean' in said)}")


def _unknown(grid: Grid, choice: Mapping[str, Any], searched: Mapping[str, Any]) -> str:
    """What is said of a setting that is none; nothing where all are settings, whatever their values."""
    assert isinstance(grid.base, Mapping)
    settings = _settings(grid, choice, searched)
    try:
        apply_overrides(grid.base, settings)
    except ConfigError as error:  # no such place in a list
        return str(error)
    try:
        _experiment(grid.base, settings, grid, choice)
    except ConfigError as error:
        return str(error) if "not a setting" in str(error) else ""
    return ""


def make_cell(grid: Grid, choice: Mapping[str, Any], searched: Mapping[str, Any] | None = None) -> Cell:
    """The cell of a choice on every axis, and of the values that a search has thought of."""
    assert isinstance(grid.base, Mapping)
    settings = _settings(grid, choice, searched or {})
    tree = plain_tree(_experiment(grid.base, settings, grid, choice))
    digest = configuration_hash(tree)
    plain = {axis: _plain(value) for axis, value in {**choice, **(searched or {})}.items()}
    name = _name(plain, grid, digest)
    return Cell(
        CellRecord(name=name, hash=digest, choice=plain),
        {**tree, "name": name},
        {**choice, **(searched or {})},
    )


def _settings(grid: Grid, choice: Mapping[str, Any], searched: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell lays over the base, by dotted places."""
    assert isinstance(grid.base, Mapping)
    settings: dict[str, Any] = {**grid.settings, **searched, "seed": choice["seed"]}
    for axis, values in grid.axes.items():
        settings |= values[choice[axis]] or {} if isinstance(values, Mapping) else {axis: choice[axis]}
    if "threads" not in settings and grid.base.get("threads") is None:
        settings["threads"] = grid.threads
    return settings


def _experiment(
    base: Mapping[str, Any], settings: Mapping[str, Any], grid: Grid, choice: Mapping[str, Any]
) -> Experiment:
    try:
        return experiment_from(base, source="the base", flags=settings)
    except ConfigError as error:
        place = str(error).partition(":")[0].removeprefix("--")
        axis = next((axis for axis, keys in _keys(grid).items() if place in keys), None)
        where = f"axis {axis!r}, {choice[axis]!r}: " if axis and axis in choice else ""
        raise ConfigError(f"{where}{error}") from None


_NO_RESULT = ("name", "description", "tracking")
"""Settings that cannot change what a run comes to."""


def configuration_hash(tree: Mapping[str, Any]) -> str:
    """A hash of everything in an experiment that can change its results, 16 hexadecimal digits."""
    kept = {key: value for key, value in tree.items() if key not in _NO_RESULT}
    kept["data"] = {key: value for key, value in tree["data"].items() if key != "cache_dir"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _name(choice: Mapping[str, Any], grid: Grid, digest: str) -> str:
    words = []
    for axis, value in choice.items():
        is_group = isinstance(grid.axes.get(axis), Mapping)
        short = axis.rpartition(".")[2]
        same = [other for other in choice if other.rpartition(".")[2] == short]
        said = _slug(value)[:_LABEL]
        words.append(said if is_group else f"{short if len(same) == 1 else axis}-{said}")
    return f"{_slug('_'.join(words))[:160]}_{digest[:8]}"


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "none"


def _plain(value: Any) -> Any:
    """A value as results and tables hold it: what has parts becomes a line of text."""
    if isinstance(value, str | int | float | None):
        return value
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError:  # YAML knows dates
        return str(value)


# ---- choices -------------------------------------------------------------------------------------


def matches(choice: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a choice is one of those wanted: each axis named has that value, or one of a list."""
    return all(
        _plain(choice[axis]) in [_plain(one) for one in [value, *(value if isinstance(value, list) else ())]]
        for axis, value in wanted.items()
    )


def chosen(cells: Sequence[Cell], only: Sequence[str], grid: Grid) -> list[Cell]:
    """The cells that match every ``"axis=value"``; an axis may be named by its last dotted part.

    Raises:
        ConfigError: there is no such axis, or no such cell.
    """
    wanted: dict[str, list[Any]] = {}
    names = [*grid.axes, "seed"]
    for one in only:
        axis, given, text = one.partition("=")
        meant = [name for name in names if axis in (name, name.rpartition(".")[2])]
        if not given or len(meant) != 1:
            raise ConfigError(f"--only {one!r}: expected axis=value{did_you_mean(axis, names)}")
        wanted.setdefault(meant[0], []).append(parse_flags([f"--x={text}"])["x"])
    found = [cell for cell in cells if matches(cell.choice, wanted)]
    if not found:
        raise ConfigError(f"--only {' --only '.join(only)}: the grid has no such cell")
    return found


def _said(choice: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{axis}={value}" for axis, value in choice.items()) + ")"


def _keys(grid: Grid) -> dict[str, set[str]]:
    """For each axis the settings that it sets."""
    found = {
        axis: {key for group in values.values() for key in group or {}}
        if isinstance(values, Mapping)
        else {axis}
        for axis, values in grid.axes.items()
    }
    searched = {f"search.{key}": {key} for key in (grid.search.space if grid.search else ())}
    return {**found, **searched, "seeds": {"seed"}}


def _refuse_overlaps(grid: Grid, flags: Mapping[str, Any]) -> None:
    """Two places must not set one thing, nor one of them a part of what the other sets."""
    places = {f"the axis {axis!r}": keys for axis, keys in _keys(grid).items()}
    places |= {f"--{flag}": {flag} for flag in flags}
    places["settings"] = set(grid.settings) - set(flags)
    for (one, mine), (other, theirs) in itertools.combinations(places.items(), 2):
        for first, second in itertools.product(sorted(mine), sorted(theirs)):
            if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
                raise ConfigError(
                    f"{first!r} is set by {one} and by {other} of the grid: leave it to one of them"
                )
