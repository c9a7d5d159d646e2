"""What a run directory is told while a run is going: rows of metrics, scores, clocks, growth events."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from cambia import rundir
from cambia.decoding.learners import Update
from cambia.probes import Likelihood
from cambia.records import GrowthEvent, Signals, StreamEvent
from cambia.rundir import RunWriter
from cambia.training.settings import Progress
from cambia.training.tracking import Tracker


class Journal:
    """Writes the logs of one run.

    Args:
        run: where to.
        measured: names of what is measured once in a while; each is a column of metrics.csv.
        trackers: who is told as well; open already.
    """

    def __init__(self, run: RunWriter, measured: Sequence[str], trackers: Sequence[Tracker] = ()):
        self.run = run
        self.trackers = trackers
        self.measured = list(dict.fromkeys(["validation_loss", "validation_bits_per_byte", *measured]))

    def grew(self, event: GrowthEvent) -> None:
        self.run.append_json(rundir.GROWTH, event.as_dict())
        for tracker in self.trackers:
            tracker.grew(event)

    def stepped(
        self, signals: Signals, *, task: str, penalty: float | None, parameters: int, skipped: int
    ) -> None:
        """A row of metrics.csv."""
        row = {
            "step": signals.step,
            "task": task,
            "tokens": signals.tokens,
            "flops": signals.flops,
            "loss": signals.loss,
            "penalty": penalty,
            "learning_rate": signals.learning_rate,
            "grad_norm": signals.grad_norm,
            **{name: signals.fresh(name) for name in self.measured},
            "parameters": parameters,
            "skipped": skipped,
        }
        self.run.append_row(rundir.METRICS, row)
        for tracker in self.trackers:
            tracker.row(row)

    def used(self, progress: Progress, use: Mapping[str, int], rows: int) -> None:
        """For each Part, how many rows of a batch are its own; Parts without any are left out of the file."""
        line = {"rows": rows, "use": {part: count for part, count in use.items() if count}}
        self.run.append_json(rundir.STREAM, {"step": progress.step, "tokens": progress.tokens, **line})
        for tracker in self.trackers:
            tracker.used(progress.step, {part: count / rows for part, count in use.items()})

    def told(self, progress: Progress, events: Sequence[StreamEvent]) -> None:
        """What was decided about a stream of text and the Parts that learn from it."""
        for event in events:
            line = {"step": progress.step, "tokens": progress.tokens, **asdict(event)}
            self.run.append_json(rundir.STREAM, line)
            for tracker in self.trackers:
                tracker.told(progress.step, event)

    def decoded(self, progress: Progress, update: Update) -> None:
        """What a step of the decoding policy came to."""
        where = {"step": progress.step, "text_tokens": progress.tokens}
        self.run.append_json(rundir.DECODING, {**where, **asdict(update)})
        shown = {"reward": update.reward, **update.parameters.changed, **update.measured}
        for tracker in self.trackers:
            tracker.log(progress.step, {f"decoding/{name}": value for name, value in shown.items()})

    def clocked(
        self, step: int, *, seconds: float, tokens: int, events: Sequence[GrowthEvent], device: torch.device
    ) -> None:
        """A row of timing.csv."""
        self.run.append_row(
            rundir.TIMING,
            {
                "step": step,
                "seconds": round(seconds, 6),
                "growth_seconds": round(sum(event.seconds for event in events), 6),
                "tokens_per_second": round(tokens / seconds, 1),
                "memory_bytes": _peak_memory(device),
            },
        )

    def scored(
        self,
        scores: Mapping[str, Likelihood],
        *,
        split: str,
        task_trained: str,
        route: str,
        progress: Progress,
    ) -> None:
        """Rows of eval.csv: every task's score on one split at one stage."""
        for task, score in scores.items():
            self.run.append_row(
                rundir.EVAL,
                {
                    "task_trained": task_trained,
                    "task_eval": task,
                    "split": split,
                    "route": route,
                    "nll_per_byte": score.nats_per_byte,
                    "bits_per_byte": score.bits_per_byte,
                    "accuracy": score.accuracy,
                    "tokens": score.tokens,
                    "bytes": score.bytes,
                    "stage": progress.stage,
                    "step": progress.step,
                },
            )
        for tracker in self.trackers:
            tracker.scored(progress.step, split, {task: s.bits_per_byte for task, s in scores.items()})

    def decayed(self, progress: Progress, rows: Mapping[str, Mapping[str, Likelihood]]) -> None:
        """A row of decayed.csv: what the run would have come to, had it ended here. One task's scores."""
        scores = {split: next(iter(row.values()), None) for split, row in rows.items()}
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "flops": progress.flops,
            **{f"{split}_bits_per_byte": s.bits_per_byte if s else None for split, s in scores.items()},
            **{f"{split}_loss": s.nats_per_token if s else None for split, s in scores.items()},
        }
        self.run.append_row(rundir.DECAYED, row)

    def saved(self, name: str) -> None:
        """A checkpoint was written."""
        for tracker in self.trackers:
            tracker.checkpoint(self.run.checkpoint(name))


def _peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
