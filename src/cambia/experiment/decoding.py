"""A run's decoding: prompts from its text, rewards, and the policy that learns."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cambia.data.sources import TRAIN
from cambia.data.streams import Stream
from cambia.data.tokenizers import Tokenizer
from cambia.decoding.learners import PolicyLearner
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards import total
from cambia.decoding.rollouts import Rollouts
from cambia.decoding.settings import DecodingConfig
from cambia.experiment.tree import Experiment


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
    every = Prompts([row for p in found for row in p.rows], [row for p in found for row in p.human])
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
