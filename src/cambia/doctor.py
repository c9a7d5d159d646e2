"""`cambia doctor`: what this machine has, in lines that can be pasted into a question."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from cambia import __version__, rundir
from cambia.data.embedded import DOMAINS, EmbeddedSource

_CORE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "cyclopts",
    "pydantic",
    "rich",
    "matplotlib",
)
_EXTRAS = {
    "data": ("datasets", "pyarrow"),
    "peft": ("peft",),
    "sweep": ("optuna", "cmaes"),
    "ray": ("ray",),
}


def examine() -> Iterator[str]:
    """One line per finding."""
    yield f"cambia {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield "  ".join(f"{name} {importlib.metadata.version(name)}" for name in _CORE)
    yield f"devices: {', '.join(_devices())}"
    yield f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores (--threads N sets them)"
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        state = f"missing {', '.join(missing)}: pip install 'cambia[{extra}]'" if missing else "installed"
        yield f"extra {extra}: {state}"
    bubblewrap = shutil.which("bwrap")
    yield f"sandbox: {bubblewrap or 'no bubblewrap (bwrap); only needed to run generated code'}"
    count = len(rundir.list_runs())
    yield f"runs: {count} in {rundir.runs_root().resolve()} ($CAMBIA_RUNS moves them)"
    folder = os.environ.get("CAMBIA_DATA")
    yield f"data: {folder or '$CAMBIA_DATA is not set (only needed for corpora of your own)'}"
    for domain in DOMAINS:
        fallback = EmbeddedSource(domain).describe().get("fallback")
        yield f"embedded text {domain}: {fallback or 'found on this machine'}"


def _devices() -> Iterator[str]:
    yield f"cpu ({platform.processor() or platform.machine()})"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i} ({torch.cuda.get_device_name(i)})"
    if torch.backends.mps.is_available():
        yield "mps"
