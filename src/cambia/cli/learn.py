"""`cambia learn`."""

from __future__ import annotations

from typing import Any

from cambia.cli.app import Settings, app, console
from cambia.errors import ConfigError

_EXAMPLE = "cambia learn MODEL DATA..."


@app.command
def learn(
    *words: Settings,
    steps: int | None = None,
    boundaries: bool = False,
    name: str | None = None,
    resume: str | None = None,
) -> int:
    """Teach a model one text after another, lose nothing, and give no labels: `cambia learn MODEL DATA...`.

    MODEL is a folder of Hugging Face, or a run, checkpoint or folder of experts, which then goes on. DATA are
    files or folders (text, or jsonl with texts, instructions or chats, also as .gz), in the order in which
    they are read. The model itself stays as it is, bit by bit: each kind of text gets an expert of its own,
    and who answers a text is found from its beginning. Each file is read once, and before an expert is sealed
    it reads its latest rows again. This is the recipe `learn`: further settings stand behind the texts as
    dotted flags (`--training.batch_size 8`).

    Args:
        words: model, texts, and then settings.
        steps: optimizer steps on each text; by default one pass over it.
        boundaries: tell the learner where a text begins and ends.
        name: of the run directory under runs/.
        resume: go on with this run.
    """
    from cambia.experiment import learning, train
    from cambia.reporting import load_run, print_summary, write_report

    model, data, flags = _read(words)
    if resume is not None:
        if model or name or steps or boundaries:
            raise ConfigError("--resume goes on with a run as it is: leave out model, texts and --name")
        folder = train(RECIPE, name=resume, resume=True, overrides=flags)
    elif model is None:
        raise ConfigError(f"name a model and what it shall learn from: {_EXAMPLE}")
    else:
        experiment = learning(model, data, steps=steps, boundaries=boundaries, flags=flags)
        folder = train(experiment, name=name)
    finished = load_run(folder)
    write_report(finished)
    print_summary(finished, console())
    return 0 if finished.status == "finished" else 130


RECIPE = "learn"


def _read(words: tuple[str, ...]) -> tuple[str | None, list[str], dict[str, Any]]:
    """`MODEL DATA... --any.field value` taken apart."""
    from cambia.config import parse_flags

    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    model, *data = words[:first] or (None,)
    return model, [word for word in data if word is not None], parse_flags(words[first:])
