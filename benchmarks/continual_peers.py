"""The same continual-learning methods in Avalanche and in Cambia: the same steps, and the same results.

    cambia bench continual_peers --preset full --peers-python PEERS/bin/python

Avalanche lives in an environment of its own, whose interpreter is named by `--peers-python`. A stock Llama of
68,000 parameters learns three generated tasks one after another (counting, arithmetic, brackets), on either
side from the same weights, on the same batches in the same order, with the same optimizer. The sides are in
`benchmarks/peers/continual/`: ours is the `Trainer`, theirs a `SupervisedTemplate` with its own plugins.

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
from peers.continual.ours import TASKS, Course
from peers.continual.page import markdown as markdown
from transformers.utils.logging import disable_progress_bar

from cambia import bench
from cambia.evaluation import transfer_metrics

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


def ewc(seed: int, steps: int, strength: float, ewc_lambda: float, *, lent: bool = False) -> Run:
    return Run("ewc", seed, "adamw", steps, strength, ewc_lambda, lent=lent)


def best(tuning: Sequence[dict[str, Any]], side: str, name: str) -> float:
    """The strength of a side with which the tasks end lowest, on average over seeds."""
    ends: dict[float, list[float]] = {}
    for one in tuning:
        end = transfer_metrics(one[side], TASKS).final_mean
        ends.setdefault(one["run"][name], []).append(end)
    return min(ends, key=lambda strength: statistics.fmean(ends[strength]))


def measured(preset: Preset, place: Place) -> dict[str, Any]:
    """Everything that the page says."""
    later = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + preset.tuning_seeds)
    tuning, _ = place.both(
        [ewc(s, preset.adamw, each, each * PER_STRENGTH) for each in preset.strengths for s in later]
    )
    strength, ewc_lambda = best(tuning, "ours", "strength"), best(tuning, "theirs", "ewc_lambda")
    arms = [
        run
        for seed in range(preset.seeds)
        for run in (
            Run("naive", seed, "adamw", preset.adamw),
            ewc(seed, preset.adamw, strength, ewc_lambda),
            Run("replay", seed, "adamw", preset.adamw),
            Run("naive", seed, "sgd", preset.sgd),
            Run("agem", seed, "sgd", preset.sgd),
        )
    ]
    checks = [
        Run("naive", 0, "adamw", preset.checks),
        ewc(0, preset.checks, 2 * ewc_lambda, ewc_lambda, lent=True),
        *(
            Run(method, 0, optimizer, preset.checks, stream="same")
            for optimizer, method in (
                ("adamw", "naive"),
                ("adamw", "replay"),
                ("sgd", "naive"),
                ("sgd", "agem"),
            )
        ),
    ]
    pairs, avalanche = place.both([*arms, *checks])
    return {
        "tasks": TASKS,
        "preset": asdict(preset),
        "avalanche": avalanche,
        "checks": pairs[len(arms) :],
        "arms": pairs[: len(arms)],
        "tuning": tuning,
        "taken": {"strength": strength, "ewc_lambda": ewc_lambda},
    }


def main() -> None:
    options = arguments(
        __doc__,
        PRESETS,
        {"--peers-python": PathOption("an interpreter that has Avalanche", "PEERS/bin/python")},
        clocked=False,
    )
    if not options.peers_python:
        sys.exit(
            f"there is nothing to compare without Avalanche: {INSTALL}, then --peers-python PEERS/bin/python"
        )
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
