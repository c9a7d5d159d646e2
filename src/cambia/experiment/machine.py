"""Where a run is made: on which device, with which software and on which machine."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from cambia import __version__, files
from cambia.errors import ConfigError
from cambia.experiment.tree import Experiment


def find_device(name: str) -> torch.device:
    """The device behind `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ConfigError: it is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"--device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
    }
    if not there[device.type]:
        raise ConfigError(f"--device {name}: there is none on this machine; `cambia doctor` lists devices")
    return device


def memory_bytes() -> float:
    """The memory of this machine; no bound where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf


def provenance(experiment: Experiment) -> dict[str, Any]:
    """With which software and on which machine a run is made."""
    return {
        "cambia_version": __version__,
        "format_version": files.FORMAT_VERSION,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(find_device(experiment.device)),
            "platform": platform.platform(),
        },
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m cambia" if name == "__main__.py" else name


def _cpu_name() -> str:
    """The processor's name; on Linux platform.processor() only tells the kind."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
