"""The tables of a report: the task matrix, growth events, data, machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from cambia.evaluation import Route, TaskMatrix, Value
from cambia.records import GrowthEvent
from cambia.reporting import units
from cambia.reporting.markup import Html, facts, join, note, table, tag
from cambia.reporting.run import Run, stage_names

_DATA_NAMES = {
    "name": "task",
    "source": "source",
    "documents": "documents",
    "train_bytes": "training text",
    "valid_bytes": "validation text",
    "test_bytes": "test text",
}
_MACHINE = ("cpu", "cores", "threads", "device", "platform")


# ---- the task matrix -----------------------------------------------------------------------------


def matrix_table(run: Run, split: str, *, route: Route | None = None, value: Value = "bits_per_byte") -> Html:
    """The task matrix as a heat map that is a real table, with what was learned and forgotten beneath.

    A cell is shaded by how far it is behind the best of its column, half as dark for each half bit or each
    tenth of accuracy, so that a small difference looks small. The column of a task that was not trained so
    far has no shade; the cells of what a stage trained have a frame.
    """
    matrix = run.task_matrix(split, route=route, value=value)
    sign, half = (1, 0.5) if value == "bits_per_byte" else (-1, 0.1)
    best = [min(sign * row[j] for row in matrix.rows) for j in range(len(matrix.tasks))]
    shown = [j for j, task in enumerate(matrix.tasks) if task not in matrix.untrained]
    rows = []
    trained = [(), *matrix.trained]
    for label, stage, row in zip(_row_names(run, matrix), trained, matrix.rows, strict=True):
        cells = [
            _cell(found, (sign * found - best[j]) / half if j in shown else math.inf, own=j in stage)
            for j, found in enumerate(row)
        ]
        rows.append(tag("tr", tag("th", label, scope="row"), *cells))
    metrics = run.transfer_metrics(split, value=value)
    if metrics is not None and route is None:
        for label, values in (("learned", metrics.learned), ("forgotten", metrics.forgotten)):
            said = dict(zip(metrics.tasks, values, strict=True))
            cells = [tag("td", _three(said.get(task)), class_="said") for task in matrix.tasks]
            rows.append(tag("tr", tag("th", label, scope="row"), *cells, class_=label))
    kind = "matrix dense" if len(matrix.tasks) > 7 else "matrix"
    head = tag("thead", tag("tr", tag("td"), *(tag("th", task, scope="col") for task in matrix.tasks)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_=kind), class_="wide")


def _row_names(run: Run, matrix: TaskMatrix) -> list[str]:
    return [run.at_start, *(f"after {name}" for name in stage_names(matrix))]


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(found: float, halvings: float, *, own: bool) -> Html:
    return tag(
        "td", f"{found:.3f}", class_="cell own" if own else "cell", style=f"--share:{2.0**-halvings:.3f}"
    )


def matrix_scale() -> Html:
    """What the shades of bits per byte mean."""
    steps = (
        (0.0, "best of its column"),
        (0.25, "0.25 above"),
        (0.5, "0.5 above"),
        (1.0, "1 above"),
        (3.0, "3 or more"),
    )
    marks = [
        tag("span", tag("i", style=f"--share:{2.0 ** (-step / 0.5):.3f}"), words) for step, words in steps
    ]
    own = tag("span", tag("i", class_="own"), "just trained")
    return tag("p", *marks, own, class_="note scale")


# ---- growth --------------------------------------------------------------------------------------


def growth_table(events: tuple[GrowthEvent, ...]) -> Html:
    """One row per growth event; the relative logit error stands above what was promised."""
    head = ["", "step", "what and why", "parameters", "loss, same batch", "logit error"]
    rows = [
        [
            number,
            _two(f"{event.step:,}", f"{units.count(event.tokens)} tokens"),
            _what(event),
            _two(
                f"{event.parameters_before:,} → {event.parameters_after:,}",
                _per_token(event),
            ),
            _losses(event),
            _two(units.error(event.logit_error), "a jump" if event.exactness == "none" else "exact"),
        ]
        for number, event in enumerate(events, 1)
    ]
    return table(head, rows, numbers=(0, 1, 3, 4, 5))


def pace_table(run: Run) -> Html:
    """What each growth added, for how long, and how the training loss went on."""
    found = run.growth_metrics()
    head = ["", "added", "FLOPs per token", "steps until the next", "loss fell", "per million added"]
    lasted = [str(steps) for steps in found.steps_between] + ["to the end"]
    rows = [
        [
            number,
            f"{found.parameters_added[i]:+,}",
            f"x {after / before:.2f}" if before else "",
            lasted[i],
            _signed(found.loss_falls[i]),
            _signed(found.loss_per_million_parameters[i]),
        ]
        for i, (number, (before, after)) in enumerate(enumerate(itertools.pairwise(found.flops_per_token), 1))
    ]
    return table(head, rows, numbers=(0, 1, 2, 3, 4, 5))


def _signed(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def undone_table(events: tuple[GrowthEvent, ...]) -> Html:
    """Growths that a rule asked for and that were left undone, with the reason."""
    rows = [
        [
            f"{event.step:,}",
            _what(event),
            f"{event.parameters_before:,} → {event.parameters_after:,}",
        ]
        for event in events
    ]
    return table(["step", "what and why not", "parameters there would be"], rows, numbers=(0, 2))


def _two(line: str, small: str) -> Html:
    return join([line, tag("div", small, class_="note")])


def _per_token(event: GrowthEvent) -> str:
    before, after = event.flops_per_token_before, event.flops_per_token_after
    return f"{units.count(before)} → {units.flops(after)}/token"


def _what(event: GrowthEvent) -> Html:
    words = [f"{name} {_short(old)} → {_short(new)}" for name, (old, new) in event.config_changes.items()]
    small = [tag("div", line, class_="note") for line in (f"why: {event.reason}", ", ".join(words)) if line]
    return tag("div", units.operators(event.operators, full=True), *small, class_="what")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _losses(event: GrowthEvent) -> Html | str:
    if event.loss_before is None or event.loss_after is None:
        return "not measured"
    jump = units.jump(event.loss_before, event.loss_after)
    return _two(f"{event.loss_before:.4f} → {event.loss_after:.4f}", f"jump {jump}")


# ---- data, machine, configuration ----------------------------------------------------------------


def data_table(run: Run) -> Html:
    """What text the tasks were made of."""
    data: list[Mapping[str, Any]] = run.summary.get("data") or []
    if not data:
        return note("Not known yet: it stands in summary.json, which is written when the run ends.")
    keys = _ordered(_DATA_NAMES, {key for task in data for key in task})
    rows = [[_amount(key, task.get(key)) for key in keys] for task in data]
    right = [i for i, key in enumerate(keys) if all(isinstance(task.get(key), int) for task in data)]
    return table([_DATA_NAMES.get(key, key.replace("_", " ")) for key in keys], rows, numbers=right)


def _ordered(known: Iterable[str], given: Collection[str]) -> list[str]:
    """The given names: first the known ones, in their order."""
    first = [name for name in known if name in given]
    return [*first, *sorted(set(given) - set(first))]


def _amount(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return units.size(value) if key.endswith("_bytes") else f"{value:,}"
    return str(value)


def machine_facts(run: Run) -> Html:
    """Where, when and with what the run was made."""
    summary = run.summary
    versions = {"cambia": summary.get("cambia_version"), **(summary.get("versions") or {})}
    machine = summary.get("machine") or {}
    speed, memory = run.timing["tokens_per_second"], run.timing["memory_bytes"]
    seconds = run.wall_seconds
    about = "" if run.status == "finished" else "about "
    return facts(
        [
            ("command", tag("code", summary["command"]) if summary.get("command") else None),
            ("started", summary.get("started")),
            ("finished", summary.get("finished")),
            ("wall time", about + units.duration(seconds) if seconds is not None else None),
            (
                "speed",
                f"{units.count(float(np.nanmedian(speed)))} tokens/s (median)" if _some(speed) else None,
            ),
            ("most memory", units.size(float(np.nanmax(memory))) if _some(memory) else None),
            *((name, machine[name]) for name in _ordered(_MACHINE, machine)),
            ("versions", ", ".join(f"{name} {versions[name]}" for name in versions if versions[name])),
            ("folder", tag("code", run.folder)),
        ]
    )


def _some(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())
