"""A run's decoding: prompts from its text, rewards, and the policy that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cambia import rundir
from cambia.data.sources import TRAIN
from cambia.data.streams import Stream
from cambia.data.tokenizers import Tokenizer
from cambia.decoding.exporting import PARAMS_JSON
from cambia.decoding.learners import PolicyLearner
from cambia.decoding.parameters import DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards import total
from cambia.decoding.rollouts import Rollouts
from cambia.decoding.settings import DecodingConfig
from cambia.decoding.writing import PolicyWriter
from cambia.errors import ConfigError
from cambia.experiment.tree import Experiment
from cambia.generation import TEMPERATURE, TOP_P


def prompts_of(stream: Stream, settings: DecodingConfig, model: PreTrainedModel, split: str) -> Prompts:
    """Prompts from all of a run's texts, mixed.

    Args:
        split: of the text.

    Raises:
        DataError: no text is long enough, or prompt and continuation are longer than the model's context.
    """
    fit = settings.fit
    found = [
        Prompts.of_documents(
            task.corpus.splits[split],
            prompt_tokens=fit.prompt_tokens,
            new_tokens=fit.new_tokens,
            context=getattr(model.config, "max_position_embeddings", None),
        )
        for task in stream.tasks
    ]
    every = Prompts.joined(found)
    generator = torch.Generator().manual_seed(fit.seed)
    return every.take(torch.randperm(len(every), generator=generator).tolist())


def policy_learner(
    experiment: Experiment, model: PreTrainedModel, tokenizer: Tokenizer, stream: Stream
) -> PolicyLearner:
    """The policy of a run, where its settings have one, at its beginning.

    Raises:
        ConfigError, DataError, MissingExtraError: it cannot learn with these settings or from this text.
    """
    settings = experiment.decoding
    assert settings is not None
    rollouts = Rollouts(
        model,
        tokenizer.hf,
        prompts_of(stream, settings, model, TRAIN),
        new_tokens=settings.fit.new_tokens,
        policy=settings.policy(model),
        seed=settings.fit.seed,
        is_frozen=experiment.training.neural_steps_per_batch == 0,
    )
    return settings.fit.learner(rollouts, total(settings.rewards))


# ---- policies that have learned ------------------------------------------------------------------


_UNTUNED = DecodingParameters(temperature=TEMPERATURE, top_p=TOP_P)


@dataclass(frozen=True)
class Policies:
    """How a model is decoded from, and where it has experts, each of them."""

    default: DecodingPolicy | None
    """None: as people do who have not tuned."""
    by_expert: Mapping[str, DecodingPolicy]

    def __bool__(self) -> bool:
        return self.default is not None or bool(self.by_expert)

    def of(self, route: str | None) -> DecodingPolicy:
        """That of an expert, or of the model alone."""
        return self.by_expert.get(route or "") or self.default or DecodingPolicy(_UNTUNED)

    def writer(
        self, model: PreTrainedModel, routes: Sequence[str | None], *, seed: int, writer: Any = None
    ) -> PolicyWriter | None:
        """Something that writes behind prompts with these routes; None where nothing has learned."""
        if not self:
            return None
        rows = [self.of(route).parameters for route in routes]
        return PolicyWriter(self.default or DecodingPolicy(), model, seed=seed, writer=writer, rows=rows)


def policies_of(words: Sequence[str], model: PreTrainedModel, folder: Path | None) -> Policies:
    """Policies as they are named on the command line.

    Args:
        words: files, or runs whose decoding has learned; EXPERT=FILE for one expert alone.
        model: that they are for.
        folder: the model's, in which one may lie; None does not look there.

    Raises:
        ConfigError: there is no such file, or it is for another model.
    """
    default, by_expert = None, {}
    if folder is not None and (folder / PARAMS_JSON).is_file():
        default = DecodingPolicy.from_json(folder / PARAMS_JSON, model=model)
    for word in words:
        expert, equals, place = word.rpartition("=")
        policy = DecodingPolicy.from_json(_params(place), model=model)
        if not equals:
            default = policy
        elif policy.listens or policy.context is not None:
            raise ConfigError(
                f"--decoding {word}: weights of layers and heads, and a head for each token, are for a whole "
                "model: of one expert only the parameters can be its own"
            )
        else:
            by_expert[expert] = policy
    return Policies(default, by_expert)


def _params(place: str) -> Path:
    """The file of a policy: itself, or that of a run."""
    for folder in (Path(place), rundir.runs_root() / place):
        for path in (folder, folder / rundir.LATEST / PARAMS_JSON, folder / PARAMS_JSON):
            if path.is_file():
                return path
    raise ConfigError(f"--decoding {place}: neither a file nor a run whose decoding has learned")
