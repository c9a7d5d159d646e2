"""README cannot rot: its Python prints what it says, its commands run, and make does what they do."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.markdown import ROOT, blocks, cambia, commands, run_python

README = "README.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as README's reader has it, with notes and questions of their own."""
    folder = tmp_path_factory.mktemp("readme")
    words = ["bark", "cambium", "leaf", "rain", "ring", "root", "soil", "spring", "trunk", "wood", "year"]
    chance = random.Random(0)
    (folder / "notes").mkdir()
    for name in ("spring", "summer"):
        lines = [" ".join(chance.choices(words, k=12)) for _ in range(300)]
        (folder / "notes" / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    rows = [
        {"instruction": f"Add {i} to {i + 1}.", "input": "", "output": f"{2 * i + 1}"} for i in range(600)
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    for block in blocks(README):
        if block.language == "yaml":
            (folder / _file_name(block.text)).write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CAMBIA_CACHE", str(place / "cache"))
    for name in ("CAMBIA_DATA", "CAMBIA_RUNS"):
        monkeypatch.delenv(name, raising=False)
    return place


def _file_name(yaml: str) -> str:
    first = yaml.partition("\n")[0]
    assert re.fullmatch(r"# \w+\.yaml", first), f"a YAML block begins with its file's name, not {first!r}"
    return first[2:]


# ---- Python --------------------------------------------------------------------------------------


def test_python_prints_what_is_shown(here: Path) -> None:
    shown = blocks(README)
    assert shown[0].language == "python", "the first thing to see is Python"
    for block, printed, after in run_python(README):
        assert after is not None and after.language == "text", f"no output is shown after\n{block.text}"
        assert_same_text(printed, after.text)


def assert_same_text(printed: str, shown: str) -> None:
    """Equal but for the last digits of decimal numbers, which differ between processors."""
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    for got, expected in zip(re.findall(number, printed), re.findall(number, shown), strict=True):
        assert float(got) == pytest.approx(float(expected), rel=0.05, abs=0.1)


# ---- commands ------------------------------------------------------------------------------------


def test_commands_run(here: Path) -> None:
    for block in blocks(README):
        if block.language != "console":
            continue
        for command in commands(block.text):
            if command.startswith("cambia "):
                said = cambia(command, *_shorter(command))
                assert said.code == 0, f"$ {command}\n{said.err}"
            else:
                assert command.split()[0] in ("make", "python3", ".", "pip", "pytest"), command
    assert Path("runs/first-try/report.html").is_file()
    assert Path("stock-llama/model.safetensors").is_file()
    # A bare `cambia run` is the first growth: three events, about a million parameters at the end.
    lines = Path("runs/first_growth/growth.jsonl").read_text(encoding="utf-8").splitlines()
    grown = [json.loads(line) for line in lines]
    assert [event["operators"][0]["type"] for event in grown] == ["add_layers", "widen_ffn", "add_layers"]
    assert grown[-1]["parameters_after"] == 1_017_984


def _shorter(command: str) -> list[str]:
    """Flags that make a training run take a second; it still does everything once."""
    words = command.split()[1:]
    if words[0] == "learn":
        return ["--steps", "4", "--evaluation.max_bytes", "1000", "--methods.0.background_rows", "8"]
    if words[0] not in ("run", "plan") or {"--resume", "--dry-run"} & set(words):
        return []
    if words[0] == "plan":
        return _generated(words[1:], "fixed_size")
    lengths = {"epochs": "null", "steps": 2, "batch_size": 4, "sequence_length": 32}
    shorter = [word for name, value in lengths.items() for word in (f"--training.{name}", str(value))]
    shorter += ["--evaluation.max_bytes", "1000", "--checkpoint.keep_tasks", "false"]
    return shorter + _generated(words[1:], "first_growth")


def _generated(words: list[str], default: str) -> list[str]:
    """Flags that put generated text in the place of a recipe's embedded domains, which take long to read."""
    from cambia.config import parse_flags
    from cambia.data import EmbeddedSource
    from cambia.experiment import read_experiment

    recipe = words.pop(0) if words and not words[0].startswith("-") else default
    of_the_command = ("name", "layers", "tokens", "flops", "out")
    flags = {name: value for name, value in parse_flags(words).items() if name not in of_the_command}
    found = []
    for i, task in enumerate(read_experiment(recipe, flags).data.tasks):
        if isinstance(task.source, EmbeddedSource):
            for name, value in {"type": "generated", "seed": i, "size_bytes": 30_000}.items():
                found += [f"--data.tasks.{i}.source.{name}", str(value)]
    return found


# ---- set-up --------------------------------------------------------------------------------------


def _make(target: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # An environment that is not there, so that make says all that it would do.
    command = ["make", "--dry-run", "--no-print-directory", "VENV=.not-there", "ARGS=", target]
    environment = {**os.environ, "MAKEFLAGS": ""}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_make_does_what_the_plain_commands_do() -> None:
    setup = [commands(block.text) for block in blocks(README) if block.language == "console"]
    assert setup[0] == ["make demo", "make test"]
    environment, activate, install, run, test = setup[1]
    assert activate == ". .venv/bin/activate"
    demo, tests = _make("demo"), _make("test")
    for said in (demo, tests):
        assert environment.replace(".venv", ".not-there") in said
        assert install in said
    assert demo.splitlines()[-1].strip().endswith("/" + run)
    assert tests.splitlines()[-1].strip().endswith("/" + test)


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_constraints_pin_every_dependency_and_name_no_host() -> None:
    import tomllib

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line)
            assert match, f"constraints.txt holds {line!r}; expected name==version"
            pins[match[1]] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(item for extra in extras.values() for item in extra)]:
        name = re.split(r"[^\w-]", requirement)[0].lower()
        assert name in pins, f"{name} has no tested version in constraints.txt"
