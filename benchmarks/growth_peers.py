"""The same checkpoint grown by other tools and by Cambia: exact or not, alive or not, time, memory.

    cambia bench growth_peers --preset full --peers-python PEERS/bin/python --parts FOLDER

mergekit and GroMo live in an environment of their own, whose interpreter is named by `--peers-python`;
without it their rows are left out. The data is that of CAMBIA_DATA: stories260K, a trained Llama of 260,032
parameters, and Tiny Shakespeare. The sides are in `benchmarks/peers/`; each runs in a process of its own, as
its users would, from a checkpoint to a checkpoint. What was measured is kept in the folder of `--parts`, so
that a run that was broken off goes on from there.

    facts     on stories260K: logits before and after in float32, which new entries have a gradient after two
              steps of AdamW, what became of an optimizer, whether the stock class opens the result
    cost      on a random Llama of 110 million parameters: seconds of loading, growing and saving, beside
              those on stories260K, and memory above that on stories260K; sides alternate, medians
    training  stories260K after some steps on Shakespeare, grown, and trained on: same batches, some seeds
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import Parts, PathOption, arguments, keep, machine, median_interval
from peers.arms import DEPTH, FEED_FORWARD, Course, compared
from peers.judging import judge
from peers.llama import Pieces, batches, random_llama, stories, text
from peers.page import markdown
from peers.sides import INSTALL, PEERS, SIDES, TOKENS_FILE, Place, Side, installed, new_places
from transformers.utils.logging import disable_progress_bar

UNITS, PLAIN_UNITS, LAYERS, TOKENS = 43, 64, 5, 64
"""Growth of stories260K. 43 gated units and 64 plain ones have 8,256 and 8,192 weights a layer."""
PRESETS = {
    "quick": {"width": 256, "depth": 4, "repeats": 1, "seeds": 1, "steps": 20},
    "full": {"width": 768, "depth": 16, "repeats": 3, "seeds": 3, "steps": 200},
}


def amount_of(side: Side, *, units: int, layers: int) -> int:
    """By how much a side grows a model."""
    return {"feed-forward width": units, "tokens": TOKENS}.get(side.operation, layers)


def available(place: Place) -> list[Side]:
    """The sides whose library is there; says what the others need."""
    missing = sorted(set(PEERS) - place.libraries)
    if missing:
        say(f"left out: {' and '.join(missing)}. For them: {INSTALL}, then --peers-python PEERS/bin/python")
    return [side for side in SIDES if place.has(side)]


def facts(sides: list[Side], place: Place, source: Path, tokens: torch.Tensor) -> dict[str, dict[str, Any]]:
    """What each side makes of the small model."""
    rows = {}
    target = place.folder / "grown"
    depth = sizes(source)["num_hidden_layers"]
    for side in sides:
        amount = amount_of(side, units=PLAIN_UNITS if side.is_plain else UNITS, layers=LAYERS)
        say(f"facts: {side.library}")
        command = place.command(side, source, target, amount)
        row = place.run([*command, "--judge"] if side.is_plain else command)
        if "failed" not in row and target.exists():
            layers = [] if side.operation in ("feed-forward width", "tokens") else new_places(depth, amount)
            row |= judge(source, target, stream=batches(tokens, 0), layers=layers)
            shutil.rmtree(target)
        if "failed" not in row and side.is_live:
            row["optimizer"] = place.run([*command, "--with-optimizer"]).get("optimizer", "fails")
            shutil.rmtree(target)
        rows[side.name] = row
    return rows


def costs(
    sides: list[Side],
    place: Place,
    small: Path,
    large: Path,
    parts: Parts,
    *,
    repeats: int,
    skipped: set[str],
) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of each side on a larger checkpoint, and above what it takes on a tiny one."""
    found: dict[str, list[Any]] = {
        side.name: [] for side in sides if side.measured and side.name not in skipped
    }
    turns = [side for side in sides if side.name in found]
    warm_up = repeats > 1
    for repeat in range(repeats + warm_up):
        say(f"cost, {repeat + 1} of {repeats + warm_up}")
        for side in turns if repeat % 2 else turns[::-1]:
            pair = parts.once(
                f"cost {repeat} {side.name}",
                lambda s=side: [once(s, place, source) for source in (small, large)],
            )
            if repeat or not warm_up:
                found[side.name].append(pair)
    return {name: summary(pairs) for name, pairs in found.items()}


def once(side: Side, place: Place, source: Path) -> dict[str, Any]:
    """A side's process, on a model of any size: half as much again of what grows."""
    model = sizes(source)
    units = model["hidden_size"] if side.is_plain else model["intermediate_size"] // 2
    amount = amount_of(side, units=units, layers=model["num_hidden_layers"] // 2)
    target = place.folder / "grown"
    result = place.run(place.command(side, source, target, amount))
    shutil.rmtree(target, ignore_errors=True)
    if "failed" in result:
        raise SystemExit(f"{side.library}: {result['failed']}")
    return result


def summary(pairs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians; memory above that of the tiny model."""
    growing = [large["grow_seconds"] for _, large in pairs if "grow_seconds" in large]
    memory = {
        key: statistics.median(large[key] - small[key] for small, large in pairs)
        for key in ("anonymous_bytes", "resident_bytes")
    }
    return {
        "seconds": median_interval([large["seconds"] for _, large in pairs]),
        "start_up_seconds": statistics.median(small["seconds"] for small, _ in pairs),
        "grow_seconds": statistics.median(growing) if growing else None,
        **memory,
    }


def say(what: str) -> None:
    print(what, file=sys.stderr)


def sizes(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def prepared(model: Any, folder: Path, tokens: Any) -> Path:
    """A checkpoint in a folder, with the text beside it."""
    model.save_pretrained(folder)
    torch.save(tokens, folder / TOKENS_FILE)
    return folder


def measured(options: Any, data: Path, place: Place, parts: Parts) -> dict[str, Any]:
    """Everything that the page says."""
    preset = PRESETS[options.preset]
    everything = text(data, Pieces(data / "stories260K" / "tok512.bin"))
    small = prepared(stories(data / "stories260K"), place.folder / "stories", everything)
    large_model = random_llama(preset["width"], preset["depth"])
    parameters = large_model.num_parameters()
    large = prepared(large_model, place.folder / "large", everything)
    del large_model
    sides = available(place)
    found = parts.once("facts", lambda: facts(sides, place, small, everything[0]))
    failed = {name for name, row in found.items() if "failed" in row}
    paid = costs(sides, place, small, large, parts, repeats=preset["repeats"], skipped=failed)
    course = Course(
        data=data,
        tokens=everything[0],
        held_out=everything[1],
        tokens_file=small / TOKENS_FILE,
        before=preset["steps"],
        after=preset["steps"],
        units=UNITS,
        plain_units=PLAIN_UNITS,
        layers=LAYERS,
    )
    training = []
    for seed in range(preset["seeds"]):
        for name, arms in (("feed-forward", FEED_FORWARD), ("depth", DEPTH)):
            say(f"training, seed {seed + 1} of {preset['seeds']}: {len(arms)} arms of {name}")
            training += parts.once(
                f"training {seed} {name}", lambda s=seed, a=arms: compared(course, place, s, a)
            )
    return {
        "large": {"parameters": parameters, "bytes": parameters * 4, **preset},
        "facts": found,
        "costs": paid,
        "training": training,
    }


def main() -> None:
    options = arguments(
        __doc__,
        PRESETS,
        {
            "--peers-python": PathOption("an interpreter that has mergekit and GroMo", "PEERS/bin/python"),
            "--parts": PathOption(
                "a folder for what was measured, so that a run broken off can go on", "FOLDER"
            ),
        },
    )
    data = os.environ.get("CAMBIA_DATA")
    if not data or not (Path(data) / "stories260K").is_dir():
        sys.exit("CAMBIA_DATA names no folder with stories260K and tiny-shakespeare in it: set it to one")
    disable_progress_bar()
    peers = Path(options.peers_python).absolute() if options.peers_python else None
    if peers and not peers.is_file():
        sys.exit(f"--peers-python {peers} is no interpreter; {INSTALL}")
    libraries = installed(peers)
    parts = Parts(options.parts, PRESETS[options.preset] | machine() | {"libraries": sorted(libraries)})
    with tempfile.TemporaryDirectory() as folder:
        result = measured(options, Path(data), Place(peers, libraries, options.threads, Path(folder)), parts)
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
