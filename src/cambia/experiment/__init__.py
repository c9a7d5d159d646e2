"""Experiments: from settings to a run. The one place that knows every family.

>>> from cambia.experiment import read_experiment, train
>>> folder = train(read_experiment("first_growth", {"training.steps": 50}), name="short")
"""

from __future__ import annotations

from cambia.experiment.build import load, train
from cambia.experiment.estimate import Estimate, estimate
from cambia.experiment.learn import learning
from cambia.experiment.tree import Experiment, read_experiment

__all__ = ["Estimate", "Experiment", "estimate", "learning", "load", "read_experiment", "train"]
