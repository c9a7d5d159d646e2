"""Avalanche's side, in the interpreter that has it: python -m peers.continual.theirs FOLDER PLAN RESULT.

Every run of PLAN becomes a task matrix in RESULT. Avalanche's strategies are classifiers, and a language
model becomes one by two things that its users would write as well: a module that gives the logits alone, and
a criterion that takes those of all tokens at once. LwF is left out: it asks a dataset for task labels that
this kind has not.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.plugins import AGEMPlugin, EWCPlugin, ReplayPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.templates import SupervisedTemplate
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from peers.continual.course import (
    BATCH,
    COMPARED,
    MEMORY,
    PATTERNS,
    REPLAYED,
    Logits,
    Matrix,
    Rows,
    Run,
    fisher_file,
    mean_loss,
    new_optimizer,
    rows_file,
    scores,
)


def plugins(run: Run) -> list[Any]:
    """What a method is in Avalanche."""
    if run.method == "ewc":
        return [EWCPlugin(ewc_lambda=run.ewc_lambda, mode="online", decay_factor=1.0)]
    if run.method == "replay":
        # Where new rows shall come in their order, those of the memory come as they lie: in its default
        # buffer task by task, and in this one in a random order.
        memory = ReservoirSamplingBuffer(max_size=MEMORY)
        return [ReplayPlugin(MEMORY, BATCH, batch_size_mem=REPLAYED, storage_policy=memory)]
    if run.method == "agem":
        return [AGEMPlugin(patterns_per_experience=PATTERNS, sample_size=COMPARED)]
    return []


def train(folder: Path, run: Run) -> Matrix:
    """Train through all tasks, each in one pass and in order, and score all tasks after each."""
    rows = Rows.load(rows_file(folder, run))
    model = Logits(LlamaForCausalLM.from_pretrained(folder / f"model-{run.seed}"))
    random.seed(run.seed)
    torch.manual_seed(run.seed)
    chosen = plugins(run)
    strategy = SupervisedTemplate(
        model=model,
        optimizer=new_optimizer(run.optimizer, model.parameters()),
        criterion=mean_loss,
        train_mb_size=BATCH,
        plugins=chosen,
        evaluator=None,
    )
    tasks = [AvalancheDataset([TensorDataset(windows[:, :-1], windows[:, 1:])]) for windows in rows.train]
    matrix = [scores(model, rows.held_out)]
    for task, experience in enumerate(benchmark_from_datasets(train=tasks).train_stream):
        strategy.train(experience, shuffle=False)
        matrix.append(scores(model, rows.held_out))
        if run.lent:
            (ewc,) = chosen
            fisher = {k.removeprefix("model."): v.data.clone() for k, v in ewc.importances[task].items()}
            save_file(fisher, fisher_file(folder, run, task))
    return matrix


def about() -> dict[str, Any]:
    """What was called."""
    return {
        "avalanche": version("avalanche-lib"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "torchvision_operators": torchvision.extension._has_ops(),
    }


def main() -> None:
    folder, plan, result = map(Path, sys.argv[1:])
    disable_progress_bar()
    found = []
    runs = [Run(**run) for run in json.loads(plan.read_text())]
    for number, run in enumerate(runs, 1):
        print(f"Avalanche, {number} of {len(runs)}: {run}", file=sys.stderr)
        found.append(train(folder, run))
    result.write_text(json.dumps({"about": about(), "matrices": found}))


if __name__ == "__main__":
    main()
