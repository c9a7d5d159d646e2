"""The pages in docs/ agree with the code: names exist, citations match, messages are what it says."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from cambia.experiment.tune import reward_of
from cambia.growth import AddKVHeads, AddLayers, WidenFFN, WidenHidden, grow
from cambia.models.architectures import ARCHITECTURES
from cambia.sweeps import cells_of, read_grid
from tests.conftest import tiny
from tests.markdown import ROOT, Block, Said, blocks, cambia, run_python
from tests.test_readme import assert_same_text

SRC = ROOT / "src" / "cambia"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ---- all pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- configuration.md ----------------------------------------------------------------------------


def generator(name: str) -> ModuleType:
    """The script in docs/ that writes a page."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration", "architectures", "methods"])
def test_made_pages_are_up_to_date(name: str) -> None:
    assert read(f"{name}.md") == generator(name).page(), f"docs/{name}.md is out of date: make docs"


# ---- architectures.md ----------------------------------------------------------------------------


def test_the_family_that_is_added_as_an_example_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks("docs/architectures.md") if block.note == "runs"]
    monkeypatch.setitem(ARCHITECTURES, "starcoder2", ARCHITECTURES["llama"])  # taken out again afterwards
    exec(compile(block.text, "docs/architectures.md", "exec"), {})
    model = tiny("starcoder2", torch.float64)
    event = grow(model, WidenFFN(factor=1.5), AddLayers(), AddKVHeads(), WidenHidden())
    assert event.exactness == "tolerance" and event.parameters_after > event.parameters_before


# ---- map.md --------------------------------------------------------------------------------------


def test_map_names_what_exists() -> None:
    words = {word for file in SRC.rglob("*.py") for word in re.findall(r"\w+", file.read_text("utf-8"))}
    for span in re.findall(r"`([^`]+)`", read("map.md")):
        if span in ("file.py:name", "make docs", '"my_package.module:MyTrigger"', "src/cambia/"):
            continue
        if re.fullmatch(r"[\w/]+\.py:[\w.]+", span):
            file, _, name = span.partition(":")
            assert (SRC / file).is_file(), f"docs/map.md names the file {file}"
            assert name in _definitions(SRC / file), f"docs/map.md names {name} in {file}"
        elif re.fullmatch(r"[\w/]+\.py|[\w/]+/", span) and not re.match(r"latest/|best/|probes/|ckpt_", span):
            assert (SRC / span).exists(), f"docs/map.md names {span}"
        else:
            # A setting, a tensor, a name in a run directory: each of its words stands somewhere in the code.
            unknown = [word for word in re.findall(r"[A-Za-z_]{3,}", span) if word.rstrip("_") not in words]
            assert not unknown, f"docs/map.md names `{span}`; {unknown} stand nowhere in src"


def _definitions(file: Path) -> set[str]:
    """Functions, classes, methods (as Class.method) and module-level names of a file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)
            }
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_map_shows_every_folder_and_file_on_a_floor() -> None:
    floors = [cells for cells in rows(read("map.md")) if cells[0].isdigit()]
    shown = {span.rstrip("/") for cells in floors for span in re.findall(r"`([^`]+)`", cells[1])}
    there = {path.name for path in SRC.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert shown == there - {"__init__.py", "__main__.py"}


# ---- origins.md ----------------------------------------------------------------------------------


def _is_there(dotted: str) -> bool:
    """Whether `cambia.some.module.Name` can be imported."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


def test_origins_says_truly_what_is_there() -> None:
    states = defaultdict(list)
    for cells in rows(read("origins.md")):
        if cells[-1] in ("now", "later"):
            states[cells[-1]] += re.findall(r"`(cambia\.[\w.]+)`", cells[1])
    assert states["now"] and states["later"]
    assert [name for name in states["now"] if not _is_there(name)] == []
    assert [name for name in states["later"] if _is_there(name)] == [], "these have arrived: say so"


def test_origins_lists_every_old_spelling() -> None:
    listed = {
        (cells[0].strip("`"), cells[1].strip("`"), name)
        for cells in rows(read("origins.md"))
        if len(cells) == 3 and cells[-1] not in ("now", "later")
        for name in re.findall(r"`cambia\.[\w.]*?(\w+)`", cells[2])
    }
    refused = {(old, new, cls.__name__) for cls in _spelled() for old, new in cls.OLD_SPELLINGS.items()}
    assert listed == refused


def _spelled() -> Iterator[Any]:
    """Every class of the configuration that refuses old spellings."""
    for file in SRC.rglob("*.py"):
        if "OLD_SPELLINGS" not in file.read_text(encoding="utf-8") or file.name == "config.py":
            continue
        module = importlib.import_module(".".join(file.relative_to(SRC.parent).with_suffix("").parts))
        for value in vars(module).values():
            renamed = vars(value).get("OLD_SPELLINGS") if isinstance(value, type) else None
            if isinstance(renamed, Mapping) and renamed and dataclasses.is_dataclass(value):
                yield value


# ---- sweeps.md -----------------------------------------------------------------------------------


def test_grids_are_grids() -> None:
    grids = [yaml.safe_load(block.text) for block in blocks("docs/sweeps.md") if block.language == "yaml"]
    counts = [len(cells_of(read_grid(grid))) for grid in grids]
    assert counts == [8, 4]


# ---- other_loops.md ------------------------------------------------------------------------------


def test_other_loops_run_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, printed, after in run_python("docs/other_loops.md"):
        if after is not None and after.language == "text":
            assert_same_text(printed, after.text)


# ---- experts.md ----------------------------------------------------------------------------------


def test_experts_run_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, printed, after in run_python("docs/experts.md"):
        if after is not None and after.language == "text":
            assert_same_text(printed, after.text)


# ---- decoding.md ---------------------------------------------------------------------------------


def test_decoding_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, printed, after in run_python("docs/decoding.md"):
        if after is not None and after.language == "text":
            assert_same_text(printed, after.text)
    for line in rows(read("decoding.md"))[2:]:
        for word in re.findall(r"`([^`]+)`", line[0]):
            reward_of(word)


# ---- papers.md -----------------------------------------------------------------------------------


def test_papers_are_those_that_the_code_cites() -> None:
    cited: dict[str, set[str]] = defaultdict(set)
    for file in SRC.rglob("*.py"):
        for number in re.findall(r"(?i)arxiv(?:\.org/abs/|:)(\d{4}\.\d{4,5})", file.read_text("utf-8")):
            cited[number].add(file.relative_to(SRC).as_posix())
    listed: dict[str, set[str]] = {}
    for cells in rows(read("papers.md")):
        match = re.search(r"arXiv:(\d{4}\.\d{4,5})", cells[0])
        files = set(re.findall(r"`([\w/]+\.py)`", cells[-1]))
        assert all((SRC / file).is_file() for file in files), cells[-1]
        if match:
            listed[match[1]] = files
    assert listed == dict(cited)


# ---- troubleshooting.md --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that troubleshooting.md complains about."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes("Träume sind Schäume.\n".encode("latin-1") * 50)
    (folder / "short.txt").write_text("One line of text is not enough to learn from.\n")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "tree.png").write_bytes(b"\x89PNG")
    row = '{"instruction": "Say tree.", "input": "", "output": "tree"}\n'
    (folder / "broken.jsonl").write_text(row * 2 + row[:-7] + "\n" + row)
    (folder / "answers.jsonl").write_text('{"question": "What grows?", "answer": "A tree."}\n')
    (folder / "wrong.yaml").write_text(
        "data: {tasks: [{name: a, source: {type: generated}}]}\ntraining: {steps: 2, batchsize: 4}\n"
    )
    for name, axes in GRIDS.items():
        (folder / name).write_text(yaml.safe_dump({"base": "smoke", **axes}))
    return folder


GRIDS: dict[str, dict[str, Any]] = {
    "rates.yaml": {"axes": {"optimizer.learning_rate": [0.001, 0.003]}},
    "typo.yaml": {"axes": {"optimizer.learning_rat": [0.001, 0.003]}},
    "nothing.yaml": {"axes": {"optimizer.learning_rate": []}},
    "twice.yaml": {"axes": {"method": {"plain": {}, "same": {"training.steps": 30}}}},
    "many.yaml": {"seeds": 1_000_000},
}


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CAMBIA_CACHE", "cache")
    for name in ("CAMBIA_DATA", "CAMBIA_RUNS"):
        monkeypatch.delenv(name, raising=False)
    said = cambia("cambia run smoke --name finished --training.steps 2 --evaluation.max_bytes 1000")
    assert said.code == 0, said.err
    for name in ("going", "altered", "cut-short", "newer"):
        shutil.copytree("runs/finished", f"runs/{name}")
    weights, state = (
        Path("runs/altered/latest/model.safetensors"),
        Path("runs/cut-short/latest/state.safetensors"),
    )
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    state.write_bytes(state.read_bytes()[:1000])
    manifest = Path("runs/newer/latest/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    with open("runs/going/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the process does that writes the run
        yield place


def test_troubleshooting_shows_what_the_program_says(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for block in blocks("docs/troubleshooting.md"):
        for command, answer in _dialog(block):
            with monkeypatch.context() as patch:
                _arrange(block.note, patch)
                said = _say(command)
            message = said.err.replace(str(here), "/home/ada").strip()
            if said.code != (2 if answer else 0) or (answer and message != answer):
                wrong.append(f"$ {command}\n{message}\n(exit code {said.code}; the page says)\n{answer}")
    assert not wrong, "\n\n".join(wrong)


def _dialog(block: Block) -> Iterator[tuple[str, str]]:
    """Commands with the lines that answer them."""
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, _, answer = part.partition("\n")
        yield command, answer.strip()


def _say(command: str) -> Said:
    if command.startswith("cambia "):
        return cambia(command)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    return Said(done.returncode, done.stdout, done.stderr)


def _arrange(note: str, patch: pytest.MonkeyPatch) -> None:
    """Make the machine as the comment above a block says."""
    if note == "with a full disk":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("cambia.files.fsync_path", full)
    elif note == "without memory":

        def exhausted(*_: object, **__: object) -> None:
            raise MemoryError

        patch.setattr("cambia.data.streams.Stream.next_batch", exhausted)
    else:
        assert not note, f"nobody knows how to arrange {note!r}"
