"""Text in, text out: continuing prompts with any causal language model.

A thin layer over `model.generate` that does what a caller forgets: prompts of different length are padded
on the left, so that all of them end where generation begins; the seed decides everything and the global
random state stays as it was; and nothing after the end of a text is decoded.

    >>> continue_text(model, tokenizer, ["Once upon", "def"], max_new_tokens=32, temperature=0.8, seed=1)
    [' a time ...', ' main(): ...']
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from cambia.errors import ConfigError

# B prompts, T tokens of the longest prompt


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Args:
        max_new_tokens: stop after this many, or at the model's (or else the tokenizer's) end-of-text token.
        temperature: divides the logits before sampling; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        seed: the same seed, prompts and model give the same texts.

    Raises:
        ConfigError: a setting is out of range, or a prompt has no token.
    """
    if temperature < 0:
        raise ConfigError(
            f"temperature={temperature} is negative; use 0 for the likeliest token, 1 for the model's odds"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is not a share; use a number above 0 and at most 1")
    if not prompts:
        return []
    ends = _end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
    input_ids, attention_mask = _left_padded(tokenizer, prompts, padding)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        eos_token_id=ends or None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens = model.generate(  # ty: ignore[not-callable]
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=settings,
            )
    finally:
        model.train(was_training)
    new = tokens[:, input_ids.shape[1] :].tolist()
    return [str(tokenizer.decode(_before_end(row, ends), skip_special_tokens=True)) for row in new]


def _left_padded(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], padding: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each; done here, so that a tokenizer without padding token serves too."""
    rows = tokenizer(list(prompts))["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ConfigError(f"the prompt {prompt!r} has no token to continue; give at least one character")
    longest = max(map(len, rows))
    input_ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]


def _before_end(tokens: list[int], ends: list[int]) -> list[int]:
    """What stands before the first end token; padding comes behind it."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
