"""What a run came to, as a handful of numbers: the `results` of summary.json, a row of a sweep.

They are read back from the run's logs, so that they are there for any loop that writes these, and they are
equal for equal runs: no clock is among them.
"""

from __future__ import annotations

import math

from cambia import rundir
from cambia.evaluation import task_matrix, transfer_metrics
from cambia.rundir import RunReader


def results_of(run: RunReader) -> dict[str, float | None]:
    """The numbers of a run that is over; None where one is not finite.

    `test_bits_per_byte` is the mean over tasks after the last one, `validation_bits_per_byte` the last that
    was measured while training; the rest is explained in `cambia.evaluation.TransferMetrics`, in bits per
    byte and only where the whole task matrix was scored and there is more than one task.
    """
    found: dict[str, float] = {}
    matrix, tasks = task_matrix(run.rows(rundir.EVAL), split="test")
    if tasks and len(matrix) == len(tasks) + 1:
        metrics = transfer_metrics(matrix, tasks)
        found["test_bits_per_byte"] = metrics.final_mean
        if len(tasks) > 1:
            found |= {
                "learning_loss": metrics.learning_loss,
                "forgetting": metrics.forgetting,
                "backward_transfer": metrics.backward_transfer,
                "forward_transfer": metrics.forward_transfer,
            }
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
