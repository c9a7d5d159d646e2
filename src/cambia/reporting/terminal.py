"""What a person sees in the terminal when a run or a sweep is done: tables and facts.

>>> print_summary(load_run("first_growth"), Console())
>>> print_sweep(load_sweep("learning_rates"), Console())
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cambia.decoding.exporting import PARAMS_JSON
from cambia.evaluation import TaskMatrix, TransferMetrics
from cambia.reporting import units
from cambia.reporting.decoding import judged_tables, side_by_side, verdict
from cambia.reporting.experts import after_learning, learned_tables, note_of
from cambia.reporting.run import Run, stage_names
from cambia.reporting.sweeps.sweep import Sweep
from cambia.reporting.sweeps.tables import (
    Shown,
    asides,
    counts,
    ends_table,
    failures_table,
    main_table,
    paired_table,
)
from cambia.rundir import LATEST

_WIDTH = 80
_LONGEST = 22  # letters of a task's name
_GAP = 3  # a column has a space left and right, and its border
_MOST_ROWS = 40  # of a table in the terminal; the page has all
_STATUS_STYLE = {"finished": "green", "going": "cyan", "interrupted": "yellow"}


def print_summary(run: Run, console: Console) -> None:
    """Print a run's results.

    Args:
        run: from `load_run`; it may still be going.
        console: where to; no more than 80 columns of it are used.
    """
    console.print(
        Text.assemble((run.name, "bold"), "  ", (run.status, _STATUS_STYLE[run.status])), soft_wrap=True
    )
    if run.teaches_weights:
        _print_matrix(run, console)
        _print_growth(run, console)
    _print_experts(run, console)
    _print_decoding(run, console)
    _print_facts(run, console)


def _print_matrix(run: Run, console: Console) -> None:
    matrix, metrics = run.task_matrix(run.split), run.transfer_metrics(run.split)
    if not matrix.rows:
        console.print("No task is scored yet.")
        return
    told = ", the task known" if matrix.route == "oracle" else ""
    words = f"Bits per byte on {run.split} text{told}, lower is better; [bold green]\\[ ][/] just trained"
    console.print(words, highlight=False)
    labels, headings = _names(run.at_start, matrix)
    label_width, width = max(map(len, labels)), max(7, *map(len, headings))
    abreast = max(1, (_WIDTH - label_width) // (width + _GAP))
    for first in range(0, len(headings), abreast):
        columns = range(first, min(first + abreast, len(headings)))
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True, width=label_width)
        for j in columns:
            table.add_column(Text(headings[j]), justify="right", no_wrap=True, width=width)
        _fill(table, labels, matrix, metrics, columns)
        console.print(table, width=min(_WIDTH, console.width))
        console.print()
    in_rows = {stage[0] for stage in matrix.trained if len(stage) == 1}
    unnamed = [name for j, name in enumerate(_numbered(matrix.tasks)) if j not in in_rows]
    if headings != list(matrix.tasks) and unnamed:
        console.print(Text(f"Other columns: {', '.join(unnamed)}\n"), width=min(_WIDTH, console.width))
    if metrics is None:
        done = f"{len(matrix.tasks) - len(matrix.untrained)} of {len(matrix.tasks)} tasks are done"
        console.print(f"{done}; learned and forgotten follow when all are.\n")


def _fill(
    table: Table,
    labels: Sequence[str],
    matrix: TaskMatrix,
    metrics: TransferMetrics | None,
    columns: Iterable[int],
) -> None:
    """The rows of some columns, with what was learned and forgotten beneath."""
    stages = [(), *matrix.trained]
    for number, (label, row) in enumerate(zip(labels, matrix.rows, strict=True)):
        scores = [_score(row[j], own=j in stages[number]) for j in columns]
        last = number == len(matrix.rows) - 1 and metrics is not None
        table.add_row(Text(label), *scores, end_section=last)
    if metrics is None:
        return
    for label, values in (("learned", metrics.learned), ("forgotten", metrics.forgotten)):
        said = {task: f"{value:.3f} " for task, value in zip(metrics.tasks, values, strict=True)}
        table.add_row(label, *(said.get(matrix.tasks[j], "- ") for j in columns))


def _names(start: str, matrix: TaskMatrix) -> tuple[list[str], list[str]]:
    """Labels of all rows and headings of the columns: names, or numbers where names do not fit abreast."""
    tasks, stages = list(matrix.tasks), stage_names(matrix)
    label_width = max(len(f"after {name}") for name in (*tasks, *stages))
    if label_width + len(tasks) * (max(7, *map(len, tasks)) + _GAP) <= _WIDTH:
        return [start, *(f"after {name}" for name in stages)], tasks
    numbered = stage_names(replace(matrix, tasks=_numbered(tasks)))
    cut = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in numbered]
    return [start, *(f"after {name}" for name in cut)], [f"{j + 1}" for j in range(len(tasks))]


def _numbered(tasks: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{number} {task}" for number, task in enumerate(tasks, 1))


def _score(bits: float, *, own: bool) -> Text:
    # The brackets mark the diagonal where there is no color.
    return Text(f"[{bits:.3f}]", style="bold green") if own else Text(f"{bits:.3f} ")


def _print_growth(run: Run, console: Console) -> None:
    for event in run.not_grown:
        console.print(f"not grown at step {event.step:,}: {event.reason}", markup=False)
    if not run.growth:
        console.print("The model did not grow.\n")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("growth", no_wrap=True, max_width=20, overflow="ellipsis")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("loss, same batch", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for event in run.growth:
        losses = "not measured"
        if event.loss_before is not None and event.loss_after is not None:
            losses = f"{event.loss_before:.4f} → {event.loss_after:.4f}"
        table.add_row(
            f"{event.step:,}",
            Text(units.operators(event.operators)),
            f"{units.count(event.parameters_before)} → {units.count(event.parameters_after)}",
            losses,
            units.error(event.logit_error),
        )
    console.print(table, width=min(_WIDTH, console.width))
    console.print("[dim]error: largest change of a logit, relative to the largest logit[/]\n")


def _print_experts(run: Run, console: Console) -> None:
    tables = list(learned_tables(run))
    for title, head, rows, words in tables:
        print_table(console, title, head, rows, words=words)
    if tables:
        console.print(Text(f"{note_of(run)}\n", style="dim"), width=min(_WIDTH, console.width))


def _print_decoding(run: Run, console: Console) -> None:
    """What was learned about decoding beside what others use, and what they write."""
    judged = run.summary.get("decoding")
    if not judged:
        return
    for title, head, rows in judged_tables(judged):
        print_table(console, title, head, rows, words=1 + (head[1] == "parameters"))
    console.print(Text(f"{verdict(judged)}\n"), width=min(_WIDTH, console.width))
    for line in judged["left_out"]:
        console.print(Text(f"left out: {line}", style="dim"), soft_wrap=True)
    for sample in side_by_side(judged):
        for who, text in sample.items():
            style = "bold" if who == "prompt" else ""
            shown = " ".join(text.split())
            console.print(Text.assemble((f"{who:<11}", "dim"), (shown, style)), soft_wrap=True)
        console.print()


def _print_facts(run: Run, console: Console) -> None:
    start, end = run.parameters_start, run.parameters_end
    facts = []
    if start is not None and end is not None:
        facts.append(("parameters", f"{start:,}" if start == end else f"{start:,} → {end:,}"))
    if run.teaches_weights:
        facts.append(
            ("trained", f"{units.plural(run.steps, 'step')}, {run.tokens:,} tokens, {units.flops(run.flops)}")
        )
    if run.decoding:
        last = run.decoding[-1]
        facts.append(("decoding", f"{units.plural(last['number'], 'step')}, {last['tokens']:,} tokens"))
    if run.skipped_steps:
        facts.append(
            ("skipped", f"{units.plural(run.skipped_steps, 'step')}, for a loss that was not finite")
        )
    if run.wall_seconds is not None:
        about = "" if run.status == "finished" else "about "
        facts.append(("wall time", about + units.duration(run.wall_seconds)))
    report = str(run.report) if run.report.exists() else f"cambia report {run.handle}   (not written yet)"
    facts.append(("report", report))
    facts.append(("try it", f'cambia generate {run.handle} --prompt "Once upon a time"'))
    facts += after_learning(run)
    if run.decoding:
        facts.append(("parameters", f"{run.folder / LATEST / PARAMS_JSON}"))
    if run.status == "interrupted":
        command = "run" if run.teaches_weights else "tune-decoding"
        facts.append(("go on", f"cambia {command} --resume {run.handle}"))
    _print_pairs(facts, console)


def _print_pairs(facts: Iterable[tuple[str, str]], console: Console) -> None:
    for name, value in facts:
        # No wrapping: a path or a command that is broken in two cannot be copied.
        console.print(Text.assemble((f"{name:<11}", "dim"), value), soft_wrap=True)


def print_sweep(
    sweep: Sweep, console: Console, *, metric: str | None = None, baseline: str | None = None
) -> None:
    """Print a sweep: counts, its main metric, what differs from the baseline, both ends, failures.

    Args:
        metric: another one than the main one.
        baseline: ``"AXIS=VALUE"``; by default the first value of the first axis that varies.

    Raises:
        ConfigError, RunError: there is no such metric, axis or value.
    """
    console.print(Text.assemble((sweep.name, "bold"), "  ", counts(sweep)), soft_wrap=True)
    for sentence in asides(sweep):
        console.print(Text(sentence, style="dim"), soft_wrap=True)
    console.print()
    against = sweep.baseline(baseline)
    if metric is not None or sweep.main_metric is not None:
        metric = sweep.metric(metric)
        print_shown(console, main_table(sweep, metric))
        if against is not None:
            print_shown(console, paired_table(sweep.paired(metric, *against)))
        print_shown(console, ends_table(sweep, metric))
    if sweep.having("failed"):
        print_shown(console, failures_table(sweep))
    others = [name for name in sweep.metrics if name != metric]
    facts = [("metrics", f"{', '.join(others)}   (--metric NAME)")] if others else []
    facts.append(("report", str(sweep.report) if sweep.report.exists() else "not written yet"))
    if sweep.having("missing") and sweep.grid:
        facts.append(("go on", sweep.command))
    _print_pairs(facts, console)


def print_shown(console: Console, shown: Shown) -> None:
    """Print a table with the sentences beneath it, and no more rows than a person reads."""
    if shown.rows:
        print_table(console, shown.title, shown.head, shown.rows[:_MOST_ROWS], words=shown.words)
    else:
        console.print(Text(shown.title, style="bold"))
    more = len(shown.rows) - _MOST_ROWS
    notes = [*([f"{more} more rows stand in the report."] if more > 0 else []), *shown.notes]
    for sentence in notes:
        console.print(Text(sentence, style="dim"))
    if notes:
        console.print()


def print_table(
    console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1
) -> None:
    """Print a table under its title.

    Args:
        words: columns from the left that hold words. They are folded and never cut: two names may differ
            in their end alone. The others hold numbers, aligned right and never broken.
    """
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    filled = [list(row) for row in rows]
    narrowest = [
        max(map(len, [*head[i].split(), *(row[i] for row in filled)])) for i in range(words, len(head))
    ]
    widest = [max(len(line[i]) for line in (head, *filled)) for i in range(words)]
    # rich narrows columns of numbers as well, and then cuts: the words must leave them their room.
    room = console.width - sum(narrowest) - _GAP * (len(head) - 1)
    most = next((most for most in range(max(widest), 4, -1) if sum(min(most, w) for w in widest) <= room), 4)
    for name in head[:words]:
        shown.add_column(Text(name), overflow="fold", max_width=most)
    # Where names had to be folded, so are the heads of numbers: rich would cut the table at its right.
    tight = most < max(widest)
    for name, width in zip(head[words:], narrowest, strict=True):
        shown.add_column(Text(name), justify="right", min_width=width, max_width=width if tight else None)
    for row in filled:
        shown.add_row(*map(Text, row))
    console.print(Text(title, style="bold"))
    console.print(shown)
    console.print()
