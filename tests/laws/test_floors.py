"""Law 10: imports only go down, public names are documented, files are short, `--help` is quick."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cambia

SOURCE = Path(cambia.__file__).parent
FLOORS = [
    {"errors", "config", "files", "records", "rundir", "sweepdir"},
    {"nn", "data", "sandbox"},
    {"models", "probes", "generation"},
    {"growth", "continual", "control", "decoding", "evaluation"},
    {"training"},
    {"experiment"},
    {"sweeps", "reporting", "serving", "hub", "cloud"},
    {"bench", "dashboard", "doctor"},
    {"cli"},
    {"__init__", "__main__"},
]
"""Bottom first. A name is a folder or a file of the package; `__init__` stands above all."""
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MOST_LINES = 450
_LAZY = re.compile(r"cambia(\.\w+)+(:\w+)?")


def part_of(path: Path) -> str:
    """The top-level folder or file of the package that a source file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level part of every import in a file, those inside functions and lazy strings too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _LAZY.fullmatch(node.value):
            names = [node.value]
        for name in names:
            top, *rest = name.replace(":", ".").split(".")
            if top == "cambia":
                # `from cambia import run` takes a name of the package itself, which stands above all;
                # its version is all that anybody may take.
                there = rest[0] if rest and rest[0] in FLOOR else "__init__"
                if rest != ["__version__"]:
                    yield node.lineno, there


def test_every_part_stands_on_a_floor() -> None:
    assert {part_of(path) for path in files()} <= FLOOR.keys()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_go_down(path: Path) -> None:
    here = part_of(path)
    if here == "__init__":
        return
    wrong = []
    for line, there in imported(path):
        down = FLOOR[there] < FLOOR[here]
        # The ground floor is one family: files without torch that know each other.
        if not (down or there == here or FLOOR[here] == FLOOR[there] == 0):
            wrong.append(f"line {line}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})")
    assert not wrong


def test_the_ground_floor_and_what_reads_results_need_no_torch() -> None:
    parts = [*sorted(FLOORS[0]), "evaluation", "reporting", "sweeps", "bench"]
    names = ", ".join(f"cambia.{name}" for name in parts)
    code = f"import sys, cambia, {names}; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def packages() -> list[str]:
    """Every package and module of the library that says what is public."""
    found = []
    for path in files():
        if re.search(r"^__all__\s*=", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts = ["cambia", *path.relative_to(SOURCE).with_suffix("").parts]
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("package", packages())
def test_every_public_name_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            # A dataclass without a docstring gets its own signature as one.
            text = value.__doc__ or ""
            assert text and not text.startswith(f"{name}("), f"{package}.{name} has no docstring"


def test_help_is_quick_and_needs_no_torch() -> None:
    """By what it imports, on which its time depends: a clock tells of the machine's other work, too."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-X", "importtime", "-m", "cambia", "--help"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "cambia" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "matplotlib"}
    assert len(loaded) < 400, "each costs about half a millisecond, and 0.3 s is what it may take"
