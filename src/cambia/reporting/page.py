"""report.html: everything about a run on one page that stands alone.

No network, no script, no second file: pictures are SVG inside the page, the style sheet is inlined. It
follows the reader's light or dark setting and prints well. Whatever comes from a user is escaped.

    >>> write_report(load_run("first_growth"))
    PosixPath('runs/first_growth/report.html')
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from cambia import files
from cambia.evaluation import TaskMatrix
from cambia.reporting import units
from cambia.reporting.continual import measures_table
from cambia.reporting.decoding import decoding_tables
from cambia.reporting.decoding_figures import decoding_drawing
from cambia.reporting.drawing import picture, to_svg
from cambia.reporting.experts import decisions_table, experts_section
from cambia.reporting.figures import FIGURES, task_labels
from cambia.reporting.health import check_health
from cambia.reporting.markup import RINGS, Html, document, join, note, section, tag, tiles
from cambia.reporting.run import Run
from cambia.reporting.stream_figures import stream_drawing
from cambia.reporting.tables import (
    data_table,
    growth_table,
    machine_facts,
    matrix_scale,
    matrix_table,
    pace_table,
    undone_table,
)
from cambia.reporting.task_figures import forgetting_drawing
from cambia.rundir import CONFIG_YAML

_NO_STEPS = "No step is logged yet, so there is nothing to draw."


def write_report(run: Run) -> Path:
    """Write the run's report.html and return its path."""
    files.write_text(run.report, page(run))
    return run.report


def page(run: Run) -> str:
    """The whole page."""
    parts = [
        _tiles(run),
        _health(run),
        *([_matrix(run)] if run.teaches_weights else []),
        experts_section(run),
        _decoding(run),
        _stream(run),
        *([_loss(run), _growth(run), _size(run), _rate(run)] if run.teaches_weights else []),
        _next(run),
        _origin(run),
        _configuration(run),
    ]
    version = run.summary.get("cambia_version")
    footer = tag(
        "footer", tag("p", f"Written by Cambia{f' {version}' if version else ''} from {run.folder}.")
    )
    return document(run.name, _header(run), tag("main", *parts), footer)


# ---- the top -------------------------------------------------------------------------------------


def _header(run: Run) -> Html:
    steps = units.plural(run.steps, "step")
    stages = len(run.task_matrix(run.split).trained)
    tasks = units.plural(len(run.tasks), "task")
    tasks += f" in {units.plural(stages, 'stage')}" if stages not in (0, len(run.tasks)) else ""
    color, words = {
        "finished": ("green", f"{tasks}, {steps}"),
        "going": ("sky", f"Still going; this is how it stood after {steps}"),
        "interrupted": ("amber", f"Stopped after {steps}"),
    }[run.status]
    grown = {0: "did not grow", 1: "grew once", 2: "grew twice"}.get(
        len(run.growth), f"grew {len(run.growth)} times"
    )
    ahead = f" Go on with: cambia run --resume {run.handle}" if run.status == "interrupted" else ""
    name = tag("div", tag("h1", run.name), note(f"{words}; the model {grown}.{ahead}"))
    return tag(
        "header", tag("div", RINGS, name, tag("span", run.status, class_=f"badge {color}"), class_="title")
    )


def _tiles(run: Run) -> Html:
    shown: list[tuple[str, str]] = []
    metrics = run.transfer_metrics(run.split)
    if metrics is not None:
        matrix = run.task_matrix(run.split)
        untrained = dict(zip(matrix.tasks, matrix.rows[0], strict=True))
        before = np.mean([untrained[task] for task in metrics.tasks])
        told = f"bits per byte at the end ({run.at_start} {before:.3f})"
        shown.append((f"{metrics.final_mean:.3f}", told))
        if len(metrics.tasks) > 1:
            shown.append((f"{np.mean(metrics.learned):.3f}", "bits per byte learned, mean of the tasks"))
            shown.append((f"{np.mean(metrics.forgotten):.3f}", "bits per byte forgotten, mean of the tasks"))
    start, end = run.parameters_start, run.parameters_end
    if start is not None and end is not None:
        text = units.count(start) if start == end else f"{units.count(start)} → {units.count(end)}"
        shown.append((text, "parameters"))
    shown.append((units.count(run.tokens), "training tokens"))
    shown.append((units.flops(run.flops), "operations"))
    if run.wall_seconds is not None:
        about = "wall time" if run.status == "finished" else "wall time, about"
        shown.append((units.duration(run.wall_seconds), about))
    return tiles(shown)


def _health(run: Run) -> Html:
    lines = [
        tag(
            "li",
            tag("span", check.level, class_=f"level {check.level}"),
            tag("span", check.question),
            tag("span", check.sentence),
        )
        for check in check_health(run)
    ]
    return section("Health", tag("ul", *lines, class_="checks"))


# ---- scores --------------------------------------------------------------------------------------


def _matrix(run: Run) -> Html:
    title, split = "What it learned and what it kept", run.split
    matrix = run.task_matrix(split)
    if not matrix.rows:
        return section(title, note("No task is scored yet: the model is scored before the first step."))
    parts = [
        tag(
            "p",
            f"Bits per byte on the {split} text of every task (columns), before training and after each of "
            "its stages (rows). Lower is better.",
            _KNOWN if matrix.route == "oracle" else "",
        ),
        matrix_table(run, split),
    ]
    if len(matrix.rows) > 1:
        parts.append(matrix_scale())
    if run.transfer_metrics(split) is None:
        done = f"{len(matrix.tasks) - len(matrix.untrained)} of {len(matrix.tasks)} tasks are done"
        parts.append(note(f"{done}; learned and forgotten stand here when all are."))
    else:
        parts.append(
            note(
                f"Learned: how far a task's loss fell from the {run.at_start} model to the end of its own "
                f"{'last ' if _comes_again(matrix) else ''}training. Forgotten: how far it stands at the end "
                f"above its best since {'it was first trained' if _comes_again(matrix) else 'then'}. The two "
                "belong together: a model that learns nothing forgets nothing."
            )
        )
    parts.append(_curves(run))
    if measures := measures_table(run, split):
        parts += [tag("h3", "In numbers"), measures]
    return section(title, *parts, *_others(run), _bits_per_byte())


_KNOWN = (
    " The model was told which task each text is of (oracle): its method asks for that, so that whoever uses "
    "it has to know."
)


def _comes_again(matrix: TaskMatrix) -> bool:
    every = [j for stage in matrix.trained for j in stage]
    return len(every) > len(set(every))


def _curves(run: Run) -> Html:
    """What became of each task after its training, as a picture; nothing where nothing came after."""
    drawing = forgetting_drawing(run.task_matrix(run.split))
    return Html("") if drawing is None else picture(drawing, "kept", "Each task after its training")


def _others(run: Run) -> list[Html]:
    """The matrix on the other split, with right routes, and of exact answers, folded away."""
    found = []
    for split in run.splits:
        if split != run.split and run.task_matrix(split).rows:
            words = {"valid": "validation"}.get(split, split)
            found.append((f"The same on the {words} text", matrix_table(run, split)))
    if run.task_matrix(run.split).route == "own" and run.task_matrix(run.split, route="oracle").rows:
        title = "The same with the right route for every text (oracle)"
        found.append((title, matrix_table(run, run.split, route="oracle")))
    if run.task_matrix(run.split, value="accuracy").rows:
        title = f"Exact answers: the share of the {run.split} answers that are right in every token"
        found.append((title, matrix_table(run, run.split, value="accuracy")))
    return [tag("details", tag("summary", title), table) for title, table in found]


def _bits_per_byte() -> Html:
    return tag(
        "details",
        tag("summary", "What is a bit per byte?"),
        tag(
            "p",
            "How many bits the model needs, on average, to write down one byte of text that it has not seen: "
            "the negative log-likelihood of the text, in base 2, over its length in bytes. 8 means that it "
            "knows nothing (a byte has 8 bits); good text compressors reach about 2 on English. Text has as "
            "many bytes whatever tokenizer cuts it, so models with different tokenizers compare. Training "
            "loss is given in nats per token, which depends on the tokenizer; divided by the mean number of "
            "bytes in a token and by 0.693 it gives bits per byte.",
        ),
    )


# ---- pictures ------------------------------------------------------------------------------------


def _stream(run: Run) -> Html:
    """What a stream of text has shown, of runs with experts; empty for others."""
    drawing = stream_drawing(run)
    if drawing is None:
        return Html("")
    shown = picture(drawing, "stream", "Novelty, experts and certainty over the stream")
    return section("The stream", shown, decisions_table(run))


def _decoding(run: Run) -> Html:
    """What has been learned about decoding; empty for runs where nothing is."""
    drawing = decoding_drawing(run)
    if drawing is None:
        return Html("")
    shown = picture(drawing, "decoding", "Loss, reward and how far decoding has moved")
    return section("Decoding", shown, *decoding_tables(run))


def _picture(run: Run, name: str, title: str, empty: str, *caption: object) -> Html:
    figure = FIGURES[name](run)
    if figure is None:
        return note(empty)
    drawing = tag("div", Html(to_svg(figure, name, title)), class_="wide")
    return tag("figure", drawing, tag("figcaption", *caption))


def _task_words(run: Run) -> str:
    names = [stretch.task for stretch in run.stretches()]
    if len(names) < 2:
        return ""
    if task_labels(run) == names:
        return "Shaded stretches and the names above them are tasks. "
    numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    return f"Shaded stretches are tasks, by number: {numbered}. "


def _loss(run: Run) -> Html:
    caption = [_task_words(run)]
    if run.growth:
        caption.append("Dashed lines are growth events, numbered as in the table. ")
    if not np.isfinite(run.metrics["validation_loss"]).any():
        caption.append(
            "There are no validation points: none was measured (--evaluation.every_steps sets it). "
        )
    title = "Training and validation loss over tokens"
    return section("Loss", _picture(run, "loss", title, "No finite loss is logged yet.", *caption))


def _growth(run: Run) -> Html:
    undone = _left_undone(run)
    if not run.growth:
        why = "" if undone else ": either the configuration has no growth rules, or none of them fired"
        return section("Growth", note(f"The model did not grow{why}."), undone)
    picture = _picture(
        run,
        "jump",
        "Loss on the check batch right before and after each growth",
        "The loss on the check batch was not measured.",
        "The same batch right before and right after each growth. Where growth is exact, the dot lies in its "
        "ring.",
    )
    return section(
        "Growth",
        tag("div", growth_table(run.growth), class_="growth"),
        note("Logit error: the largest change of a logit on the check batch, relative to the largest logit."),
        picture,
        tag("details", tag("summary", "How often, how far, and what came of it"), _pace(run)),
        undone,
    )


def _pace(run: Run) -> Html:
    rate = run.growth_metrics().events_per_1000_steps
    return join(
        [
            pace_table(run),
            note(
                f"{rate:.2f} growths per 1,000 steps. Loss fell: the mean training loss of the last 50 steps "
                "before a growth, less that before the next one or the end, nats per token. It would have "
                "fallen without growth too, and rises where a new task begins: only `cambia compare` with a "
                "run that did not grow tells what growth brought."
            ),
        ]
    )


def _left_undone(run: Run) -> Html:
    if not run.not_grown:
        return join([])
    return join([tag("h3", "Asked for and not done"), undone_table(run.not_grown)])


def _size(run: Run) -> Html:
    caption: list[object] = []
    if run.growth and run.flops and run.tokens:
        share = run.flops / (run.growth[-1].flops_per_token_after * run.tokens)
        caption.append(
            f"The run spent {share:.0%} of the operations that a model of the last size would have needed "
            "for the same tokens."
        )
    return section(
        "Size and cost",
        _picture(run, "size", "Parameters and floating-point operations over tokens", _NO_STEPS, *caption),
    )


def _rate(run: Run) -> Html:
    caption = "The rate as the schedule set it. "
    if run.growth:
        caption += (
            "Newborn weights come up to it in a warm-up of their own after each growth, which is not drawn."
        )
    return section(
        "Learning rate",
        _picture(run, "rate", "Learning rate and gradient norm over tokens", _NO_STEPS, caption),
    )


# ---- the rest ------------------------------------------------------------------------------------


def _next(run: Run) -> Html:
    commands = [
        ("Try it:", f'cambia generate {run.handle} --prompt "Once upon a time"'),
        (
            "Run the same again, under another name:",
            f"cambia run {shlex.quote(str(run.folder / CONFIG_YAML))} --name another",
        ),
    ]
    if run.status == "interrupted":
        commands.insert(0, ("Go on where it stopped:", f"cambia run --resume {run.handle}"))
    return section("Next", *(join([tag("p", what), tag("pre", command)]) for what, command in commands))


def _origin(run: Run) -> Html:
    notes = [str(line) for line in run.summary.get("notes") or []]
    listed = [tag("h3", "Notes"), tag("ul", *(tag("li", line) for line in notes))] if notes else []
    return section(
        "Where it comes from",
        tag("h3", "Data"),
        data_table(run),
        *listed,
        tag("h3", "Machine"),
        machine_facts(run),
    )


def _configuration(run: Run) -> Html:
    text = run.config_yaml or "config.yaml is missing."
    return section(
        "Configuration",
        tag("details", tag("summary", "config.yaml, complete; it runs again as it is"), tag("pre", text)),
    )
