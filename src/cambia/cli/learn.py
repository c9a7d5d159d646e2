"""`cambia learn`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cambia.cli.app import Settings, Whole, app, console, refuse_resuming, reported
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from cambia.experiment import Experiment

_EXAMPLE = "cambia learn MODEL DATA..."


@app.command
def learn(
    *words: Settings,
    steps: Whole | None = None,
    boundaries: bool = False,
    name: str | None = None,
    resume: str | None = None,
    specialists: bool = False,
    watch: Path | None = None,
    once: bool = False,
    idle_seconds: float | None = None,
) -> int:
    """Teach a model one text after another, lose nothing, and give no labels: `cambia learn MODEL DATA...`.

    MODEL is a folder of Hugging Face, or a run, checkpoint or folder of experts, which then goes on. DATA are
    files or folders (text, or jsonl with texts, instructions or chats, also as .gz), in the order in which
    they are read. The model itself stays as it is, bit by bit: each kind of text gets an expert of its own,
    and who answers a text is found from its beginning. Each file is read once, and before an expert is sealed
    it reads some of its rows again. This is the recipe `learn`: further settings stand behind the texts as
    dotted flags (`--training.batch_size 8`).

    Args:
        words: model, texts, and then settings.
        steps: optimizer steps on each text; by default one pass over it.
        boundaries: tell the learner where a text begins and ends.
        name: of the run directory under runs/.
        resume: go on with this run.
        specialists: then train, to compare with, a copy of the whole model on each text alone, on as many
            batches, in the run NAME-specialists.
        watch: learn from the files of this folder as they arrive, each in a run of its own under runs/NAME/.
            Stop it or kill it at any time: the same command goes on.
        once: with --watch: stop when all that is there is learned.
        idle_seconds: with --watch: stop when nothing has arrived for so long.
    """
    from cambia.experiment import learning, train
    from cambia.experiment.build import is_finished
    from cambia.experiment.learn import RECIPE
    from cambia.experiment.specialists import train_specialists
    from cambia.rundir import RunReader

    model, data, flags = _read(words)
    if watch is not None:
        if model is None or data or resume or boundaries or specialists:
            raise ConfigError(
                "--watch takes a model and no texts, --resume, --boundaries or --specialists: "
                "cambia learn MODEL --watch FOLDER"
            )
        return _watch(model, watch, name or RECIPE, steps, flags, 0.0 if once else idle_seconds)
    if once or idle_seconds is not None:
        raise ConfigError("--once and --idle-seconds say when watching ends: give --watch FOLDER")
    if resume is not None:
        if model or name or steps or boundaries:
            raise ConfigError("--resume goes on with a run as it is: leave out model, texts and --name")
        refuse_resuming(resume, "learn")
        folder = train(RECIPE, name=resume, resume=True, overrides=flags)
    elif model is None:
        raise ConfigError(f"name a model and what it shall learn from: {_EXAMPLE}")
    else:
        experiment = learning(model, data, steps=steps, boundaries=boundaries, flags=flags)
        console().print(_told(experiment, len(data)), markup=False)
        folder = train(experiment, name=name)
    if specialists and is_finished(RunReader(folder)):
        console().print("specialists: the whole model, on each text alone", markup=False)
        if not train_specialists(folder):
            console().print(
                f"go on with them: cambia learn --resume {folder.name} --specialists", markup=False
            )
            return 130
    return reported(folder)


def _told(experiment: Experiment, texts: int) -> str:
    """What is about to be done, of what the user need not have said."""
    from cambia.reporting.units import plural

    training = experiment.training
    length = "one pass over each" if training.epochs in (None, 1) else f"{training.epochs:g} passes over each"
    if training.steps or training.tokens:
        unit = "step" if training.steps else "token"
        length = f"{plural(training.steps or training.tokens or 0, unit)} on each"
    return (
        f"{plural(texts, 'text')}, {length}, batches of {training.batch_size} x "
        f"{training.sequence_length} tokens, learning rate {experiment.optimizer.learning_rate:g}"
    )


def _watch(
    model: str,
    inbox: Path,
    name: str,
    steps: int | None,
    flags: dict[str, Any],
    idle_seconds: float | None,
) -> int:
    from cambia import rundir
    from cambia.experiment.watch import NEWEST, Watcher

    out = console()
    home = rundir.run_folder(name)
    watcher = Watcher(model, inbox, home, steps, flags, say=lambda line: out.print(line, markup=False))
    if not watcher.watch(idle_seconds=idle_seconds):
        return 130
    if not (home / NEWEST).exists():
        out.print(f"nothing has arrived in {inbox}", markup=False)
        return 0
    return reported(home / NEWEST)


def _read(words: tuple[str, ...]) -> tuple[str | None, list[str], dict[str, Any]]:
    """`MODEL DATA... --any.field value` taken apart."""
    from cambia.config import parse_flags

    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    model, *data = words[:first] or (None,)
    return model, [word for word in data if word is not None], parse_flags(words[first:])
