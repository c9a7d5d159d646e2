"""What experts are measured against: for each text a copy of the whole model, fine-tuned on it alone.

    >>> train_specialists(Path("runs/learn"))       # a run of its own, runs/learn-specialists
    True

It reads the same batches as the run beside which it stands, is told where a text ends, and adds one number to
that run's summary for each text: `specialist`, bits per byte of its test text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cambia import rundir
from cambia.config import merged
from cambia.evaluation import task_matrix
from cambia.experiment.build import is_finished, train_in
from cambia.experiment.tree import Experiment, experiment_from
from cambia.rundir import RunReader, RunWriter

_RATE = 0.2
"""Of the experts' learning rate: a model that is trained in all its weights takes smaller steps."""


def specialists_of(tree: dict[str, Any]) -> Experiment:
    """The experiment of the specialists, from the configuration of a run with experts."""
    changes = {
        "name": f"{tree['name']}-specialists",
        "data": {"stream": {"boundaries": True}},
        "optimizer": {"learning_rate": _RATE * tree["optimizer"]["learning_rate"]},
        "methods": [{"type": "full_per_task"}],
        "growth": {"rules": []},
        "checkpoint": {"keep_tasks": False},
    }
    return experiment_from(merged(tree, changes), source="the specialists", flags={})


def train_specialists(folder: Path) -> bool:
    """Train specialists beside a run of `cambia learn` that has finished, or go on with them.

    Returns:
        Whether they were trained to their end.

    Raises:
        CambiaError: whatever the user can repair.
    """
    run = RunReader(folder)
    home = folder.with_name(f"{folder.name}-specialists")
    if not is_finished(run) or not train_in(home, specialists_of(run.config())):
        return False
    matrix = task_matrix(RunReader(home).rows(rundir.EVAL), split="test", route="oracle")
    trained = {j for stage in matrix.trained for j in stage}
    scores = {matrix.tasks[j]: matrix.rows[-1][j] for j in trained}
    summary = run.summary() or {}
    texts = [{**text, "specialist": scores.get(text["name"])} for text in summary["texts"]]
    writer = RunWriter(folder, resume=True)
    try:
        writer.write_summary({**summary, "texts": texts})
    finally:
        writer.close()
    return True
