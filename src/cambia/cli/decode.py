"""`cambia tune-decoding`."""

from __future__ import annotations

from cambia.cli.app import Settings, Whole, app, console, refuse_resuming, reported
from cambia.errors import ConfigError

_EXAMPLE = "cambia tune-decoding MODEL --data FILE"


@app.command(name="tune-decoding")
def tune_decoding(
    model: str | None = None,
    *settings: Settings,
    data: list[str] | None = None,
    reward: list[str] | None = None,
    by: str | None = None,
    tokens: Whole | None = None,
    expert: str | None = None,
    name: str | None = None,
    resume: str | None = None,
    grid_points: Whole = 3,
    optuna: bool = True,
) -> int:
    """Learn how to decode from a model, which stays as it is, and compare with what people use.

    Temperature, top-p and penalties are searched by what texts are worth; `--by gradient` learns them, and a
    head for each token (`--decoding.context true`), by the score function, `--by likelihood` temperature,
    penalties and weights of layers and heads from the text alone. Three tenths of the text's documents are
    kept for calibrating the comparison, two for the comparison. This is the recipe `tune_decoding`: further
    settings stand behind as dotted flags (`--decoding.fit.new_tokens 64`).

    Args:
        model: a folder of Hugging Face, a run, or a checkpoint.
        settings: dotted settings.
        data: files or folders with text as it should be written; prompts are taken from it.
        reward: what is maximised: match (the default), diversity, length:40, pattern:REGEX,
            function:module:name, style:CORPUS, fluency:MODEL, or your own, my_module:MyReward. Several are
            added, each with a weight before it: --reward match --reward "0.2 length:40".
        by: search, gradient or likelihood.
        tokens: that are written for it at most.
        expert: of a run with experts: learn for this one alone.
        name: of the run directory under runs/.
        resume: go on with this run.
        grid_points: compare with a grid of so many values of each parameter; 0 does not.
        optuna: compare with an Optuna study of as many tokens.
    """
    from cambia.config import parse_flags
    from cambia.experiment import train
    from cambia.experiment.build import is_finished
    from cambia.experiment.tune import RECIPE, judged, tuning
    from cambia.rundir import RunReader

    flags = parse_flags(settings)
    if resume is not None:
        if model or data or reward or by or tokens or expert or name:
            raise ConfigError("--resume goes on with a run as it is: leave out model, --data and the others")
        refuse_resuming(resume, "tune-decoding")
        folder = train(RECIPE, name=resume, resume=True, overrides=flags)
    elif model is None or not data:
        raise ConfigError(f"name a model, and text as it should be written: {_EXAMPLE}")
    else:
        given = {"decoding.fit.by": by, "decoding.fit.tokens": tokens, "model.expert": expert}
        chosen = {flag: value for flag, value in given.items() if value is not None}
        folder = train(tuning(model, data, rewards=reward or (), flags={**chosen, **flags}), name=name)
    if not is_finished(RunReader(folder)):
        return reported(folder)
    with console().status("comparing") as status:
        judged(folder, grid_points=grid_points, optuna=optuna, told=status.update)
    return reported(folder)
