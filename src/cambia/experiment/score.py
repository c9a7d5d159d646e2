"""Score a finished model: on the tasks of its run, or on text files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cambia.continual.methods import Naive
from cambia.data.batches import evaluation_batches
from cambia.data.corpus import TokenFile
from cambia.data.textfiles import FilesSource
from cambia.data.tokenizers import Tokenizer
from cambia.errors import ConfigError
from cambia.experiment.build import open_stream
from cambia.experiment.reopen import reopen
from cambia.experiment.starts import experts_beside, model_folder
from cambia.experiment.tree import experiment_from
from cambia.models.saved import load_model, load_tokenizer
from cambia.probes import Likelihood, bits_per_byte
from cambia.rundir import LATEST, RunReader
from cambia.training.scoring import Scorer
from cambia.training.settings import EvaluationConfig
from cambia.training.step import autocast

_BATCH = 16


def score_run(run: str, split: str, max_bytes: int) -> dict[str, Likelihood]:
    """Likelihood of each task's text under a run's latest model, as its method has it answer."""
    if split not in ("valid", "test"):
        raise ConfigError(f"--split {split!r}: expected valid or test")
    reader = RunReader(run)
    experiment = experiment_from(reader.config(), source=str(reader.folder), flags={})
    _, stream = open_stream(experiment)
    if experiment.method.contract.needs_identity or experiment.method.contract.routes:
        opened = reopen(reader.folder / LATEST, reader.config())
        model, method = opened.model, opened.method
    else:
        model, method = load_model(model_folder(run)), Naive()
    context = experiment.evaluation.context_tokens
    config = EvaluationConfig(max_bytes=max_bytes, batch_size=_BATCH, context_tokens=context)
    precision = functools.partial(autocast, experiment.training, model.device)
    scorer = Scorer(model, config, autocast=precision, average=None, method=method)
    return scorer.row(stream, split)


def score_files(model: str, files: Sequence[Path], max_bytes: int) -> dict[str, Likelihood]:
    """Likelihood of each text file under a model; where it has experts, as they are routed."""
    folder = model_folder(model)
    loaded = load_model(folder)
    asked = experts_beside(model, loaded) or loaded
    tokenizer = Tokenizer(load_tokenizer(folder))
    length = min(512, loaded.config.max_position_embeddings)
    scores = {}
    for file in files:
        documents = FilesSource(path=str(file), limit_bytes=max_bytes).documents()
        text = TokenFile.from_texts((document.text for document in documents), tokenizer)
        scores[str(file)] = _score(asked, text, length)
    return scores


def _score(model: Any, text: TokenFile, sequence_length: int) -> Likelihood:
    return bits_per_byte(model, evaluation_batches(text, batch_size=_BATCH, sequence_length=sequence_length))
