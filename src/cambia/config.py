"""The machinery of configuration: one tree, three doors (Python objects, YAML, dotted flags).

A section is a plain dataclass; its fields are the configuration, and pydantic checks their values.
Where a section may be one of a family (a trigger, a source, a tokenizer), its field is annotated with
`Member`, and YAML picks the member by `type:`, either a short name from the family's registry or
``"my_package.module:MyTrigger"``. Members are imported only when they are named.

    >>> tree = load_yaml("experiment.yaml")
    >>> tree = apply_overrides(tree, parse_flags(["--training.steps", "300"]))
    >>> experiment = build(Experiment, tree, source="experiment.yaml")

Unknown keys fail and name the nearest one. This file knows the machinery, never the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, core_schema

from cambia.errors import ConfigError

T = TypeVar("T")


class FieldError(ConfigError):
    """A problem at one place of the tree; `path` grows as it travels up."""

    def __init__(self, path: Sequence[str | int], problem: str):
        super().__init__(tuple(path), problem)
        self.path, self.problem = tuple(path), problem

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.problem}" if self.path else self.problem


def dotted(path: Iterable[str | int]) -> str:
    """``["rules", 0, "when"]`` -> ``"rules.0.when"``."""
    return ".".join(str(part) for part in path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'steps'?"``, or the whole list where nothing is near."""
    known = sorted(known)
    if not known:
        return ""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


class Spelled:
    """Base of what users of the five systems know under other keywords: refuses those and names ours."""

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        for key in kwargs:
            if key in cls.OLD_SPELLINGS:
                raise ConfigError(_renamed(cls, key))
        return super().__new__(cls)


def _renamed(cls: type[Spelled], key: str) -> str:
    return (
        f"{key} of {cls.__name__} is called {cls.OLD_SPELLINGS[key]!r} here (docs/origins.md maps old names)"
    )


# ---- families: `type:` picks a member, lazily ----------------------------------------------------


def resolve(name: str, registry: Mapping[str, str], family: str) -> type:
    """The class behind a short name of `registry` or behind ``"module:Name"``."""
    found = _found(registry.get(name, name), name, registry, family)
    if not isinstance(found, type):
        raise ConfigError(f"{name!r} is a {type(found).__name__}; expected a class, a {family}")
    return found


def resolve_function(name: str, known: Iterable[str], family: str) -> Callable[..., Any]:
    """The function behind ``"module:name"``; `known` are the short names that stand beside it."""
    found = _found(name, name, known, family)
    if not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}; expected a {family}")
    return found


def _found(target: str, name: str, known: Iterable[str], family: str) -> Any:
    if ":" not in target or target.startswith((":", ".")):
        raise ConfigError(
            f"{name!r} is no {family}{did_you_mean(name, known)} (your own: 'package.module:Name')"
        )
    module_name, _, attribute = target.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing module *inside* the user's file is another error, and theirs to see.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{target!r}: there is no module {module_name!r} on the Python path") from None
    if attribute not in vars(module):
        raise ConfigError(
            f"{target!r}: module {module_name!r} has no {attribute!r}{did_you_mean(attribute, vars(module))}"
        )
    return vars(module)[attribute]


def type_name(cls: type, registry: Mapping[str, str]) -> str:
    """The short name under which `registry` holds a class, else its ``"module:Name"``."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, value in registry.items() if value == target), target)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as annotations with `| None` must be
class Member:
    """Annotation of a field that holds one member of a family.

    ``when: Annotated[Trigger, Member(TRIGGERS, "trigger")]``.

    A field whose annotation also allows None accepts None.
    """

    registry: Mapping[str, str]
    family: str
    default: str | None = None
    """The member that is meant where `type:` is left out."""

    def parse(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            if isinstance(value, str):
                value = {"type": value}
            elif value is None or isinstance(value, int | float | list | tuple):
                raise ConfigError(f"expected a {self.family} as a mapping with type:, got {value!r}")
            else:
                return value  # a live object, by the Python door
        fields = dict(value)
        name = fields.pop("type", self.default)
        if name is None:
            raise FieldError(["type"], f"missing; it picks the {self.family}: {', '.join(self.registry)}")
        try:
            cls = resolve(str(name), self.registry, self.family)
        except ConfigError as error:
            raise FieldError(["type"], str(error)) from None
        return build(cls, fields)

    def dump(self, value: Any) -> Any:
        return None if value is None else {"type": type_name(type(value), self.registry), **dump(value)}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )


# ---- building and dumping ------------------------------------------------------------------------


def build(cls: type[T], fields: Mapping[str, Any]) -> T:
    """Make a section of the tree, a dataclass, from plain values; sections inside it are made first.

    Raises:
        FieldError: a key is unknown, a value of the wrong kind or out of range; it names the place.
    """
    known = field_names(cls)
    for key in fields:
        if issubclass(cls, Spelled) and key in cls.OLD_SPELLINGS:
            raise FieldError([key], _renamed(cls, key))
        if key not in known:
            raise FieldError([key], f"not a setting of {cls.__name__}{did_you_mean(str(key), known)}")
    if not dataclasses.is_dataclass(cls):
        # Someone's own class: its constructor is its configuration.
        try:
            inspect.signature(cls).bind(**fields)
        except TypeError as error:
            raise FieldError([], f"{cls.__name__} is {error}") from None
        return cls(**fields)
    hints = _hints(cls)
    ready = {key: _build_inside(hints[key], value, [key]) for key, value in fields.items()}
    try:
        return cast(T, _adapter(cls).validate_python(ready))
    except ValidationError as error:
        raise _first_problem(error) from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _build_inside(annotation: Any, value: Any, path: list[str | int]) -> Any:
    """Build the plain dataclasses among an annotation's types; pydantic alone would let typos through."""
    if isinstance(value, list) and get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        return [_build_inside(inner, item, [*path, i]) for i, item in enumerate(value)]
    if isinstance(value, bool) and _mentions(annotation, int, float) and not _mentions(annotation, bool):
        # pydantic takes true for 1, and a flag whose value was forgotten is true.
        raise FieldError(path, f"expected a number, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        # Nor could config.json hold it.
        raise FieldError(path, f"expected a finite number, got {value!r}; null is no limit where one may be")
    if isinstance(value, Mapping) and get_origin(annotation) is dict:
        _, inner = get_args(annotation)
        return {key: _build_inside(inner, item, [*path, key]) for key, item in value.items()}
    section = _section_in(annotation)
    if isinstance(value, Mapping) and section is not None:
        try:
            return build(section, value)
        except FieldError as error:
            raise FieldError([*path, *error.path], error.problem) from None
    return value


def _section_in(annotation: Any) -> type | None:
    """The plain dataclass that an annotation means, alone or as one of several types."""
    members = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def _mentions(annotation: Any, *kinds: type) -> bool:
    """Whether a type, or one inside its brackets, is one of these."""
    return annotation in kinds or any(_mentions(inner, *kinds) for inner in get_args(annotation))


def field_names(cls: type) -> list[str]:
    """The keys that a section takes."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.init]
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _first_problem(error: ValidationError) -> FieldError:
    problems = error.errors()
    # Of a union's members, the one that got furthest is what was meant.
    first = problems[0]["loc"][:1]
    problem = max((p for p in problems if p["loc"][:1] == first), key=lambda p: len(p["loc"]))
    cause = problem.get("ctx", {}).get("error")
    # pydantic names the tried type inside unions ("int", "list[int]"); a reader wants only the place.
    path = [part for part in problem["loc"] if isinstance(part, int) or part.isidentifier()]
    path = [part for part in path if part not in ("int", "float", "str", "bool", "none")]
    if isinstance(cause, FieldError):
        return FieldError([*path, *cause.path], cause.problem)
    if isinstance(cause, ConfigError):
        return FieldError(path, str(cause))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return FieldError(path, "not a setting here")
    if problem["type"] in ("missing", "missing_argument"):
        return FieldError(path, "missing")
    text = problem["msg"][:1].lower() + problem["msg"][1:]
    return FieldError(path, f"{text}, got {problem['input']!r}")


def dump(value: Any) -> dict[str, Any]:
    """Plain values from which `build` makes the same section again.

    Raises:
        ConfigError: a live object in it does not say from which settings it was made.
    """
    if dataclasses.is_dataclass(value):
        try:
            plain = _adapter(type(value)).dump_python(value, mode="json")
        except PydanticSerializationError as error:
            raise (error.__cause__ if isinstance(error.__cause__, ConfigError) else error) from None
        return {name: plain[name] for name in field_names(type(value))}
    if not field_names(type(value)):
        return {}  # one's own class without settings: its name says it all
    raise ConfigError(f"a live {type(value).__name__} cannot be written to YAML and run again")


# ---- YAML and flags ------------------------------------------------------------------------------


class _Yaml(yaml.SafeLoader):
    """Safe YAML that takes 1e6 and 3e-4 for numbers, which YAML 1.1 without a dot and a sign does not.

    A key that stands twice is refused, where PyYAML would drop the first.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                repair = "write `<<: [*one, *other]`" if key.value == "<<" else "keep one"
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands twice in one mapping, {repair}",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        return node


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _parsed(text: str) -> Any:
    return _copy(yaml.load(text, _Yaml))  # no end to an alias inside itself is found here


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping; every problem with it is one line that names the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    try:
        tree = _parsed(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-99-99 looks like a date and is none
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} never ends: an alias (*name) stands inside what it names") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected settings as `name: value` lines")
    return tree


def recipes() -> dict[str, Path]:
    """The recipes that come with Cambia, by name."""
    folder = Path(str(resources.files("cambia") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def to_yaml(tree: Mapping[str, Any]) -> str:
    """YAML in the order of the fields."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def parse_flags(tokens: Sequence[str]) -> dict[str, Any]:
    """``["--a.b", "3", "--c=[1, 2]", "--d"]`` -> ``{"a.b": 3, "c": [1, 2], "d": True}``; values are YAML."""
    flags: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"{token!r} stands alone; settings are given as --any.field value")
        name, has_value, text = token[2:].partition("=")
        if not has_value:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            flags[name.replace("-", "_")] = _parsed(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            flags[name.replace("-", "_")] = text
    return flags


def apply_overrides(tree: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with dotted paths set; a number in a path is an index into a list.

    Changing a member's `type` drops the old member's other settings.
    """
    result = _copy(tree)
    # `type` first, so that settings given beside it belong to the new member.
    for name in sorted(flags, key=lambda flag: not flag.endswith("type")):
        _set(result, name.split("."), flags[name], name)
    return result


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One tree laid over another: mappings are merged, everything else is replaced.

    A member of another `type` replaces the one below with all its settings.
    """
    result = _copy(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        if both and value.get("type", old.get("type")) == old.get("type"):
            result[key] = merged(old, value)
        else:
            result[key] = _copy(value)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _set(node: Any, parts: list[str], value: Any, name: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            key: Any = _index(part, node, name, dotted(parts[:depth]))
        elif isinstance(node, dict):
            # Flags are read with _ for -, which stands in names of one's own (probes).
            near = [own for own in node if str(own).replace("-", "_") == part and part not in node]
            key = near[0] if near else part
        else:
            raise ConfigError(f"--{name}: {dotted(parts[:depth])} is a single value, it has no {part!r}")
        if last:
            if key == "type" and node.get("type") not in (None, value):
                node.clear()
            node[key] = value
        else:
            if isinstance(node, dict) and not isinstance(node.get(key), dict | list):
                # A member given by its name alone ("tokenizer: bytes") becomes a mapping to hold more, and
                # what is not there a mapping, or with `.0` a list of one.
                empty: Any = [{}] if parts[depth + 1] == "0" else {}
                node[key] = {"type": node[key]} if isinstance(node.get(key), str) else empty
            node = node[key]


def _index(part: str, items: list[Any], name: str, place: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        upto = f"0 to {len(items) - 1}" if items else "none: the list is empty"
        raise ConfigError(f"--{name}: {place} is a list, its entries are {upto}, got {part!r}")
    return int(part)


def explain(error: FieldError, *, source: str, flags: Mapping[str, Any]) -> ConfigError:
    """The same error, saying whether a flag or which file brought the value in."""
    place = dotted(error.path)
    for flag in flags:
        if place == flag or place.startswith(flag + ".") or (place and flag.startswith(place + ".")):
            return ConfigError(f"--{place}: {error.problem}")
    return ConfigError(f"{source}: {error}")
