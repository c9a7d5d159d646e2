"""Folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cambia import files
from cambia.errors import CheckpointError, StorageFullError

STEPS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
"""The calls by which the disk changes; writing a file's text is followed by its `fsync`."""


def write(path: Path, text: str) -> None:
    with files.atomic_folder(path) as temporary:
        (temporary / "a.txt").write_text(text)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b.txt").write_text(text * 2)


def content(path: Path) -> str | None:
    """What a folder holds if it is whole, None if it is not there."""
    if not path.exists():
        return None
    text = (files.verified(path) / "a.txt").read_text()
    assert (path / "inner" / "b.txt").read_text() == text * 2
    return text


def failing_at(number: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the n-th change of the disk fail; returns the list of those that came before."""
    done: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == number:
                how()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, wrapped(name))
    return done


# ---- whole or not there --------------------------------------------------------------------------


def test_a_folder_appears_with_its_hashes(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "ckpt", "text")
    manifest = files.read_json(tmp_path / "deep" / "ckpt" / files.MANIFEST)
    assert manifest["format_version"] == files.FORMAT_VERSION
    assert set(manifest["sha256"]) == {"a.txt", "inner/b.txt"}
    assert content(tmp_path / "deep" / "ckpt") == "text"


def test_an_error_inside_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "ckpt", "old")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "ckpt") as temporary:
        (temporary / "a.txt").write_text("new")
        raise ZeroDivisionError
    assert content(tmp_path / "ckpt") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


KILLED = """
import json, os, sys
from pathlib import Path
from cambia import files
sys.path.insert(0, sys.argv[2])
from tests.test_files import STEPS, content, write

def die_at(number):
    calls = 0
    def wrapped(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in STEPS:
        setattr(os, name, wrapped(getattr(os, name)))

outcomes, number, code = [], 0, 9
while code == 9:
    number += 1
    path = Path(sys.argv[1]) / str(number) / "ckpt"
    path.parent.mkdir()
    if sys.argv[3] == "replacing":
        write(path, "old")
    child = os.fork()
    if not child:
        die_at(number)
        write(path, "new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = content(path)
    files.recover(path)
    outcomes.append([found, content(path), sorted(p.name for p in path.parent.iterdir())])
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("what", ["replacing", "first"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_whole(what: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(root), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    before = "old" if what == "replacing" else None
    recovered = [after for _, after, _ in outcomes]
    assert len(recovered) > 8
    turn = recovered.index("new")
    assert recovered == [before] * turn + ["new"] * (len(recovered) - turn)
    assert all(found in (before, "new", None) for found, _, _ in outcomes), (
        "never a mixture, even unrecovered"
    )
    assert sum(found is None for found, _, _ in outcomes if before) <= 1, "one moment between two renames"
    for _, after, names in outcomes:
        assert names == ([] if after is None else ["ckpt"]), "nothing is left lying about"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=repr)
def test_a_failure_at_any_moment_needs_no_recovery(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    seen, number = [], 1  # the first call makes the parent folder, which is there
    while True:
        number += 1
        path = tmp_path / str(number) / "ckpt"
        write(path, "old")
        with monkeypatch.context() as patch:
            calls = failing_at(number, fail, patch)
            with contextlib.suppress(OSError, KeyboardInterrupt):
                write(path, "new")
        if len(calls) < number:
            break
        seen.append(content(path))
    assert seen.count("old") > 5
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "input/output error")

    for number in (1, 2):
        files.write_text(tmp_path / "x.json", "old")
        with monkeypatch.context() as patch:
            failing_at(number, fail, patch)
            with pytest.raises(OSError, match="input/output"):
                files.write_text(tmp_path / "x.json", "new")
        assert (tmp_path / "x.json").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# ---- what is noticed -----------------------------------------------------------------------------


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    write(tmp_path / "ckpt", "text")
    return tmp_path / "ckpt"


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.verified(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_an_altered_byte_is_noticed(ckpt: Path) -> None:
    (ckpt / "inner" / "b.txt").write_text("textteXt")
    assert "SHA-256 differs" in problem(ckpt)


def test_a_file_cut_short_is_noticed(ckpt: Path) -> None:
    (ckpt / "a.txt").write_text("tex")
    assert "a.txt is not what was written" in problem(ckpt)


def test_a_missing_file_is_noticed(ckpt: Path) -> None:
    (ckpt / "a.txt").unlink()
    assert "a.txt is missing" in problem(ckpt)


def test_a_missing_folder_and_a_missing_manifest_are_told_apart(ckpt: Path) -> None:
    assert "there is no checkpoint folder" in problem(ckpt.parent / "other")
    (ckpt / files.MANIFEST).unlink()
    assert "not one that Cambia wrote" in problem(ckpt)


def test_another_version_is_refused(ckpt: Path) -> None:
    manifest = files.read_json(ckpt / files.MANIFEST)
    files.write_json(ckpt / files.MANIFEST, {**manifest, "format_version": 99})
    assert "checkpoint format 99, this Cambia reads format 1" in problem(ckpt)


@pytest.mark.parametrize("flip", [1, 0x80])
def test_any_altered_byte_of_the_manifest_is_one_line(ckpt: Path, flip: int) -> None:
    whole = (ckpt / files.MANIFEST).read_bytes()
    before = json.loads(whole)
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= flip
        (ckpt / files.MANIFEST).write_bytes(altered)
        try:
            if json.loads(altered) == before:
                continue  # white space
        except ValueError:
            pass
        problem(ckpt)


def test_a_manifest_cut_short_is_one_line(ckpt: Path) -> None:
    whole = (ckpt / files.MANIFEST).read_bytes()
    for length in range(len(whole) - 1):
        (ckpt / files.MANIFEST).write_bytes(whole[:length])
        problem(ckpt)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"format_version": 1}', '{"format_version": 1, "sha256": [1]}']
)
def test_a_manifest_of_another_form_is_one_line(ckpt: Path, text: str) -> None:
    (ckpt / files.MANIFEST).write_text(text)
    problem(ckpt)


# ---- JSON, and a full disk -----------------------------------------------------------------------


def test_json_comes_back_and_says_what_it_cannot_hold(tmp_path: Path) -> None:
    value = {"b": [1, None, True, 2**80, 0.1], "a": "ü\u2028"}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "x.json") == value


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"x\.json is not readable JSON"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'"\xff"')
    with pytest.raises(CheckpointError, match=r"x\.json is not readable JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_loses_nothing(
    ckpt: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(code, "no space left on device")

    for number in range(2, 8):
        with monkeypatch.context() as patch:
            failing_at(number, full, patch)
            with pytest.raises(StorageFullError, match=r"no space left on the disk.*--resume") as caught:
                write(ckpt, "new")
        assert "\n" not in str(caught.value)
        assert content(ckpt) == "text"
        assert [path.name for path in ckpt.parent.iterdir()] == ["ckpt"]


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file" / "ckpt", "new")
