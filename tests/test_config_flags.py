"""Flags and overrides: the third door of the configuration."""

from __future__ import annotations

import copy
import string
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import apply_overrides, build, parse_flags
from cambia.errors import ConfigError
from tests.test_config import TREE, Book, Square

# ---- flags ---------------------------------------------------------------------------------------

NAMES = st.lists(st.text(string.ascii_lowercase + "_", min_size=1, max_size=5), min_size=1, max_size=3).map(
    ".".join
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.ascii_letters + " .:-#'\"[]{}", max_size=8)
    | st.lists(st.integers(), max_size=3)
)


def test_flags_are_read_as_yaml() -> None:
    tokens = ["--a.b", "3", "--c=[1, 2]", "--d", "--e", "-4", "--f-g=x=y", "--h="]
    assert parse_flags(tokens) == {"a.b": 3, "c": [1, 2], "d": True, "e": -4, "f_g": "x=y", "h": None}
    assert parse_flags([]) == {}


@given(flags=st.dictionaries(NAMES, VALUES, max_size=4), joined=st.booleans())
def test_flags_say_what_yaml_says(flags: dict[str, Any], joined: bool) -> None:
    tokens = []
    for name, value in flags.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        tokens += [f"--{name}={text}"] if joined or text.startswith("--") else [f"--{name}", text]
    assert parse_flags(tokens) == flags


@given(tokens=st.lists(st.text(max_size=10) | st.text("-=.:[]{}!&*0x_19", max_size=8), max_size=4))
def test_no_flag_is_a_traceback(tokens: list[str]) -> None:
    try:
        assert all(isinstance(name, str) for name in parse_flags(tokens))
    except ConfigError as error:
        assert "settings are given as --any.field value" in str(error)


@pytest.mark.parametrize(
    "text",
    ["2024-99-99", "0b_", "!!binary x", "{a: b", "=", "1:99:99", "\x00", "&a [*a]", "{a: 1, a: 2}"],
)
def test_what_is_no_yaml_is_text(text: str) -> None:
    assert parse_flags([f"--name={text}"]) == {"name": text}


def test_an_anchor_without_a_value_is_null() -> None:
    assert parse_flags(["--name=&a"]) == {"name": None}


# ---- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"name": "two"}, {"name": "two"}),
        ({"page.width": 9}, {"page": {"width": 9, "sizes": [1, 2]}}),
        ({"page.title": "t"}, {"page": {"width": 2, "sizes": [1, 2], "title": "t"}}),
        ({"page.sizes.1": 7}, {"page": {"width": 2, "sizes": [1, 7]}}),
        ({"seal.type": "circle", "seal.size": 2}, {"seal": {"type": "circle", "size": 2}}),
        ({"steps": []}, {"steps": []}),
    ],
)
def test_a_flag_changes_its_place_alone(flags: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(TREE)
    assert apply_overrides(TREE, flags) == {**TREE, **expected}
    assert before == TREE


def test_a_name_of_ones_own_may_have_a_hyphen() -> None:
    tree = {"probes": {"my-own": "a:f"}}
    assert apply_overrides(tree, parse_flags(["--probes.my-own", "b:f"])) == {"probes": {"my-own": "b:f"}}


def test_a_number_in_a_path_is_an_index() -> None:
    tree = apply_overrides(TREE, {"steps.0.times": 5, "steps.1.draw.size": 8})
    assert tree["steps"][0] == {"draw": {"type": "circle", "size": 4}, "times": 5}
    assert tree["steps"][1] == {"draw": {"type": "square", "size": 8}}, "a name alone becomes a mapping"
    assert build(Book, tree).steps[1].draw == Square(size=8)


@pytest.mark.parametrize("part", ["2", "-1", "x", "²", ""])
def test_an_index_that_is_not_there_is_one_line(part: str) -> None:
    with pytest.raises(ConfigError, match="steps is a list, its entries are 0 to 1, got"):
        apply_overrides(TREE, {f"steps.{part}": {}})


def test_a_path_through_a_single_value_or_an_empty_list_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"--page\.sizes\.0\.x: page\.sizes\.0 is a single value, it has no 'x'"
    ):
        apply_overrides(TREE, {"page.sizes.0.x": 1})
    with pytest.raises(ConfigError, match="none: the list is empty"):
        apply_overrides({"steps": []}, {"steps.0": 1})


@pytest.mark.parametrize("order", [1, -1])
def test_another_type_drops_the_old_members_settings(order: int) -> None:
    flags = {"steps.0.draw.corners": [1, 2], "steps.0.draw.type": "square"}
    flags = dict(list(flags.items())[::order])
    tree = apply_overrides(TREE, flags)
    assert tree["steps"][0] == {"draw": {"type": "square", "corners": [1, 2]}, "times": 2}
    same = apply_overrides(TREE, {"steps.0.draw.type": "circle"})
    assert same == TREE, "the same type again drops nothing"


@given(
    tree=st.dictionaries(
        st.sampled_from("ab"),
        st.recursive(
            st.none() | st.integers() | st.sampled_from(["x", "y"]),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "type"]), inner)
            ),
        ),
    ),
    path=st.lists(st.sampled_from(["a", "b", "type", "0", "1", "9", ""]), min_size=1, max_size=4).map(
        ".".join
    ),
)
def test_an_override_lands_or_is_one_line(tree: dict[str, Any], path: str) -> None:
    before = copy.deepcopy(tree)
    try:
        result: Any = apply_overrides(tree, {path: "set"})
    except ConfigError as error:
        assert str(error).startswith(f"--{path}: ")
    else:
        for part in path.split("."):
            result = result[int(part)] if isinstance(result, list) else result[part]
        assert result == "set"
    assert tree == before


def test_numbers_as_people_write_them() -> None:
    assert parse_flags(["--a", "1e6", "--b=3e-4", "--c", "-2.5E+3", "--d", "1e", "--e", "12"]) == {
        "a": 1e6,
        "b": 3e-4,
        "c": -2500.0,
        "d": "1e",
        "e": 12,
    }
