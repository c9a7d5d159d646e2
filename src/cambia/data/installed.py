"""Finding and reading the text that an installed Python brings: modules, headers, readmes, licenses.

Nothing is imported to find or read it. Tests, tables, generated code and files too large to be
written by hand are left out.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
"""What can have a docstring."""
Reader = Callable[[str], Iterator[tuple[str, str]]]
"""A file's text -> its documents as (what to add to the key, text)."""

READER_VERSION = 2
"""Goes into a corpus's hash; raise it when a change here changes the text."""

_PACKAGES = ("numpy", "torch", "transformers")
_MOST_BYTES = 100_000
_SKIPPED = (
    *("test", "tests", "testing", "idle_test"),
    *("site-packages", "dist-packages", "__pycache__", "__phello__", "lib-dynload"),
    *("encodings", "pydoc_data"),  # tables; and the topics, which are read on their own
    *("ops", "generated", "opset"),  # written by torch's generators
)
"""Names of folders that are not entered."""
_DISTRIBUTIONS = frozenset(
    [
        *(
            "torch",
            "numpy",
            "transformers",
            "tokenizers",
            "safetensors",
            "huggingface-hub",
            "sympy",
            "networkx",
        ),
        *("matplotlib", "pillow", "fonttools", "contourpy", "kiwisolver", "cycler", "pyparsing", "mpmath"),
        *(
            "pydantic",
            "pydantic-core",
            "annotated-types",
            "typing-extensions",
            "cyclopts",
            "rich",
            "pygments",
        ),
        *("pyyaml", "jinja2", "markupsafe", "fsspec", "filelock", "regex", "tqdm", "packaging", "attrs"),
    ]
)
"""What is installed beside Cambia always: another package that the user adds later changes no corpus."""
_LICENSE = re.compile(r"licen[cs]e|copying|notice|copyright", re.I)
_GENERATED = re.compile(
    r"do not edit|@generated|auto-?generated|generated (by|from|file|automatically)", re.I
)


@dataclass(frozen=True)
class Places:
    """Where a Python installation keeps its text."""

    stdlib: Path | None
    packages: Mapping[str, Path]
    """Folders of installed packages, by package name."""
    metadata: tuple[Path, ...]
    """The ``*.dist-info`` folders of what Cambia depends on, by name."""
    licenses: Path | None = None
    """The licenses that the system keeps for all its packages (Debian and its kin)."""


def places() -> Places:
    """The places of the running Python."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    packages = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            packages[name] = Path(spec.origin).parent
    roots = {Path(sysconfig.get_paths()["purelib"]), *(folder.parent for folder in packages.values())}
    folders = {folder.name: folder for root in roots for folder in root.glob("*.dist-info")}
    metadata = {name: folder for name, folder in folders.items() if _distribution(name) in _DISTRIBUTIONS}
    licenses = Path("/usr/share/common-licenses")
    return Places(
        stdlib if (stdlib / "argparse.py").is_file() else None,
        packages,
        tuple(metadata[name] for name in sorted(metadata)),
        licenses if licenses.is_dir() else None,
    )


def _distribution(folder: str) -> str:
    """The normal name of a package, from its folder: "PyYAML-6.0.3.dist-info" is pyyaml's."""
    return re.sub(r"[-_.]+", "-", folder.partition("-")[0]).lower()


@dataclass(frozen=True)
class TextFile:
    """A file and how to read its text."""

    key: str
    """The file's name below its place: "stdlib/argparse.py"."""
    path: Path
    size: int
    """In bytes."""
    reader: Reader

    def read(self) -> Iterator[tuple[str, str]]:
        """Documents of the file as (what to add to the key, text)."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return iter(())  # a few modules of the standard library are Latin-1
        return self.reader(text)


# ---- the domains: tiers of files, the first tier read first -----------------------------------


def _english(where: Places) -> list[list[TextFile]]:
    reference = [] if where.stdlib is None else [where.stdlib / "pydoc_data" / "topics.py"]
    tiers = [_files(reference, "stdlib/pydoc_data", _topics)]
    for folder in where.metadata:
        tiers[0] += _files([folder / "METADATA"], f"metadata/{folder.name}", _readme)
    tiers.append(_below(where.stdlib, "stdlib", (".py",), _docstrings))
    tiers.append(
        [file for name in _PACKAGES for file in _below(where.packages.get(name), name, (".py",), _docstrings)]
    )
    return tiers


def _python(where: Places) -> list[list[TextFile]]:
    return [
        _below(where.stdlib, "stdlib", (".py",), _code),
        _below(where.packages.get("torch"), "torch", (".py",), _code),
    ]


def _cpp(where: Places) -> list[list[TextFile]]:
    torch = where.packages.get("torch")
    return [_below(torch and torch / "include", "torch/include", (".h", ".hpp", ".cuh"), _code)]


def _legal(where: Places) -> list[list[TextFile]]:
    found = [] if where.stdlib is None else _files([where.stdlib / "LICENSE.txt"], "licenses/stdlib", _prose)
    for folder in where.metadata:
        named = sorted(path for path in folder.rglob("*") if _LICENSE.search(path.name))
        for path in named:
            found += _files([path], f"licenses/{path.parent.relative_to(folder.parent).as_posix()}", _prose)
    if where.licenses is not None:
        found += _files(sorted(where.licenses.iterdir()), "licenses/system", _prose)
    return [found]


DOMAINS: dict[str, Callable[[Places], list[list[TextFile]]]] = {
    "english": _english,
    "python": _python,
    "cpp": _cpp,
    "legal": _legal,
}


def _files(paths: Iterable[Path], place: str, reader: Reader) -> list[TextFile]:
    """Those of the paths that are files; links lead to what another path gives already."""
    plain = [path for path in paths if path.is_file() and not path.is_symlink()]
    return [TextFile(f"{place}/{path.name}", path, path.stat().st_size, reader) for path in plain]


def _below(folder: Path | None, name: str, suffixes: tuple[str, ...], reader: Reader) -> list[TextFile]:
    """Files below a folder; site-packages in the standard library and the like are not entered."""
    found: list[TextFile] = []
    waiting = [] if folder is None or not folder.is_dir() else [(name, str(folder))]
    while waiting:
        place, current = waiting.pop()
        with os.scandir(current) as listing:
            for entry in listing:
                if entry.is_dir():
                    if entry.name not in _SKIPPED:
                        waiting.append((f"{place}/{entry.name}", entry.path))
                elif entry.name.endswith(suffixes) and (size := entry.stat().st_size) <= _MOST_BYTES:
                    found.append(TextFile(f"{place}/{entry.name}", Path(entry.path), size, reader))
    return found


# ---- readers -----------------------------------------------------------------------------------


def _code(text: str) -> Iterator[tuple[str, str]]:
    """Source code as it stands, unless it was generated or is a table."""
    if not _GENERATED.search(text, 0, 2000) and not _is_table(text):
        yield "", text


def _is_table(text: str) -> bool:
    """Mostly numbers and marks, or lines that nobody wrote by hand."""
    letters = sum(map(str.isalpha, text))
    visible = len(text) - sum(map(str.isspace, text))
    return letters < 0.45 * visible or max(map(len, text.split("\n"))) > 2000


def _prose(text: str) -> Iterator[tuple[str, str]]:
    yield "", text


def _docstrings(text: str) -> Iterator[tuple[str, str]]:
    """The prose of a module's docstrings, one after another."""
    quoted = sum(map(len, text.split('"""')[1::2]))
    if quoted < 0.15 * len(text) or _GENERATED.search(text, 0, 2000):
        return  # parsing is slow; modules with little to say are not worth it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(text)
    found = [ast.get_docstring(node) for node in _owners(tree)]
    joined = _prose_of("\n\n".join(docstring for docstring in found if docstring))
    if joined:
        yield "", joined


def _owners(node: Owner) -> Iterator[Owner]:
    """A module and the classes and functions defined in it, in their order."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _owners(child)


def _topics(text: str) -> Iterator[tuple[str, str]]:
    """The language reference: one entry per topic, of a module that only assigns a dictionary of texts."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, entry in ast.literal_eval(node.value).items():
                prose = _prose_of(entry)
                if prose:
                    yield f"#{topic}", prose


def _readme(text: str) -> Iterator[tuple[str, str]]:
    """The paragraphs of a METADATA file's readme that are prose: no badges, tables, code or markup."""
    body = re.sub(r"```.*?```|~~~.*?~~~|<[^<>]*>", "", text.partition("\n\n")[2], flags=re.S)
    prose = _prose_of(body)[:20_000]
    if len(prose) >= 200:
        yield "", prose


def _prose_of(text: str) -> str:
    """The paragraphs that are prose, their lines without indentation; code, tables and lists of names go.

    What is left of a docstring would otherwise look like the code around it, and the domains would differ
    in little but their names.
    """
    kept = [paragraph for paragraph in re.split(r"\n\s*\n", text) if _is_prose(paragraph)]
    lines = "\n\n".join(kept).splitlines()
    return "\n".join(line.strip() for line in lines) + "\n" if kept else ""


def _is_prose(paragraph: str) -> bool:
    words = re.findall(r"(?<![\w/.])[a-z]{2,}(?![\w/])", paragraph)
    letters = sum(map(len, words))
    return len(words) >= 8 and letters >= 0.55 * len(re.sub(r"\s", "", paragraph))
