"""What a run came to, as a handful of numbers: the `results` of summary.json, a row of a sweep.

They are read back from the run's logs, so that they are there for any loop that writes these, and they are
equal for equal runs: no clock is among them.
"""

from __future__ import annotations

import math

from cambia import rundir
from cambia.evaluation import TransferMetrics, run_metrics
from cambia.rundir import RunReader

_CONTINUAL = (
    "learning_loss",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "incremental_mean",
    "forgetting_by_weights",
    "forgetting_by_routes",
    "regret_to_oracle",
)


def results_of(run: RunReader) -> dict[str, float | None]:
    """The numbers of a run that is over; None where one is not finite.

    `test_bits_per_byte` is the mean over the trained tasks after the last stage, `validation_bits_per_byte`
    the last that was measured while training. What a run of several tasks learned and forgot is explained in
    `cambia.evaluation.TransferMetrics`, in bits per byte: by the model's own routes, or by the oracle's where
    there are no others. `test_accuracy` and `accuracy_forgetting` are the same of the share of exact answers,
    where every task has one.
    """
    found: dict[str, float] = {}
    scores = [row for row in run.rows(rundir.EVAL) if row["split"] == "test"]
    several = len({row["task_eval"] for row in scores}) > 1
    metrics, accuracy = run_metrics(scores), run_metrics(scores, value="accuracy")
    if metrics is not None:
        found["test_bits_per_byte"] = metrics.final_mean
        found |= _continual(metrics) if several else {}
        if accuracy is not None and accuracy.tasks == metrics.tasks:
            found["test_accuracy"] = accuracy.final_mean
            found |= {"accuracy_forgetting": accuracy.forgetting} if several else {}
    rows = run.rows(rundir.METRICS)
    validation = [row["validation_bits_per_byte"] for row in rows if row.get("validation_bits_per_byte")]
    if validation:
        found["validation_bits_per_byte"] = validation[-1]
    if rows:
        found |= {
            name: rows[-1][name] for name in ("loss", "parameters", "tokens", "flops") if name in rows[-1]
        }
    found["growth_events"] = sum(bool(event["done"]) for event in run.growth())
    return {
        name: value if isinstance(value, int | float) and math.isfinite(value) else None
        for name, value in found.items()
    }


def _continual(metrics: TransferMetrics) -> dict[str, float]:
    """What several tasks came to; what only both routes tell, where there were both."""
    found = {name: getattr(metrics, name) for name in _CONTINUAL}
    return {name: value for name, value in found.items() if value is not None}
