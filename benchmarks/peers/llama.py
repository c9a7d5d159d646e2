"""What all sides share: a small trained Llama, a large random one, text, and how they are trained.

It needs torch, transformers and numpy alone, for libraries that live in an environment of their own import
it too. The small model is stories260K (260,032 parameters, trained on TinyStories by Andrej Karpathy) in
the layout of transformers; its queries and keys turn neighboring dimensions together there, and the
halves of a head here, so their rows change places.
"""

from __future__ import annotations

import functools
import gzip
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BEGIN = 1
BATCH, LENGTH = 8, 128
LEARNING_RATE = 1e-3
HELD_OUT = 50_000
"""Characters at the end of the text that are measured on."""


def stories(folder: Path) -> LlamaForCausalLM:
    """stories260K as transformers has it, from `stories260K.bin`."""
    content = (folder / "stories260K.bin").read_bytes()
    width, ffn, layers, heads, groups, vocabulary, length = struct.unpack("7i", content[:28])
    values = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy())
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    at = 0
    for kind in _ORDER:
        names = [kind.format(i) for i in range(layers)] if "{}" in kind else [kind]
        for name in names:
            size = state[name].numel()
            value = values[at : at + size].view(state[name].shape)
            at += size
            if "q_proj" in name or "k_proj" in name:
                value = _halves(value, heads if "q_proj" in name else groups)
            state[name].copy_(value)
    return model


_ORDER = [
    "model.embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight",
    *(f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"),
    "model.layers.{}.post_attention_layernorm.weight",
    *(f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "down", "up")),
    "model.norm.weight",
]


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (0 1)(2 3) to halves (0 2)(1 3)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def random_llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, of a size at which time and memory mean something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


# ---- text ----------------------------------------------------------------------------------------


class Pieces:
    """The tokenizer of stories260K: byte-pair encoding with 512 pieces, word by word."""

    def __init__(self, path: Path):
        content = path.read_bytes()
        at, self.score, self.number = 4, [], {}
        while at < len(content):
            score, size = struct.unpack("fi", content[at : at + 8])
            at += 8 + size
            self.number.setdefault(content[at - size : at], len(self.score))
            self.score.append(score)
        self.word = functools.cache(self._word)

    def __call__(self, text: str) -> list[int]:
        return [piece for word in re.findall(r" ?[^ ]+| ", " " + text) for piece in self.word(word)]

    def _word(self, word: str) -> tuple[int, ...]:
        pieces: list[bytes] = []
        for character in word:
            encoded = character.encode()
            pieces += [encoded] if encoded in self.number else [bytes([byte]) for byte in encoded]
        while True:
            pairs = [pieces[i] + pieces[i + 1] for i in range(len(pieces) - 1)]
            known = [
                (self.score[self.number[pair]], -i) for i, pair in enumerate(pairs) if pair in self.number
            ]
            if not known:
                break
            i = -max(known)[1]
            pieces[i : i + 2] = [pairs[i]]
        # A byte that is no piece has a number of its own, behind <unk>, <s> and </s>.
        return tuple(self.number[piece] if piece in self.number else piece[0] + 3 for piece in pieces)


def text(folder: Path, tokenizer: Pieces) -> tuple[Tensor, Tensor]:
    """Tiny Shakespeare as tokens: what is trained on and, from its end, what is measured on."""
    content = gzip.decompress((folder / "tiny-shakespeare" / "input.txt.gz").read_bytes()).decode()
    train = torch.tensor(tokenizer(content[:-HELD_OUT]))
    return train, torch.tensor(tokenizer(content[-HELD_OUT:]))


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """(BATCH, LENGTH) windows, each begun as a text, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        windows[:, 0] = BEGIN
        yield windows


# ---- training ------------------------------------------------------------------------------------


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, stream: Iterator[Tensor], steps: int
) -> None:
    """AdamW steps at a constant rate."""
    model.train()
    for _ in range(steps):
        ids = next(stream)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of every arm."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


@torch.no_grad()
def validation_loss(model: torch.nn.Module, tokens: Tensor) -> float:
    """Mean negative log-likelihood, nats per token, over all of a text."""
    model.eval()
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH).clone()
    windows[:, 0] = BEGIN
    losses = [
        model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
        for part in windows.split(32)
    ]
    return sum(losses) / len(windows)


@torch.no_grad()
def relative_error(before: torch.nn.Module, after: torch.nn.Module, ids: Tensor) -> float:
    """Largest difference of logits, of the tokens that were there before, over the largest logit."""
    old = before.eval()(input_ids=ids, use_cache=False).logits
    new = after.eval()(input_ids=ids, use_cache=False).logits[..., : old.shape[-1]]
    return ((new - old).abs().max() / old.abs().max()).item()
