"""The command tree, and what every command shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, Token

from cambia import __version__
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

app = App(name="cambia", version=__version__, help="Language models that keep growing.")
runs_app = App(name="runs", help="List, show and delete runs.")
data_app = App(name="data", help="List, prepare and fetch text.")
app.command(runs_app)
app.command(data_app)


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    if text.lstrip("+-").isdecimal():
        return int(text)
    if not float(text).is_integer():  # it would be rounded without a word
        raise ValueError(f"expected a whole number, got {text}")
    return int(float(text))


Whole = Annotated[int, Parameter(converter=_whole)]
"""A flag's whole number; 1e6 is one."""
Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


def console() -> Console:
    """Where a command's answer goes."""
    from rich.console import Console

    return Console(highlight=False)


def refuse_unless(fine: bool, flag: str, value: object, expected: str) -> None:
    """Refuse the value of a flag.

    Raises:
        ConfigError: it is not what was expected.
    """
    if not fine:
        raise ConfigError(f"{flag} {value}: expected {expected}")


def reported(folder: Path) -> int:
    """Write a run's report and show what came of it.

    Returns:
        The exit code: 130 where the run was interrupted.
    """
    from cambia.reporting import load_run, print_summary, write_report

    run = load_run(folder)
    write_report(run)
    print_summary(run, console())
    return 0 if run.status == "finished" else 130


def refuse_resuming(run: str, command: str) -> None:
    """Refuse to go on with a run that another command began, where `learn` or `tune-decoding` shall.

    Raises:
        CambiaError: there is no such run, or not one for this command; the message names the one that is.
    """
    from cambia.rundir import RunReader

    tree = RunReader(run).config()
    kinds = [method.get("type") for method in tree.get("methods") or []]
    fitting = {"learn": kinds == ["experts"], "tune-decoding": tree.get("decoding") is not None}
    if not fitting[command]:
        right = next((other for other, fits in fitting.items() if fits), "run")
        raise ConfigError(
            f"--resume {run}: `cambia {command}` did not make it: cambia {right} --resume {run}"
        )


def recipe_and_flags(words: tuple[str, ...], parse: Any) -> tuple[str | None, dict[str, Any]]:
    """`RECIPE --any.field value` taken apart."""
    if words and not words[0].startswith("-"):
        return words[0], parse(words[1:])
    return None, parse(words)
