"""A small world of letters: people and models whose texts cost nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cambia.decoding.rewards import Material, Samples

LETTERS = "abcdefghijklmnop"


class Writer:
    """Writes each letter by the one before it.

    Args:
        sharpness: of its choices: 0 takes any letter, infinity always the likeliest.
        blur: the share of its choices that falls on any letter.
    """

    def __init__(self, sharpness: float = 1.0, blur: float = 0.0):
        logits = 1.5 * np.random.default_rng(0).normal(size=(len(LETTERS), len(LETTERS)))
        if np.isinf(sharpness):
            odds = np.eye(len(LETTERS))[logits.argmax(1)]
        else:
            odds = np.exp(sharpness * logits)
            odds /= odds.sum(1, keepdims=True)
        self.odds = (1 - blur) * odds + blur / len(LETTERS)

    def write(self, number: int, *, seed: int, length: int = 40) -> Samples:
        """So many texts, behind prompts of one letter."""
        generator = np.random.default_rng(seed)
        letters = generator.integers(len(LETTERS), size=(number, 1))
        for _ in range(length):
            draws = generator.random((number, 1))
            bounds = self.odds[letters[:, -1]].cumsum(1)
            letters = np.append(letters, (draws > bounds[:, :-1]).sum(1, keepdims=True), 1)
        return samples_of(letters[:, 1:].tolist(), prompts=letters[:, 0].tolist())

    def nats_per_letter(self, samples: Samples) -> float:
        """How surprising it finds them."""
        rows = np.array(samples.tokens)
        return float(-np.log(self.odds[rows[:, :-1], rows[:, 1:]] + 1e-12).mean())


def samples_of(rows: Sequence[Sequence[int]], prompts: Sequence[int] = ()) -> Samples:
    """Continuations of given tokens, each a letter."""
    texts = ["".join(LETTERS[token] for token in row) for row in rows]
    begun = [LETTERS[place] for place in prompts] or ["a"] * len(rows)
    return Samples(begun, texts, rows, texts)


def features(texts: Sequence[str]) -> Tensor:
    """(N, 2 letters): how often each letter comes, and which is last."""
    found = [
        [text.count(letter) for letter in LETTERS] + [text.endswith(letter) for letter in LETTERS]
        for text in texts
    ]
    return torch.tensor(found, dtype=torch.float64)


PEOPLE, MODEL, LOOPS = Writer(), Writer(blur=0.3), Writer(np.inf)


def material(number: int = 160) -> Material:
    """What people wrote, and what the model writes behind the same prompts."""
    human, plain = PEOPLE.write(number, seed=1), MODEL.write(number, seed=2)
    return Material(human, Samples(human.prompts, plain.texts, plain.tokens, human.texts), features)
