"""How often triggers are fooled, and how late: seven kinds of trigger, five of training, three seeds.

    cambia bench triggers --preset full

A small byte-level model trains without growing, and what it says at every step is recorded. Each trigger,
with its default settings and with settings around them, is then shown the recordings. What should be seen:

    stationary     English throughout, cosine rate                  nothing
    warm-up        the rate rises over a third of the run           nothing
    bursts         six bursts of eight batches of random bytes      nothing
    domain shift   English, then C++                                the shift
    learned        an exercise that the model learns whole          that nothing is left to learn

A false alarm is a growth that should not have been. After each the trigger is reset and waits 50 steps, as
a rule with that cooldown would. The delay is counted in optimizer steps from the event to the first alarm.
For `learned` the event is the first step from which on the validation loss, as a median of five
measurements, stays within a tenth of its final value, told with hindsight.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import arguments, keep, table

from cambia.data.batches import Batch
from cambia.data.streams import Stream
from cambia.experiment.build import assemble
from cambia.experiment.tree import experiment_from
from cambia.growth import (
    AllOf,
    GradientNormTrigger,
    GrowthManager,
    GrowthRule,
    LossSpikeTrigger,
    PerplexityTrigger,
    PlateauTrigger,
    Signals,
    SliceSpikeTrigger,
    Trigger,
    WidenFFN,
)
from cambia.rundir import RunWriter

PRESETS = {
    "quick": {"steps": 120, "seeds": 1},
    "full": {"steps": 900, "seeds": 3},
}
COOLDOWN = 50
EVERY = 10
"""Steps between measurements of the validation loss."""
ENGLISH = {"type": "embedded", "domain": "english"}
CPP = {"type": "embedded", "domain": "cpp"}
COUNTING = {"type": "generated", "task": "counting", "difficulty": 1, "limit_bytes": 300_000}
SCENARIOS = {
    "stationary": {"tasks": [ENGLISH], "schedule": {"type": "cosine"}},
    "warm-up": {"tasks": [ENGLISH], "schedule": {"type": "wsd", "warmup_fraction": 0.33}},
    "bursts": {"tasks": [ENGLISH], "schedule": {"type": "constant"}},
    "domain shift": {"tasks": [ENGLISH, CPP], "schedule": {"type": "constant", "over": "run"}},
    "learned": {"tasks": [COUNTING], "schedule": {"type": "constant"}},
}
BURSTS = [200, 310, 420, 530, 640, 750]
BURST_STEPS = 8

TRIGGERS: dict[str, dict[str, Callable[[], Trigger]]] = {
    "plateau": {
        "default": PlateauTrigger,
        "patience 3": lambda: PlateauTrigger(patience=3),
        "patience 8": lambda: PlateauTrigger(patience=8),
        "patience 5": lambda: PlateauTrigger(patience=5),
        "window 10": lambda: PlateauTrigger(patience=1, window=10),
        "window 5": lambda: PlateauTrigger(patience=1, window=5),
        "min_improvement 0.01": lambda: PlateauTrigger(min_improvement=0.01),
    },
    "perplexity": {
        "default": PerplexityTrigger,
        "min_improvement 0.01": lambda: PerplexityTrigger(min_improvement=0.01),
        "patience 5": lambda: PerplexityTrigger(patience=5),
    },
    "gradient norm, small": {
        "below 0.5": lambda: GradientNormTrigger(below=0.5),
        "below 0.7": lambda: GradientNormTrigger(below=0.7),
    },
    "gradient norm, large": {
        "above 2": lambda: GradientNormTrigger(above=2.0),
        "above 1.5": lambda: GradientNormTrigger(above=1.5),
        "above 2, window 100": lambda: GradientNormTrigger(above=2.0, window_steps=100),
    },
    "loss spike": {
        "default": LossSpikeTrigger,
        "ratio 1.15": lambda: LossSpikeTrigger(ratio=1.15),
        "ratio 1.2": lambda: LossSpikeTrigger(ratio=1.2),
        "ratio 1.3": lambda: LossSpikeTrigger(ratio=1.3),
        "patience 5": lambda: LossSpikeTrigger(patience=5),
    },
    "slice spike": {
        "digits, default": lambda: SliceSpikeTrigger(slice="digits"),
        "digits, ratio 1.5": lambda: SliceSpikeTrigger(slice="digits", ratio=1.5),
        "digits, not relative, ratio 1.5": lambda: SliceSpikeTrigger(
            slice="digits", ratio=1.5, relative=False
        ),
        "first task, default": lambda: SliceSpikeTrigger(slice="0"),
        "first task, window 5": lambda: SliceSpikeTrigger(slice="0", window=5),
    },
    "all of two": {
        "loss spike, gradient above 1.5": lambda: AllOf([LossSpikeTrigger(), GradientNormTrigger(above=1.5)]),
        "plateau, gradient below 0.7": lambda: AllOf([PlateauTrigger(), GradientNormTrigger(below=0.7)]),
    },
}


class Recorder(Trigger):
    """Keeps all signals and never fires."""

    def __init__(self) -> None:
        self.signals: list[Signals] = []

    def update(self, signals: Signals) -> str | None:
        self.signals.append(signals)
        return None


class Noisy(Stream):
    """A stream with bursts of random bytes in it."""

    def next_batch(self, task_index: int) -> Batch:
        self.count = getattr(self, "count", 0) + 1
        batch = super().next_batch(task_index)
        if any(0 <= self.count - begin < BURST_STEPS for begin in BURSTS):
            generator = torch.Generator().manual_seed(self.count)
            noise = torch.randint(
                0, 256, (len(batch.targets), batch.targets.shape[1] + 1), generator=generator
            )
            return Batch(noise[:, :-1], noise[:, 1:], batch.num_bytes, batch.source)
        return batch


def record(scenario: str, seed: int, steps: int) -> list[Signals]:
    """What a training run of a scenario says, step by step."""
    setting = SCENARIOS[scenario]
    tasks: list[Any] = setting["tasks"]  # type: ignore[assignment]
    tree = {
        "seed": seed,
        "data": {"tasks": [{"name": str(i), "source": source} for i, source in enumerate(tasks)]},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.12,
        },
        "optimizer": {"type": "adamw", "learning_rate": 0.003},
        "training": {
            "steps": steps // len(tasks),
            "batch_size": 8,
            "sequence_length": 128,
            "schedule": setting["schedule"],
        },
        "methods": [],
        "evaluation": {
            "every_steps": EVERY,
            "max_bytes": 8192,
            "slices": [
                {"type": "tokens", "name": "digits", "tokens": [*range(48, 58)]},
                {"type": "domain", "name": "0"},
            ],
        },
        "checkpoint": {"every_steps": None, "keep_tasks": False},
    }
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        run = RunWriter(Path(folder) / "run")
        parts = assemble(experiment_from(tree, source="benchmark", flags={}), run)
        parts.trainer.growth = GrowthManager(
            [GrowthRule(when=recorder, then=WidenFFN(add=8))], model=parts.trainer.model
        )
        if scenario == "bursts":
            parts.stream.__class__ = Noisy
        finished = parts.trainer.train(parts.stream, run=run, stage_steps=parts.stage_steps)
        run.close()
    if not finished:
        raise SystemExit("interrupted")
    return recorder.signals


def event_of(scenario: str, signals: list[Signals]) -> int | None:
    """The step at which a trigger should fire, None where it never should."""
    if scenario == "domain shift":
        return len(signals) // 2
    if scenario != "learned":
        return None
    losses = [(s.step, s.fresh("validation_loss")) for s in signals]
    measured = [(step, loss) for step, loss in losses if loss is not None]
    smooth = [
        (measured[i][0], statistics.median(loss for _, loss in measured[i - 4 : i + 1]))
        for i in range(4, len(measured))
    ]
    above = [step for step, loss in smooth if loss > 1.1 * smooth[-1][1]]
    return above[-1] if above else 1


def alarms(trigger: Trigger, signals: list[Signals]) -> list[int]:
    """Steps at which a rule with a cooldown would have grown."""
    found: list[int] = []
    for item in signals:
        if found and item.step - found[-1] <= COOLDOWN:
            continue
        if trigger.update(item):
            found.append(item.step)
            trigger.reset()
    return found


def judged(fired: list[int], event: int | None) -> dict[str, Any]:
    """False alarms, and how late the event was seen."""
    false = [step for step in fired if event is None or step <= event]
    after = [step for step in fired if event is not None and step > event]
    return {
        "alarms": len(fired),
        "false_alarms": len(false),
        "delay_steps": after[0] - event if after and event is not None else None,
    }


def measure(steps: int, seeds: int) -> dict[str, Any]:
    """Recordings of every scenario, shown to every trigger."""
    recordings = {
        scenario: [record(scenario, seed, steps) for seed in range(seeds)] for scenario in SCENARIOS
    }
    events = {
        scenario: [event_of(scenario, signals) for signals in recorded]
        for scenario, recorded in recordings.items()
    }
    rows = []
    for kind, settings in TRIGGERS.items():
        for name, make in settings.items():
            for scenario, recorded in recordings.items():
                results = [
                    judged(alarms(make(), signals), event)
                    for signals, event in zip(recorded, events[scenario], strict=True)
                ]
                rows.append(
                    {
                        "trigger": kind,
                        "settings": name,
                        "scenario": scenario,
                        "has_event": scenario in ("domain shift", "learned"),
                        **{key: [r[key] for r in results] for key in results[0]},
                    }
                )
    return {"steps": steps, "seeds": seeds, "events": events, "rows": rows}


def markdown(result: Mapping[str, Any]) -> str:
    """False alarms a run; and of an event, in how many runs it was seen and after how many steps."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        cell = f"{statistics.fmean(row['false_alarms']):.1f}"
        if row["has_event"]:
            delays = [delay for delay in row["delay_steps"] if delay is not None]
            cell += f"; seen {len(delays)}/{len(row['delay_steps'])}"
            cell += f" after {statistics.median(delays):.0f}" if delays else ""
        found.setdefault((row["trigger"], row["settings"]), []).append(cell)
    head = ["trigger", "settings", *dict.fromkeys(row["scenario"] for row in result["rows"])]
    return table(head, [[*names, *cells] for names, cells in found.items()])


def main() -> None:
    options = arguments(__doc__, PRESETS)
    result = measure(**PRESETS[options.preset])
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()
