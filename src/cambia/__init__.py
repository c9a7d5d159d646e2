"""Cambia: language models that keep growing.

    >>> import cambia
    >>> run = cambia.run("first_growth")        # trains, grows, scores; returns the run directory
    >>> model = cambia.load(run)                # the model of a run or of a checkpoint folder

Everything here is imported when it is first used, so that `import cambia` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from cambia.experiment import Experiment
    from cambia.experiment import load as load
    from cambia.models.causal_lm import CambiaForCausalLM as CambiaForCausalLM
    from cambia.models.config import CambiaConfig as CambiaConfig

_HOME = {
    "load": "cambia.experiment",
    "CambiaConfig": "cambia.models.config",
    "CambiaForCausalLM": "cambia.models.causal_lm",
}

__all__ = ["CambiaConfig", "CambiaForCausalLM", "__version__", "load", "run"]


def run(
    experiment: str | Path | Experiment = "first_growth",
    *,
    name: str | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Run an experiment, write its report, and return the run directory.

    Args:
        experiment: a recipe's name, a YAML file, or an `Experiment`.
        name: of the run; by default the experiment's own, with a number where that is taken.
        resume: go on with the run `name`.
        overrides: dotted settings, ``{"training.steps": 100}``.
    """
    from cambia import experiment as experiments
    from cambia.reporting import load_run, write_report

    folder = experiments.train(experiment, name=name, resume=resume, overrides=overrides)
    write_report(load_run(folder))
    return folder


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
