"""The sides: which command each is, and how one is run and watched.

A side takes a checkpoint, an amount and the folder to write. Its memory is the largest anonymous resident
size of its process (`RssAnon` of /proc, looked at every two milliseconds): what it allocates, and not the
pages of a mapped checkpoint, which the system can drop. To leave out the interpreter and its imports, the
same side's figures on the small model are subtracted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
PEERS = ("gromo", "mergekit")
INSTALL = (
    "python -m venv PEERS && PEERS/bin/pip install -c constraints.txt torch mergekit==0.1.5 gromo==0.1.0"
)
EVERY_SECONDS = 0.002
TOKENS_FILE = "tokens.pt"
"""Beside a checkpoint: what GroMo looks at."""


@dataclass(frozen=True)
class Side:
    """One way to do one operation."""

    name: str
    operation: str
    """What grows: feed-forward width, depth, tokens, everything."""
    library: str
    module: str
    """Module of this folder, or `mergekit`."""
    task: str
    """What the module is told to do."""
    cannot: str = ""
    measured: bool = True
    """Whether time and memory are measured on the large model."""

    @property
    def needs(self) -> str | None:
        """The library that must be in the peers' environment."""
        return next((name for name in PEERS if self.module.startswith(name)), None)

    @property
    def is_plain(self) -> bool:
        """Whether plain units come beside the gated ones, and judges itself."""
        return self.module == "gromo_computed"

    @property
    def is_live(self) -> bool:
        """Whether it grows a model in memory, so that an optimizer could go along."""
        return self.module in ("ours", "by_hand", "gromo_gated")


WIDTH, DEPTH, TOKENS = "feed-forward width", "depth", "tokens"
SIDES = [
    Side("cambia", WIDTH, "Cambia, `WidenFFN`", "ours", "widen_ffn"),
    Side("cambia_split", WIDTH, "Cambia, `WidenFFN(initial='split')`", "ours", "split_ffn"),
    Side("cambia_disk", WIDTH, "Cambia, on the disk", "ours_on_disk", "widen_ffn"),
    Side(
        "net2net",
        WIDTH,
        "Net2Net, equal clones",
        "by_hand",
        "net2net",
        "feed-forward only",
    ),
    Side("zeros", WIDTH, "zeros on both sides", "by_hand", "zeros", "what is new never learns"),
    Side(
        "gromo_random",
        WIDTH,
        "GroMo, random units",
        "gromo_gated",
        "random",
        "takes a gated layer only with gate and up woven into one layer by hand; no attention, hidden size, "
        "tokens",
    ),
    Side(
        "gromo_tiny",
        WIDTH,
        "GroMo, computed units (TINY) in a plain block beside each gated layer",
        "gromo_computed",
        "tiny",
        "the model is no Llama afterwards; at most as many units an event as the model is wide",
    ),
    Side("cambia_depth", DEPTH, "Cambia, `AddLayers`", "ours", "add_layers"),
    Side("cambia_depth_disk", DEPTH, "Cambia, on the disk", "ours_on_disk", "add_layers"),
    Side("mergekit", DEPTH, "mergekit, copies", "mergekit", "copies", "no width, no live model"),
    Side(
        "mergekit_silent",
        DEPTH,
        "mergekit, copies with `scale: 0` on o_proj and down_proj",
        "mergekit",
        "silent",
        "no width, no live model; the exact recipe is the user's to know",
    ),
    Side("cambia_copies", DEPTH, "Cambia, `AddLayers(preserve=False)`", "ours", "copy_layers"),
    Side("cambia_tokens", TOKENS, "Cambia, `AddTokens`", "ours", "add_tokens"),
    Side("resize", TOKENS, "transformers, `resize_token_embeddings`", "by_hand", "resize", "tokens only"),
    Side("everything", "all at once", "Cambia, six operators", "ours", "everything", measured=False),
]


@dataclass(frozen=True)
class Place:
    """Where the sides run."""

    peers: Path | None
    """The interpreter of the peers' environment."""
    libraries: frozenset[str]
    """Which of `PEERS` it has."""
    threads: int
    folder: Path

    def has(self, side: Side) -> bool:
        """Whether a side's library is there."""
        return side.needs is None or side.needs in self.libraries

    def command(self, side: Side, source: Path, target: Path, amount: int) -> list[str]:
        """What to run."""
        if side.module == "mergekit":
            assert self.peers is not None
            recipe = target.with_suffix(".yaml")
            recipe.write_text(json.dumps(mergekit_recipe(source, amount, silent=side.task == "silent")))
            tool = str(self.peers.parent / "mergekit-yaml")
            return [tool, str(recipe), str(target), "--no-copy-tokenizer", "--quiet"]
        python = str(self.peers) if side.needs else sys.executable
        if side.module == "gromo_computed":
            told = [side.task, str(source), f"--tokens={source / TOKENS_FILE}", f"--amount={amount}"]
            return [python, "-m", f"peers.{side.module}", *told, "--together", "--passes=2"]
        where = [side.task, str(source), str(target), "--amount", str(amount)]
        return [python, "-m", f"peers.{side.module}", *where]

    def run(self, command: list[str]) -> dict[str, Any]:
        """Run a command to its end; what it printed as JSON, its seconds and its memory, or its error."""
        threads = str(self.threads)
        # The allocator gives tensors pages of their own, so that freed ones are seen to be free.
        settings = {"OMP_NUM_THREADS": threads, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as err:
            began = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=out, stderr=err, env={**os.environ, **settings, "PYTHONPATH": path}
            )
            memory = _watch(process)
            seconds = time.perf_counter() - began
            out.seek(0), err.seek(0)
            printed, said = out.read().strip().splitlines(), err.read().strip().splitlines()
        if process.returncode:
            return {"failed": said[-1] if said else f"exit status {process.returncode}"}
        result = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
        return {**result, **memory, "seconds": seconds}


def installed(python: Path | None) -> frozenset[str]:
    """Which of `PEERS` an interpreter can import."""
    if python is None:
        return frozenset()
    tried = {name: subprocess.run([python, "-c", f"import {name}"], capture_output=True) for name in PEERS}
    return frozenset(name for name, process in tried.items() if not process.returncode)


def behind(depth: int, count: int) -> list[int]:
    """The layers behind which `count` copies stand, spread evenly; as Cambia interposes them."""
    return [int((i + 0.5) * depth / count) for i in range(count)]


def new_places(depth: int, count: int) -> list[int]:
    """Where the copies are afterwards."""
    return [layer + 1 + i for i, layer in enumerate(behind(depth, count))]


def mergekit_recipe(source: Path, count: int, *, silent: bool) -> dict[str, Any]:
    """mergekit's configuration: each slice is one layer, copies stand behind their originals."""
    depth = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    quiet = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    slices = []
    for layer in range(depth):
        original = {"model": str(source), "layer_range": [layer, layer + 1]}
        slices.append({"sources": [original]})
        for _ in range(behind(depth, count).count(layer)):
            copied = {**original, "parameters": {"scale": quiet}} if silent else original
            slices.append({"sources": [copied]})
    return {"slices": slices, "merge_method": "passthrough", "dtype": "float32"}


def _watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Peaks of a process's memory until it ends, in bytes."""
    status = Path(f"/proc/{process.pid}/status")
    anonymous = resident = 0
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            break
        if "RssAnon" in fields:  # not in a process that has ended and waits to be read
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]) * 1024)
            resident = max(resident, int(fields["VmHWM"].split()[0]) * 1024)
        time.sleep(EVERY_SECONDS)
    process.wait()
    return {"anonymous_bytes": anonymous, "resident_bytes": resident}
