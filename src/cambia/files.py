"""Folders of safetensors and JSON that are either whole or not there.

A folder is written under a temporary name, every file and the folder itself are flushed to the disk,
and only then is it renamed to its real name. A crash leaves the old folder or the new one, never a
mixture. `manifest.json` holds the SHA-256 of each file, so a folder that was cut short or altered
afterwards is noticed before anything of it is used.

    >>> with atomic_folder("ckpt") as tmp:
    ...     write_json(tmp / "state.json", {"step": 3})
    >>> read_json(verified("ckpt") / "state.json")
    {'step': 3}
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

from cambia.errors import CheckpointError, ConfigError, StorageFullError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def expanded(path: str | Path) -> Path:
    """A path with the home folder that a leading ~ or ~user stands for.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: there is no user of that name; write the folder out instead of ~"
        ) from None


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk (a folder's entries are its content)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_line_when_full(path: str | Path) -> Generator[None]:
    """Turn the system's "no space left on device" while writing at `path` into `StorageFullError`."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers write by themselves and raise errors of their own kinds.
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise StorageFullError(
            f"no space left on the disk while writing {path}; nothing written before was lost: "
            "free some space (older runs: `cambia runs delete NAME`) and go on with --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step: readers see the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with one_line_when_full(path):
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and without NaN, atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a broken file raises `CheckpointError` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder is not one that Cambia wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); it was altered or cut short") from None


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Give a temporary folder to fill; when the block ends without an error it becomes `path`.

    A folder already at `path` is replaced. Between the two renames that this takes, the old one lies
    beside it under ``.old`` names; `recover` puts it back if the process died just then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with one_line_when_full(path):
        try:
            temporary.mkdir()
            yield temporary
            _seal(temporary)
            _swap_in(temporary, path)
        except BaseException:
            recover(path)
            raise


def _seal(folder: Path) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    hashes = {name: sha256_file(folder / name) for name in names}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "sha256": hashes})
    for name in names:
        fsync_path(folder / name)
    fsync_path(folder)


def _swap_in(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    fsync_path(path.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(path: str | Path) -> None:
    """Undo what a crash inside `atomic_folder` left: restore the old folder, drop half-written ones.

    Call it only where no other process is writing: the run's lock sees to that.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def verified(path: str | Path) -> Path:
    """Check a folder against its manifest and return its path.

    Raises:
        CheckpointError: it is missing, of another version, or a file is missing or was altered.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}; `cambia runs list` shows the runs")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise CheckpointError(f"{path / MANIFEST} lists no files: it was altered, use another checkpoint")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this Cambia reads format {FORMAT_VERSION}: "
            "open it with the version of Cambia that wrote it (summary.json names it)"
        )
    for name, expected in manifest["sha256"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: the checkpoint is incomplete, use another one")
        if sha256_file(path / name) != expected:
            raise CheckpointError(
                f"{path / name} is not what was written (its SHA-256 differs): it was altered or cut "
                "short, use another checkpoint of the run"
            )
    return path
