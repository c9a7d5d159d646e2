"""Writes docs/configuration.md from the fields of the Experiment tree and the strings under them.

    python docs/configuration.py            # or: make docs

Every default, kind and sentence on that page is read from the code; a test says when it is out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt

from cambia.config import Member
from cambia.experiment import Experiment

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """\
# Configuration

This page is made from the code by `make docs`; do not edit it by hand.

A run has one tree of settings with three doors.

- On the command line each setting is a dotted flag: `cambia run first_growth --training.steps 100`. A
  number in a path is an index into a list: `--growth.rules.0.then.factor 2`. A flag's value is read as
  YAML, so `--data.tasks.0.source.path '[a.txt, b.txt]'` is a list and `--training.clip_norm null` is nothing.
- In YAML the same tree is nested. `cambia recipes NAME --print` prints a recipe with every setting.
- In Python the tree is `cambia.experiment.Experiment`, and
  `cambia.run("first_growth", overrides={"training.steps": 100})` takes the dotted names.

Where a setting is one of a family (a trigger, a source, a tokenizer), `type:` picks the member, by its
short name or as `"my_package.module:MyClass"` for one of your own; the other keys beside `type:` are the
member's settings. Changing a `type` by a flag drops the settings of the member that was there. Unknown
keys and values are refused, and the nearest known one is named.

A run writes the complete tree to `config.yaml` in its folder, and that file can be run again.
"""

KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
BOUNDS = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}


def page() -> str:
    """The whole page."""
    families: dict[str, Member] = {}
    sections = "\n".join(_section("", Experiment, families))
    parts = [INTRODUCTION, sections, "# Families", ""]
    done: list[str] = []
    while len(done) < len(families):  # a member may bring in another family
        family = next(name for name in families if name not in done)
        parts += _family(family, families[family], families)
        done.append(family)
    return "\n".join(parts).rstrip() + "\n"


# ---- sections and families -----------------------------------------------------------------------


def _section(path: str, cls: type, families: dict[str, Member]) -> Iterator[str]:
    """A section's heading, its table, and the sections below it."""
    yield f"## {f'`{path}`' if path else 'The top'}"
    yield ""
    yield _paragraph(cls)
    yield ""
    yield from _table(path, cls, families)
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        inside, suffix = hints[field.name], ""
        if get_origin(inside) is list:
            (inside,), suffix = get_args(inside), ".0"
        if _is_section(inside):
            yield from _section(f"{path}.{field.name}{suffix}".lstrip("."), inside, families)


def _family(name: str, member: Member, families: dict[str, Member]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    for short, target in member.registry.items():
        module, _, attribute = target.partition(":")
        cls = getattr(import_module(module), attribute)
        default = ", meant where `type` is left out" if short == member.default else ""
        yield f"### `type: {short}`{default}"
        yield ""
        yield f"{_paragraph(cls)} (`{module}.{attribute}`)"
        yield ""
        yield from _table("", cls, families)
        renamed: Mapping[str, str] = getattr(cls, "OLD_SPELLINGS", {})
        if renamed:
            pairs = ", ".join(f"`{old}` (here `{new}`)" for old, new in renamed.items())
            yield f"Refused, with the name used here: {pairs}."
            yield ""


def _table(path: str, cls: type, families: dict[str, Member]) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if not fields:
        yield "It has no settings."
        yield ""
        return
    docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
    yield "| setting | default | kind | meaning |"
    yield "|---|---|---|---|"
    for field in fields:
        full = f"{path}.{field.name}".lstrip(".")
        inner = _item(hints[field.name])
        meaning = docs.get(field.name) or (_paragraph(inner) if _is_section(inner) else "")
        kind = _kind(hints[field.name], full, families)
        yield f"| `{full}` | {_default(field)} | {kind} | {_cell(meaning)} |"
    yield ""


# ---- one field -----------------------------------------------------------------------------------


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of the classes it extends."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for here, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(here, ast.AnnAssign) or not isinstance(here.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[here.target.id] = str(after.value.value)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""  # a section or a member: its own table says
    if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
        return "one " + ", one ".join(f"`{type(item).__name__}`" for item in value)
    if value == "":
        return "empty"
    if isinstance(value, str) and "\n" in value:
        return f"`{json.dumps(value)}`"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return f"`{text}`"


def _kind(annotation: Any, path: str, families: dict[str, Member]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        member = next((extra for extra in arguments[1:] if isinstance(extra, Member)), None)
        if member is not None:
            families.setdefault(member.family, member)
            article = "an" if member.family[0] in "aeiou" else "a"
            return f"{article} [{member.family}](#{member.family})"
        bounds = [_bound(extra) for extra in arguments[1:] if type(extra) in BOUNDS]
        return f"{_kind(arguments[0], path, families)} {' and '.join(bounds)}".strip()
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        inner = dict.fromkeys(_kind(each, f"{path}.0", families) for each in arguments if each is not ...)
        return "list of: " + ", ".join(inner)
    if origin is dict:
        inner = " to ".join(_kind(each, path, families) for each in arguments)
        return f"mapping of {inner}"
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(each, path, families) for each in arguments)
    if _is_section(annotation):
        return f"section `{path}`"
    return KINDS[annotation]


def _bound(bound: Any) -> str:
    attribute, word = BOUNDS[type(bound)]
    return f"{word} {getattr(bound, attribute):g}"


def _item(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
