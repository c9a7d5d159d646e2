"""The same continual-learning methods in Avalanche and in Cambia: the same steps, and the same results.

    cambia bench continual_peers --preset full --peers-python PEERS/bin/python

Avalanche lives in an environment of its own, whose interpreter is named by `--peers-python`. A stock Llama of
68,000 parameters learns three generated tasks one after another, on either side from the same weights, on the
same batches in the same order, with the same optimizer: `unlike` are counting, arithmetic and brackets, each
with symbols of its own, `alike` are three ways to count. The sides are in `benchmarks/peers/continual/`: ours
is the `Trainer`, theirs a `SupervisedTemplate` with its own plugins.

    checks   where nothing is drawn by chance, both must come to the same but for rounding: naive training;
             EWC whose Fisher information one side lends the other; replay and A-GEM after a task of one row,
             so that every memory holds the same
    arms     as each is used, over some seeds: naive, EWC and replay with AdamW, naive and A-GEM with SGD
    tuning   EWC over its strength on other seeds; each side takes its best

Nothing is timed, and both sides run at once, each with half of the threads.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import PathOption, arguments, keep
from peers.continual.course import BATCH, LENGTH, Run
from peers.continual.ours import STREAMS, Course
from peers.continual.page import markdown as markdown
from transformers.utils.logging import disable_progress_bar

from cambia import bench

INSTALL = (
    "python -m venv PEERS && PEERS/bin/pip install -c constraints.txt torch torchvision==0.28.0 transformers "
    "torchmetrics dill psutil tqdm scikit-learn matplotlib gdown pytorchcv wandb tensorboard gputil quadprog "
    "qpsolvers setuptools && PEERS/bin/pip install --no-deps avalanche-lib==0.6.0"
)
PER_STRENGTH = BATCH * LENGTH / 2
"""What of `ewc_lambda` does as much as 1 of our strength, were the gradients of a batch's tokens independent:
Avalanche squares their mean, we take the mean of their squares, and its penalty has no half in it."""
STRENGTHS = (1e2, 1e3, 1e4, 3e4, 1e5, 1e6)
FIRST_TUNING_SEED = 100


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    adamw: int
    """Steps on each task."""
    sgd: int
    """Steps on each task."""
    checks: int
    """Steps on each task of what must come to the same: rounding grows on the way."""
    seeds: int = 5
    tuning_seeds: int = 2
    strengths: tuple[float, ...] = STRENGTHS


PRESETS = {
    "quick": Preset(15, 15, 15, seeds=1, tuning_seeds=1, strengths=(1e4,)),
    "full": Preset(120, 300, 40),
}


@dataclass(frozen=True)
class Place:
    """Where both sides run."""

    peers: Path
    course: Course
    threads: int
    """Of each side."""

    def both(self, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Every run on both sides, and what Avalanche was."""
        for run in runs:
            self.course.lay_down(run)
        plan, result = (self.course.folder / name for name in ("plan.json", "result.json"))
        plan.write_text(json.dumps([asdict(run) for run in runs]))
        command = [self.peers, "-W", "ignore", "-m", "peers.continual.theirs"]
        settings = {
            "PYTHONPATH": os.pathsep.join([str(bench.FOLDER), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
        }
        with subprocess.Popen(
            [*command, self.course.folder, plan, result], env={**os.environ, **settings}
        ) as process:
            ours = {run: self.course.train(run) for run in runs if not run.lent}
            if process.wait():
                sys.exit(f"Avalanche's side failed with exit status {process.returncode}; see above")
        ours |= {run: self.course.train(run) for run in runs if run.lent}
        told = json.loads(result.read_text())
        pairs = [
            {"run": asdict(run), "ours": ours[run], "theirs": matrix}
            for run, matrix in zip(runs, told["matrices"], strict=True)
        ]
        return pairs, told["about"]


@dataclass(frozen=True)
class Strength:
    """Of EWC on both sides."""

    strength: float
    ewc_lambda: float

    def run(self, stream: str, seed: int, steps: int, *, lent: bool = False) -> Run:
        return Run("ewc", stream, seed, "adamw", steps, self.strength, self.ewc_lambda, lent=lent)


def tuned(preset: Preset, place: Place) -> list[dict[str, Any]]:
    """EWC over its strength, on seeds of its own."""
    tried = [Strength(each, each * PER_STRENGTH) for each in preset.strengths]
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + preset.tuning_seeds)
    runs = [each.run(stream, s, preset.adamw) for stream in STREAMS for each in tried for s in seeds]
    return place.both(runs)[0]


def best(tuning: Sequence[dict[str, Any]], stream: str) -> Strength:
    """The strength of each side with which the tasks of a stream end lowest, on average over seeds."""
    taken = []
    for side, name in (("ours", "strength"), ("theirs", "ewc_lambda")):
        ends: dict[float, list[float]] = {}
        for one in tuning:
            if one["run"]["stream"] == stream:
                ends.setdefault(one["run"][name], []).append(statistics.fmean(one[side][-1]))
        taken.append(min(ends, key=lambda strength: statistics.fmean(ends[strength])))
    return Strength(*taken)


def arms(preset: Preset, taken: dict[str, Strength]) -> list[Run]:
    """The methods as they are used. A-GEM projects gradients, which is sound with plain SGD alone; with that
    the tasks that are alike are not learned in so few steps."""
    found = []
    for seed in range(preset.seeds):
        for stream, strength in taken.items():
            found += [
                Run("naive", stream, seed, "adamw", preset.adamw),
                strength.run(stream, seed, preset.adamw),
                Run("replay", stream, seed, "adamw", preset.adamw),
            ]
        found += [Run(method, "unlike", seed, "sgd", preset.sgd) for method in ("naive", "agem")]
    return found


def checks(steps: int, strength: Strength) -> list[Run]:
    """Runs in which nothing is left to chance, with naive ones on the same rows."""
    lending = Strength(2 * strength.ewc_lambda, strength.ewc_lambda)  # their penalty has no half in it
    return [
        Run("naive", "unlike", 0, "adamw", steps),
        lending.run("unlike", 0, steps, lent=True),
        Run("naive", "one_row", 0, "adamw", steps),
        Run("replay", "one_row", 0, "adamw", steps),
        Run("naive", "one_row", 0, "sgd", steps),
        Run("agem", "one_row", 0, "sgd", steps),
    ]


def measured(preset: Preset, place: Place) -> dict[str, Any]:
    """Everything that the page says."""
    tuning = tuned(preset, place)
    taken = {stream: best(tuning, stream) for stream in STREAMS}
    used, same = arms(preset, taken), checks(preset.checks, taken["unlike"])
    pairs, avalanche = place.both([*used, *same])
    return {
        "preset": asdict(preset),
        "avalanche": avalanche,
        "checks": pairs[len(used) :],
        "arms": pairs[: len(used)],
        "tuning": tuning,
        "taken": {stream: asdict(strength) for stream, strength in taken.items()},
    }


def main() -> None:
    options = arguments(
        __doc__,
        PRESETS,
        {"--peers-python": PathOption("an interpreter that has Avalanche", "PEERS/bin/python")},
        clocked=False,
    )
    if not options.peers_python:
        sys.exit(f"Avalanche is not there: {INSTALL}, then --peers-python PEERS/bin/python")
    peers = Path(options.peers_python).absolute()
    if not peers.is_file():
        sys.exit(f"--peers-python {peers} is no interpreter; {INSTALL}")
    disable_progress_bar()
    threads = max(1, options.threads // 2)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        preset = PRESETS[options.preset]
        place = Place(peers, Course(Path(folder)), threads)
        result = measured(preset, place)
    torch.set_num_threads(options.threads)
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
