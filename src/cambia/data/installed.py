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
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
"""What can have a docstring."""
Reader = Callable[[str], Iterator[tuple[str, str]]]
"""A file's text -> its documents as (what to add to the key, text)."""

READER_VERSION = 9
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
_CPP_COMMENT = re.compile(
    r"""(?P<lines>^[ \t]*(?://[^\n]*|/\*.*?\*/[ \t]*)\n)"""  # what goes: whole lines,
    r"""|//[^\n]*|/\*.*?\*/"""  # and parts of lines
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\[^'\n]+|[^'\\\n])'""",  # what stays: strings and characters
    re.S | re.M,
)
_GONE = "\0"
"""Stands for a line that is left out."""
_TORCH_GUARD = re.compile(
    r"^#if !defined\(TORCH_STABLE_ONLY\).*\n"
    r"|^#else\n#error \"This file should not be included.*\n#endif.*\n?",
    re.M,
)
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()\-.!?]*[.!?]")
_WORD = re.compile(r"(?<![\w.])[A-Za-z]?[a-z]+(?![\w(])")


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
        _below(where.stdlib, "stdlib", (".py",), _python_code),
        _below(where.packages.get("torch"), "torch", (".py",), _python_code),
    ]


def _cpp(where: Places) -> list[list[TextFile]]:
    torch = where.packages.get("torch")
    return [_below(torch and torch / "include", "torch/include", (".h", ".hpp", ".cuh"), _cpp_code)]


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


def _python_code(text: str) -> Iterator[tuple[str, str]]:
    """A module without its docstrings, which are the English domain's, and without comments."""
    for key, code in _code(text):
        lines = code.split("\n")
        levels = _python_levels(lines)
        for owner in _owners(_parsed(code)):
            if ast.get_docstring(owner, clean=False) is not None:
                docstring = owner.body[0]
                first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
                lines[first:last] = [_GONE] * (last - first)
                if len(owner.body) == 1 and not isinstance(owner, ast.Module):
                    lines[first] = "..."
        bare = _laid_out(zip(levels, lines, strict=True), "\t")
        if bare:
            yield key, bare


def _python_levels(lines: list[str]) -> list[int]:
    """How deep each line stands, in blocks and open brackets; takes comments out of the lines."""
    levels = [-1] * len(lines)
    blocks = brackets = 0
    for token in tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__):
        (row, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip() or _GONE
        elif token.type == tokenize.INDENT:
            blocks += 1
        elif token.type == tokenize.DEDENT:
            blocks -= 1
        elif token.string.strip():
            brackets -= token.string in (")", "]", "}")
            for place in range(row - 1, last):
                if levels[place] < 0:
                    levels[place] = blocks + brackets
            brackets += token.string in ("(", "[", "{")
    return levels


def _cpp_code(text: str) -> Iterator[tuple[str, str]]:
    """A header without comments, which are prose, and without the guard around every header of torch."""
    for key, code in _code(text):
        code = _TORCH_GUARD.sub("", code)
        bare = _laid_out(_by_column(_CPP_COMMENT.sub(_without_comment, code)), "  ")
        if bare:
            yield key, bare


def _without_comment(found: re.Match[str]) -> str:
    if found["lines"]:
        return ""
    return " " if found.group().startswith("/") else found.group()


def _by_column(code: str) -> Iterator[tuple[int, str]]:
    """How deep each line stands, by what it is indented below; then the line."""
    columns = [0]  # where the open levels began
    for line in code.expandtabs(4).split("\n"):
        column = len(line) - len(line.lstrip())
        if line.strip():
            while columns[-1] > column:
                columns.pop()
            if column > columns[-1]:
                columns.append(column)
        yield len(columns) - 1, line


def _laid_out(lines: Iterable[tuple[int, str]], indentation: str) -> str:
    """Lines indented by their level alone, without alignment by spaces and blank lines in a row.

    Layout by hand is mostly long runs of spaces, and those teach a small model to write nothing else.
    """
    kept: list[str] = []
    for level, line in lines:
        if line == _GONE:
            continue
        text = re.sub(r"\s{2,}", " ", line.strip())
        if text:
            kept.append(indentation * level + text)
        elif kept and kept[-1]:
            kept.append("")
    return "\n".join(kept).rstrip("\n") + "\n" if kept else ""


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
    found = [ast.get_docstring(node) for node in _owners(_parsed(text))]
    joined = _prose_of("\n\n".join(docstring for docstring in found if docstring))
    if joined:
        yield "", joined


def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        return ast.parse(text)


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
    """The plain sentences of a text, a paragraph to a line; code, tables, names and broken lines go.

    What is left of a docstring would otherwise look like the code around it, and the domains would differ
    in little but their names.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
        plain = " ".join(sentence for sentence in sentences if _is_plain(sentence))
        if plain:
            kept.append(plain)
    return "\n\n".join(kept) + "\n" if kept else ""


def _is_plain(sentence: str) -> bool:
    """Made of words and the marks between them: no markup, identifiers or formulas."""
    if not 30 <= len(sentence) <= 400 or "--" in sentence or not _SENTENCE.fullmatch(sentence):
        return False
    return len(_WORD.findall(sentence)) >= 0.85 * len(sentence.split())
