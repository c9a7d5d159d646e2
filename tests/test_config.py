"""The configuration's machinery: one tree, three doors, and errors that say where and what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from annotated_types import Ge, Gt
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import (
    FieldError,
    Member,
    Spelled,
    apply_overrides,
    build,
    did_you_mean,
    dump,
    explain,
    load_yaml,
    merged,
    resolve,
    to_yaml,
)
from cambia.errors import ConfigError


@dataclass
class Shape(Spelled):
    """A member of a family."""

    size: Annotated[int, Gt(0)] = 1


@dataclass
class Circle(Shape):
    OLD_SPELLINGS: ClassVar[dict[str, str]] = {"r": "size"}
    fill: Literal["none", "solid"] = "none"
    drawn: int = field(default=0, init=False)


@dataclass
class Square(Shape):
    corners: tuple[float, float] = (0.0, 1.0)


SHAPES = {"circle": f"{__name__}:Circle", "square": f"{__name__}:Square"}


@dataclass
class Step:
    """A section in a list."""

    draw: Annotated[Shape, Member(SHAPES, "shape")]
    times: Annotated[int, Ge(0)] = 1


@dataclass
class Page:
    """A section inside another."""

    width: Annotated[float, Gt(0)] = 1.5
    title: str | None = None
    sizes: int | list[int] = 3
    landscape: bool = False


@dataclass
class Book:
    """The whole tree."""

    name: str
    page: Page = field(default_factory=Page)
    steps: list[Step] = field(default_factory=list)
    cover: Annotated[Shape, Member(SHAPES, "shape", default="square")] = field(default_factory=Square)
    seal: Annotated[Shape, Member(SHAPES, "shape")] | None = None


TREE: dict[str, Any] = {
    "name": "one",
    "page": {"width": 2, "sizes": [1, 2]},
    "steps": [{"draw": {"type": "circle", "size": 4}, "times": 2}, {"draw": "square"}],
    "cover": {"corners": [0.5, 2]},
}


def problem(tree: Any, cls: Any = Book) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, tree)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- building and dumping ------------------------------------------------------------------------


def test_a_tree_becomes_objects() -> None:
    book = build(Book, TREE)
    assert book == Book(
        name="one",
        page=Page(width=2.0, sizes=[1, 2]),
        steps=[Step(draw=Circle(size=4), times=2), Step(draw=Square())],
        cover=Square(corners=(0.5, 2.0)),
    )
    assert type(book.page.width) is float


def test_what_was_dumped_builds_the_same_again() -> None:
    book = build(Book, TREE)
    plain = dump(book)
    assert build(Book, plain) == book
    assert build(Book, yaml.safe_load(to_yaml(plain))) == book
    assert list(plain) == ["name", "page", "steps", "cover", "seal"], "in the order of the fields"
    assert plain["steps"][0]["draw"] == {"type": "circle", "size": 4, "fill": "none"}, (
        "no state, no old spellings"
    )


@given(
    width=st.floats(0.1, 1e6),
    title=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    sizes=st.integers() | st.lists(st.integers(), max_size=3),
    members=st.lists(
        st.builds(Circle, size=st.integers(1, 9), fill=st.sampled_from(["none", "solid"]))
        | st.builds(Square, size=st.integers(1, 9), corners=st.tuples(st.floats(0, 1), st.floats(0, 1))),
        max_size=3,
    ),
)
def test_any_tree_survives_yaml(width: float, title: str | None, sizes: Any, members: list[Any]) -> None:
    page = Page(width=width, title=title, sizes=sizes)
    book = Book("b", page, [Step(member) for member in members], seal=members[0] if members else None)
    assert build(Book, yaml.safe_load(to_yaml(dump(book)))) == book


def test_live_objects_pass_by_the_python_door() -> None:
    circle = Circle(size=3)
    assert build(Step, {"draw": circle}).draw is circle
    assert dump(Step(draw=circle))["draw"]["type"] == "circle"


def test_a_member_may_be_left_out_or_named_alone() -> None:
    assert build(Book, {"name": "x", "seal": None}).seal is None
    assert build(Book, {"name": "x", "cover": {"size": 2}}).cover == Square(size=2)
    assert build(Book, {"name": "x", "cover": "circle"}).cover == Circle()


# ---- what is refused, and where ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nmae": "x"}, "nmae: not a setting of Book; did you mean 'name'?"),
        ({"zzz": 1}, "zzz: not a setting of Book; known are cover, name, page, seal, steps"),
        ({"page": {"widht": 1}}, "page.widht: not a setting of Page; did you mean 'width'?"),
        (
            {"steps": [{"draw": "circle"}, {"draw": "circle", "time": 1}]},
            "steps.1.time: not a setting of Step",
        ),
        (
            {"steps": [{"draw": {"type": "circle", "sise": 1}}]},
            "steps.0.draw.sise: not a setting of Circle",
        ),
        (
            {"steps": [{"draw": {"type": "circel"}}]},
            "steps.0.draw.type: 'circel' is no shape; did you mean 'circle'?",
        ),
        ({"steps": [{"draw": "circel"}]}, "steps.0.draw.type: 'circel' is no shape"),
        (
            {"steps": [{"draw": {"size": 1}}]},
            "steps.0.draw.type: missing; it picks the shape: circle, square",
        ),
        ({"steps": [{}]}, "steps.0.draw: missing"),
        (
            {"steps": [{"draw": {"type": "circle", "r": 1}}]},
            "steps.0.draw.r: r of Circle is called 'size' here",
        ),
        ({"steps": [{"draw": {"type": "circle", "drawn": 1}}]}, "drawn: not a setting of Circle"),
        (
            {"cover": {"type": "circle", "fill": "sold"}},
            "cover.fill: input should be 'none' or 'solid', got 'sold'",
        ),
        ({"cover": {"size": 0}}, "cover.size: input should be greater than 0, got 0"),
        ({"cover": 3}, "cover: expected a shape as a mapping with type:, got 3"),
        ({"cover": None}, "cover: expected a shape as a mapping with type:, got None"),
        ({"page": {"width": -1}}, "page.width: input should be greater than 0, got -1"),
        ({"page": {"width": "wide"}}, "page.width: input should be a valid number"),
        ({"page": {"landscape": 7}}, "page.landscape: input should be a valid boolean"),
        ({"page": {"sizes": [1, "x"]}}, "page.sizes.1: input should be a valid integer"),
        ({"page": 3}, "page: "),
        ({"steps": [{"draw": "circle", "times": 1.5}]}, "steps.0.times: input should be a valid integer"),
        ({"steps": {"draw": "circle"}}, "steps: input should be a valid list"),
        ({"name": None}, "name: input should be a valid string"),
    ],
)
def test_errors_name_the_place_and_the_value(change: dict[str, Any], said: str) -> None:
    assert said in problem({**TREE, **change})


def test_what_is_missing_is_said() -> None:
    assert problem({}) == "name: missing"


@pytest.mark.parametrize("place", ["page.width", "page.sizes", "cover.size"])
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_whose_value_was_forgotten_is_not_the_number_one(place: str, value: bool) -> None:
    assert f"{place}: expected a number, got {value}" in problem(apply_overrides(TREE, {place: value}))
    assert build(Book, apply_overrides(TREE, {"page.landscape": value})).page.landscape is value


def test_old_spellings_are_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match="r of Circle is called 'size' here"):
        Circle(r=3)


@given(word=st.text(max_size=6), known=st.lists(st.text(min_size=1, max_size=6), max_size=4))
def test_a_hint_is_one_of_the_known_words(word: str, known: list[str]) -> None:
    hint = did_you_mean(word, known)
    assert hint.startswith(("; did you mean ", "; known are ")) if known else not hint
    assert (
        not known
        or any(repr(name) in hint for name in known)
        or hint == f"; known are {', '.join(sorted(known))}"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"page.width": -1}, "--page.width: input should be greater than 0, got -1"),
        ({"page": {"width": -1}}, "--page.width: input should be greater"),
        ({"name": "two"}, "book.yaml: page.width: input should be greater"),
        ({}, "book.yaml: page.width: input should be greater"),
    ],
)
def test_the_door_by_which_a_value_came_is_named(flags: dict[str, Any], said: str) -> None:
    tree = apply_overrides({**TREE, "page": {"width": -1}}, flags)
    with pytest.raises(FieldError) as caught:
        build(Book, tree)
    assert str(explain(caught.value, source="book.yaml", flags=flags)).startswith(said)


# ---- one's own members ---------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
import {imports}

@dataclass
class Star:
    points: int = 5

class Plain:
    pass

class Heavy:
    def __init__(self, weight, colour="red"):
        self.weight, self.colour = weight, colour

def function():
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of one's own."""
    name = f"own_shapes_{tmp_path.name.rpartition('_')[2]}"
    (tmp_path / f"{name}.py").write_text(OWN.format(imports="math"))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_members_of_ones_own_are_named_by_their_module(own: str) -> None:
    star = build(Step, {"draw": {"type": f"{own}:Star", "points": 6}})
    assert star.draw.points == 6
    assert dump(star)["draw"] == {"type": f"{own}:Star", "points": 6}
    heavy = build(Step, {"draw": {"type": f"{own}:Heavy", "weight": 2}})
    assert (heavy.draw.weight, heavy.draw.colour) == (2, "red")
    plain = build(Step, {"draw": f"{own}:Plain"})
    assert dump(plain)["draw"] == {"type": f"{own}:Plain"}


def test_a_live_object_that_does_not_tell_its_settings_cannot_be_written(own: str) -> None:
    heavy = build(Step, {"draw": {"type": f"{own}:Heavy", "weight": 2}})
    with pytest.raises(ConfigError, match="a live Heavy cannot be written to YAML and run again"):
        dump(heavy)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{own}:Sta", "has no 'Sta'; did you mean 'Star'?"),
        ("{own}x:Star", "there is no module"),
        ("no_such_package.inner:Star", "there is no module 'no_such_package.inner'"),
        ("{own}:function", "is a function; expected a class, a shape"),
        ("{own}:math", "is a module; expected a class"),
        (":Star", "is no shape"),
        ("..x:Star", "is no shape"),
        ("{own}.Star", "is no shape"),
        ("{own}:", "has no ''"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(own: str, name: str, said: str) -> None:
    assert said in problem({"draw": {"type": name.format(own=own)}}, Step)


def test_settings_of_ones_own_class_are_checked(own: str) -> None:
    said = problem({"draw": {"type": f"{own}:Heavy", "wieght": 2}}, Step)
    assert "draw.wieght: not a setting of Heavy; did you mean 'weight'?" in said
    assert "draw: Heavy is missing a required argument: 'weight'" in problem({"draw": f"{own}:Heavy"}, Step)
    assert "draw.points: input should be a valid integer" in problem(
        {"draw": {"type": f"{own}:Star", "points": "many"}}, Step
    )


@pytest.mark.parametrize("missing", ["no_such_dependency", "own"])
def test_an_error_inside_ones_own_module_is_ones_own_to_see(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the missing module's name is how one's own begins."""
    (tmp_path / "own_broken.py").write_text(OWN.format(imports=missing))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=missing):
        resolve("own_broken:Star", SHAPES, "shape")


# ---- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "is not YAML: .*line 3"),
        ("a: 1\n\tb: 2\n", "is not YAML: .*line 2"),
        ("a: b: c", "is not YAML: .*line 1, column 5"),
        ("a: !!python/object:os.system x", "is not YAML: .*line 1"),
        ("a: 2024-99-99", "is not YAML: "),
        ("a: {b: 1,\n c: 2, b: 3}", "is not YAML: 'b' stands twice in one mapping, keep one.*line 2"),
        (
            "a: &a {b: 1}\nc: {<<: *a, <<: *a}",
            "'<<' stands twice in one mapping, write .<<: .\\*one, \\*other.",
        ),
        ("a: &x [*x]", r"never ends: an alias \(\*name\)"),
        ("a: &x {b: *x}", r"never ends: an alias \(\*name\)"),
        ("- a\n- b\n", "holds a list; expected settings"),
        ("just words", "holds a str; expected settings"),
        ("3", "holds a int; expected settings"),
    ],
)
def test_broken_yaml_is_one_line_with_file_and_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "book.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*x\.yaml"):
        load_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="is a folder; expected a YAML file"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: gr\xfcn")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text \(byte 8\)"):
        load_yaml(tmp_path / "latin.yaml")


def test_an_empty_file_is_an_empty_tree(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# nothing yet\n")
    assert load_yaml(tmp_path / "x.yaml") == {}


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\npage: {width: 1e-3}\n")
    assert build(Book, load_yaml(tmp_path / "x.yaml")).page.width == 0.001


# ---- one tree over another -----------------------------------------------------------------------


def test_a_tree_over_another_changes_what_it_names() -> None:
    below = {"a": {"type": "x", "size": 1, "deep": {"b": 1, "c": 2}}, "list": [1, 2], "same": 3}
    assert merged(below, {"a": {"deep": {"c": 5}}, "list": [9]}) == {
        "a": {"type": "x", "size": 1, "deep": {"b": 1, "c": 5}},
        "list": [9],
        "same": 3,
    }
    assert merged(below, {"a": {"type": "y", "width": 2}})["a"] == {"type": "y", "width": 2}
    assert merged(below, {"a": "x"})["a"] == "x"
    assert below["a"]["deep"] == {"b": 1, "c": 2}, "what lies below stays as it is"
