"""Text in, text out: continuing prompts with any causal language model.

A thin layer over `model.generate` that does what a caller forgets: prompts of different length are padded
on the left, so that all of them end where generation begins; the seed decides everything and the global
random state stays as it was; and nothing after the end of a text is decoded.

    >>> continue_text(model, tokenizer, ["Once upon", "def"], max_new_tokens=32, temperature=0.8, seed=1)
    [' a time ...', ' main(): ...']
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from cambia.errors import ConfigError
from cambia.nn.modes import evaluating

# B prompts, T tokens of the longest prompt

TEMPERATURE, TOP_P = 0.7, 0.9
"""How text is drawn where nobody says otherwise and nothing was learned."""


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = 0,
    writer: Any = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Args:
        max_new_tokens: stop after this many, or at the model's (or else the tokenizer's) end-of-text token.
        temperature: divides the logits before sampling; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        seed: the same seed, prompts and model give the same texts.
        writer: whose `generate` writes; the model itself, or what stands around it, as LoRA experts do.

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
    ends = end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
    rows = _token_rows(tokenizer, prompts)
    lengths = [len(row) for row in rows]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        pad_token_id=padding,
        eos_token_id=ends or None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    longest = model.config.max_position_embeddings
    left = max_new_tokens
    cuda = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), only_as_told(model), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        while left > 0 and not all(set(row[n:]) & set(ends) for row, n in zip(rows, lengths, strict=True)):
            # A model says nothing sensible past the length that it was trained for: where the text
            # outgrows it, its last half is read again as a prompt.
            room = min(left, max(longest - max(map(len, rows)), longest // 2, 1))
            settings.max_new_tokens = room
            new = _continued(
                writer or model, [row[-max(longest - room, 1) :] for row in rows], settings, padding
            )
            rows = [row + more for row, more in zip(rows, new, strict=True)]
            left -= room
    texts = [before_end(row[length:], ends) for row, length in zip(rows, lengths, strict=True)]
    return [str(tokenizer.decode(text, skip_special_tokens=True)) for text in texts]


@contextmanager
def only_as_told(model: PreTrainedModel) -> Generator[None]:
    """Inside the block `generate` draws as it is told, and nothing of the model's own generation config but
    the tokens that begin, end and fill a text."""
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def routes_of(experts: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str | None]:
    """Which expert writes behind each prompt; None: the model alone.

    Args:
        experts: `LoraExperts`.
    """
    rows = _token_rows(tokenizer, prompts)
    return [experts.route(torch.tensor([row]), tokens=len(row))[0] for row in rows]


def _token_rows(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    for prompt in prompts:
        # Bytes of a command line that are not UTF-8 arrive as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"the prompt {prompt!r} is not UTF-8 text; convert it (iconv -t UTF-8)")
    rows = tokenizer(list(prompts))["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ConfigError(f"the prompt {prompt!r} has no token to continue; give at least one character")
    return rows


def _continued(
    model: Any, rows: list[list[int]], settings: GenerationConfig, padding: int
) -> list[list[int]]:
    """What the model writes behind each row."""
    input_ids, attention_mask = left_padded(rows, padding)
    tokens = model.generate(
        input_ids.to(model.device), attention_mask=attention_mask.to(model.device), generation_config=settings
    )
    return tokens[:, input_ids.shape[1] :].tolist()


def left_padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each; done here, so that a tokenizer without padding token serves too."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """The tokens that end a text: the model's, or else those of a tokenizer."""
    ends = model.generation_config.eos_token_id
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]


def before_end(tokens: list[int], ends: list[int]) -> list[int]:
    """What stands before the first end token; padding comes behind it."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@torch.no_grad()
def written_rows(
    model: PreTrainedModel, rows: int, length: int, *, first: int, generator: torch.Generator
) -> Tensor:
    """Rows of text that the model itself writes, (rows, length): each token drawn at the model's own odds.

    A row begins with the token `first` and goes on past the end of a text, as training rows do.

    Args:
        generator: of the draws, on the CPU.
    """
    token = torch.full((rows, 1), first, device=model.device)
    written, past = [token], None
    with evaluating(model):
        while len(written) < length:
            outputs = model(input_ids=token, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            odds = outputs.logits[:, -1].float().softmax(-1).cpu()  # (rows, V)
            token = torch.multinomial(odds, 1, generator=generator).to(model.device)
            written.append(token)
    return torch.cat(written, 1)
