"""The task matrix: every task scored at every stage, and what follows from it.

``R[i][j]`` is the bits per byte on task j after stage i; row 0 is the untrained model. Lower is better.
Forgetting stands beside what was learned, since a model that learns nothing forgets nothing.

Definitions: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840; backward and forward transfer), Chaudhry et al.
2018 (arXiv:1801.10112; forgetting), Riemer et al. 2019 (arXiv:1810.11910; learning accuracy). Theirs are
for accuracies; with losses the signs are turned so that positive transfer is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cambia.probes import Likelihood as Likelihood
from cambia.probes import bits_per_byte as bits_per_byte


@dataclass(frozen=True)
class TransferMetrics:
    """What a task matrix says, in its own unit (bits per byte)."""

    tasks: tuple[str, ...]
    final_mean: float
    """Mean over tasks after the last stage."""
    learned: tuple[float, ...]
    """Per task: how far its loss fell from the untrained model to the end of its own stage."""
    forgotten: tuple[float, ...]
    """Per task: how far its loss is at the end above its best after it was learned; 0 for the last task."""
    backward_transfer: float
    """Mean over all but the last task of R[j][j] - R[end][j]; negative where something was forgotten."""
    forward_transfer: float
    """Mean over all but the first task of R[0][j] - R[j-1][j]: what earlier tasks did for later ones."""
    learning_loss: float
    """Mean of R[j][j]: plasticity."""


def transfer_metrics(matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> TransferMetrics:
    """Metrics of a whole task matrix.

    Args:
        matrix: (S + 1) rows of J losses: row 0 untrained, row i after stage i, which trained task i - 1.
        tasks: J names, in the order of training.

    Raises:
        ValueError: the matrix is not whole.
    """
    count = len(tasks)
    if len(matrix) != count + 1 or any(len(row) != count for row in matrix):
        raise ValueError(f"expected {count + 1} rows of {count} losses for tasks {list(tasks)}")
    own = [matrix[j + 1][j] for j in range(count)]
    end = matrix[count]
    forgotten = [max(0.0, end[j] - min(matrix[i][j] for i in range(j + 1, count + 1))) for j in range(count)]
    return TransferMetrics(
        tasks=tuple(tasks),
        final_mean=sum(end) / count,
        learned=tuple(matrix[0][j] - own[j] for j in range(count)),
        forgotten=tuple(forgotten),
        backward_transfer=_mean([own[j] - end[j] for j in range(count - 1)]),
        forward_transfer=_mean([matrix[0][j] - matrix[j][j] for j in range(1, count)]),
        learning_loss=sum(own) / count,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def task_matrix(
    rows: Sequence[Mapping[str, Any]], *, split: str = "test"
) -> tuple[list[list[float]], list[str]]:
    """The matrix in a run's eval.csv: stages so far by tasks, and the tasks' names.

    Args:
        rows: of eval.csv, as `RunReader.rows` gives them.
        split: "valid" or "test".
    """
    chosen = [row for row in rows if row["split"] == split and row["route"] == "own"]
    tasks = list(dict.fromkeys(str(row["task_eval"]) for row in chosen))
    stages = sorted({int(row["stage"]) for row in chosen})
    found = {(int(row["stage"]), str(row["task_eval"])): float(row["bits_per_byte"]) for row in chosen}
    return [[found[stage, task] for task in tasks] for stage in stages], tasks
