"""What several tasks came to, in a handful of numbers: of one run, and of runs side by side.

>>> title, head, rows = next(learned_and_kept([load_run("replay"), load_run("naive")]))
>>> rows[0]
['replay', '2.0410', '2.1077', '1.9821', '0.0883', '-0.0883', '0.6120']
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cambia.evaluation import TransferMetrics
from cambia.reporting.markup import Html, table
from cambia.reporting.run import Run

MEASURES = {
    "final_mean": ("at the end", "after the last stage, mean over the tasks"),
    "incremental_mean": ("on the way", "after each stage, mean over the tasks so far; mean over the stages"),
    "learning_loss": ("just trained", "each task right after its last training, mean over the tasks"),
    "forgetting": ("forgetting", "how far earlier tasks are at the end behind the best that they were"),
    "backward_transfer": (
        "backward transfer",
        "what came after a task's last training; below zero it was lost",
    ),
    "forward_transfer": ("forward transfer", "what other tasks did for a task before its first training"),
    "forgetting_by_weights": ("lost by weights", "since its last training, with the right route each time"),
    "forgetting_by_routes": ("lost by routes", "the rest of what was lost since, by texts that went astray"),
    "regret_to_oracle": ("regret", "how far the end is behind what right routes would give"),
}
"""Fields of `TransferMetrics` by what they are called, and what they are in a sentence."""


def measures_table(run: Run, split: str) -> Html:
    """What a run of several tasks came to; empty before all were trained."""
    metrics = run.transfer_metrics(split)
    if metrics is None or len(run.task_matrix(split).tasks) < 2:
        return Html("")
    accuracy = run.transfer_metrics(split, value="accuracy")
    both = [metrics] if accuracy is None or accuracy.tasks != metrics.tasks else [metrics, accuracy]
    head = ["", "bits per byte", "accuracy", "what it is"]
    rows = [
        [MEASURES[name][0], *(_number(one, name) for one in both), MEASURES[name][1]]
        for name in _measured([metrics])
    ]
    return table(head if len(both) > 1 else [*head[:2], head[3]], rows, numbers=range(1, 1 + len(both)))


def learned_and_kept(runs: Sequence[Run]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of a table for each set of tasks that some of the runs have in common."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Run, TransferMetrics]]] = {}
    for run in runs:
        metrics = run.transfer_metrics(run.split)
        if metrics is not None and len(metrics.tasks) > 1:
            groups.setdefault((run.split, tuple(sorted(metrics.tasks))), []).append((run, metrics))
    for (split, tasks), members in groups.items():
        names = _measured([metrics for _, metrics in members])
        listed = ", ".join(tasks) if len(groups) > 1 else f"{len(tasks)} tasks"
        yield (
            f"Learned and kept: bits per byte on the {split} text of {listed}",
            ["run", *(MEASURES[name][0] for name in names)],
            [[_told(run), *(_number(metrics, name) for name in names)] for run, metrics in members],
        )


def _measured(every: Sequence[TransferMetrics]) -> list[str]:
    return [name for name in MEASURES if any(getattr(metrics, name) is not None for metrics in every)]


def _number(metrics: TransferMetrics, name: str) -> str:
    value = getattr(metrics, name)
    return "-" if value is None else f"{value:.4f}"


def _told(run: Run) -> str:
    return f"{run.name} (task known)" if run.task_matrix(run.split).route == "oracle" else run.name
