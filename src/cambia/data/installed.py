"""Finding and reading the text that an installed Python brings: modules, headers, readmes, licenses.

Nothing is imported to find or read it. Tests, tables, generated code and files too large to be
written by hand are left out.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

READER_VERSION = 1
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
    """The ``*.dist-info`` folders, by name."""
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
    metadata = {folder.name: folder for root in roots for folder in root.glob("*.dist-info")}
    licenses = Path("/usr/share/common-licenses")
    return Places(
        stdlib if (stdlib / "argparse.py").is_file() else None,
        packages,
        tuple(metadata[name] for name in sorted(metadata)),
        licenses if licenses.is_dir() else None,
    )


@dataclass(frozen=True)
class TextFile:
    """A file and how to read its text."""

    key: str
    """The file's name below its place: "stdlib/argparse.py"."""
    path: Path
    reader: Callable[[str], Iterator[tuple[str, str]]]

    def read(self) -> Iterator[tuple[str, str]]:
        """Documents of the file as (what to add to the key, text)."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return iter(())  # a few modules of the standard library are Latin-1
        return self.reader(text)


# ---- the domains: tiers of files, the first tier read first -----------------------------------


def _english(where: Places) -> list[list[TextFile]]:
    topics = [] if where.stdlib is None else [where.stdlib / "pydoc_data" / "topics.py"]
    reference = [TextFile("stdlib/pydoc_data/topics.py", path, _topics) for path in topics if path.is_file()]
    readmes = [
        TextFile(f"metadata/{folder.name}", folder / "METADATA", _readme)
        for folder in where.metadata
        if (folder / "METADATA").is_file()
    ]
    stdlib = _modules(where.stdlib, "stdlib", _docstrings)
    packages = [_modules(where.packages.get(name), name, _docstrings) for name in _PACKAGES]
    return [reference + readmes, stdlib, [file for files in packages for file in files]]


def _python(where: Places) -> list[list[TextFile]]:
    return [
        _modules(where.stdlib, "stdlib", _code),
        _modules(where.packages.get("torch"), "torch", _code),
    ]


def _cpp(where: Places) -> list[list[TextFile]]:
    if "torch" not in where.packages:
        return []
    return [_below(where.packages["torch"] / "include", "torch/include", (".h", ".hpp", ".cuh"), _code)]


def _legal(where: Places) -> list[list[TextFile]]:
    named = re.compile(r"licen[cs]e|copying|notice|copyright", re.I)
    found = [
        TextFile(f"licenses/{folder.name}/{path.relative_to(folder).as_posix()}", path, _prose)
        for folder in where.metadata
        for path in sorted(folder.rglob("*"))
        if named.search(path.name) and path.is_file()
    ]
    if where.stdlib is not None and (where.stdlib / "LICENSE.txt").is_file():
        found.append(TextFile("licenses/stdlib/LICENSE.txt", where.stdlib / "LICENSE.txt", _prose))
    if where.licenses is not None:
        system = sorted(path for path in where.licenses.iterdir() if path.is_file() and not path.is_symlink())
        found += [TextFile(f"licenses/system/{path.name}", path, _prose) for path in system]
    return [found]


DOMAINS: dict[str, Callable[[Places], list[list[TextFile]]]] = {
    "english": _english,
    "python": _python,
    "cpp": _cpp,
    "legal": _legal,
}


def _modules(
    folder: Path | None, name: str, reader: Callable[[str], Iterator[tuple[str, str]]]
) -> list[TextFile]:
    return [] if folder is None else _below(folder, name, (".py",), reader)


def _below(
    folder: Path, name: str, suffixes: tuple[str, ...], reader: Callable[[str], Iterator[tuple[str, str]]]
) -> list[TextFile]:
    found = []
    # os.walk-like descent by hand, so that site-packages inside the standard library is never entered.
    waiting = [folder]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir():
                if path.name not in _SKIPPED:
                    waiting.append(path)
            elif path.suffix in suffixes and path.stat().st_size <= _MOST_BYTES:
                found.append(TextFile(f"{name}/{path.relative_to(folder).as_posix()}", path, reader))
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
    """A module's docstrings one after another, the short ones left out."""
    quoted = sum(map(len, text.split('"""')[1::2]))
    if quoted < 0.15 * len(text) or _GENERATED.search(text, 0, 2000):
        return  # parsing is slow; modules with little to say are not worth it
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(text)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    joined = "\n\n".join(docstring for docstring in found if docstring and len(docstring) >= 60)
    if joined:
        yield "", joined + "\n"


def _topics(text: str) -> Iterator[tuple[str, str]]:
    """The language reference: one entry per topic, of a module that only assigns a dictionary of texts."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, entry in ast.literal_eval(node.value).items():
                yield f"#{topic}", entry


def _readme(text: str) -> Iterator[tuple[str, str]]:
    """The paragraphs of a METADATA file's readme that are prose: no badges, tables, code or markup."""
    body = re.sub(r"```.*?```|~~~.*?~~~|<[^<>]*>", "", text.partition("\n\n")[2], flags=re.S)
    kept = [paragraph for paragraph in re.split(r"\n\s*\n", body) if _is_prose(paragraph)]
    joined = "\n\n".join(kept)[:20_000]
    if len(joined) >= 200:
        yield "", joined + "\n"


def _is_prose(paragraph: str) -> bool:
    words = re.findall(r"(?<![\w/.])[a-z]{2,}(?![\w/])", paragraph)
    letters = sum(map(len, words))
    return len(words) >= 8 and letters >= 0.55 * len(re.sub(r"\s", "", paragraph))
