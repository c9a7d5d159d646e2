"""The beginnings of some sequences, and what may be asked of them.

Who answers a sequence is decided from its first tokens. Of those there are the tokens themselves, what the
frozen base makes of them (`features`), and how well the base or a Part foretells them (`losses`). The last
two cost a pass of a model, so each is computed when it is first asked for, and once.

    >>> reader = PrefixReader(model, using=experts.using, layer=2)
    >>> prefixes = reader.read(input_ids, lengths)
    >>> prefixes.losses("sql")
    tensor([1.2, 5.9], dtype=torch.float64)

Nothing here looks past the end of a row: what stands there is overwritten before anybody sees it.
"""

# B batch (rows), P prefix tokens, D features, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.errors import ConfigError
from cambia.nn.modes import evaluating

FeaturesOf = Callable[[Tensor, Tensor], Tensor]
"""ids (B, P) and which of them count (B, P) -> (B, D)"""
LossesOf = Callable[[str | None, Tensor, Tensor], Tensor]
"""A Part's id, or None for the base; ids (B, P) and which of them count (B, P) -> nats per token (B,)"""

_MOST_HELD = 1 << 24
"""Numbers that a pass may hold at once, logits or hidden states: of more, rows are taken in turn."""


class Prefixes:
    """The beginnings of some sequences, and what may be asked of them; each answer is computed once.

    Args:
        input_ids: (B, P); what stands behind a row's end is ignored.
        lengths: (B,), tokens that count; all of them by default.
        features_of: what the base makes of the tokens.
        losses_of: how well the base or a Part foretells them.

    Raises:
        ConfigError: a length lies outside of 0..P.
    """

    input_ids: Tensor
    """(B, P) int64; 0 behind a row's end."""
    lengths: Tensor
    """(B,) int64, tokens that count."""
    mask: Tensor
    """(B, P) bool, which tokens count."""

    def __init__(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        features_of: FeaturesOf | None = None,
        losses_of: LossesOf | None = None,
    ):
        rows, width = input_ids.shape
        self.lengths = torch.full((rows,), width) if lengths is None else lengths.to("cpu", torch.int64)
        if self.lengths.shape != (rows,) or not bool(((self.lengths >= 0) & (self.lengths <= width)).all()):
            raise ConfigError(
                f"lengths are {self.lengths.tolist()} for {rows} rows of {width} tokens; expected {rows} "
                f"numbers from 0 to {width}"
            )
        self.mask = torch.arange(width) < self.lengths[:, None]
        self.input_ids = input_ids.to("cpu", torch.int64).masked_fill(~self.mask, 0)
        self._features_of, self._losses_of = features_of, losses_of
        self._features: Tensor | None = None
        self._losses: dict[str | None, Tensor] = {}

    def __len__(self) -> int:
        return len(self.input_ids)

    def features(self) -> Tensor:
        """(B, D) float32: the mean over the tokens of one hidden layer of the frozen base."""
        if self._features is None:
            if self._features_of is None:
                raise ConfigError("these prefixes were made without features_of=, so they have no features")
            self._features = self._features_of(self.input_ids, self.mask).to("cpu", torch.float32)
        return self._features

    def losses(self, name: str | None, rows: Tensor | None = None) -> Tensor:
        """(B,) float64: nats per token that the base (None) or a Part gives each prefix, from token 2 on.

        A prefix of fewer than two tokens has 0.

        Args:
            name: whose.
            rows: (n,), only these are asked for, and the answer is (n,).
        """
        if self._losses_of is None:
            raise ConfigError("these prefixes were made without losses_of=, so they have no losses")
        known = self._losses.setdefault(name, torch.full((len(self),), torch.nan, dtype=torch.float64))
        asked = torch.arange(len(self)) if rows is None else rows
        missing = asked[known[asked].isnan()]
        if len(missing):
            given = self._losses_of(name, self.input_ids[missing], self.mask[missing])
            known[missing] = given.to("cpu", torch.float64)
        return known[asked]

    def know(self, losses: Tensor, features: Tensor) -> None:
        """What somebody else has found out, so that it is not asked for again.

        Args:
            losses: (B,), of the base.
            features: (B, D).
        """
        self._losses[None] = losses.to("cpu", torch.float64)
        self._features = features.to("cpu", torch.float32)

    def first(self, tokens: int) -> Prefixes:
        """The first tokens of each, as prefixes of their own; rows that are shorter stay as they are."""
        return Prefixes(
            self.input_ids[:, :tokens],
            self.lengths.clamp(max=tokens),
            features_of=self._features_of,
            losses_of=self._losses_of,
        )


@dataclass(frozen=True)
class PrefixReader:
    """Prefixes whose questions a model answers."""

    model: PreTrainedModel
    """Any causal language model."""
    using: Callable[[str | None], AbstractContextManager[object]]
    """Inside `using(name)` a Part answers beside the base, inside `using(None)` the base alone."""
    layer: int = -1
    """Whose outputs are the features: 0 are the embeddings, -1 is what the head reads."""

    def read(self, input_ids: Tensor, lengths: Tensor | None = None) -> Prefixes:
        """(B, P) and (B,), as `Prefixes` takes them."""
        return Prefixes(input_ids, lengths, features_of=self.features, losses_of=self.losses)

    @torch.no_grad()
    def read_at_once(self, input_ids: Tensor) -> Prefixes:
        """The same of whole rows (B, P), with the base's losses and features out of one pass."""
        found = self.read(input_ids)
        config = self.model.config
        held = config.vocab_size + config.hidden_size * (config.num_hidden_layers + 1)
        rows = max(1, _MOST_HELD // max(1, input_ids.shape[1] * held))
        losses, features = [], []
        with self.using(None), evaluating(self.model):
            for ids, mask in zip(found.input_ids.split(rows), found.mask.split(rows), strict=True):
                ids = ids.to(self.model.device)
                outputs = self.model(input_ids=ids, use_cache=False, output_hidden_states=True)
                losses.append(_mean_losses(outputs.logits, ids, mask))
                features.append(_mean_state(outputs.hidden_states[self.layer], mask))
        if losses:
            found.know(torch.cat(losses), torch.cat(features))
        return found

    @torch.no_grad()
    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, P) -> (B, D) float32, of the base; a row without tokens has zeros."""
        config = self.model.config
        held = max(1, ids.shape[1] * config.hidden_size * (config.num_hidden_layers + 1))
        rows = max(1, _MOST_HELD // held)
        with self.using(None), evaluating(self.model):
            return torch.cat(
                [self._features(i, m) for i, m in zip(ids.split(rows), mask.split(rows), strict=True)]
            )

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        # The trunk alone: a head would cost as much again where the vocabulary is large.
        trunk = self.model.base_model
        outputs = trunk(ids.to(self.model.device), use_cache=False, output_hidden_states=True)
        return _mean_state(outputs.hidden_states[self.layer], mask)

    @torch.no_grad()
    def losses(self, name: str | None, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, P) -> (B,) float64, nats per token from the second on."""
        if ids.shape[1] < 2:
            return torch.zeros(len(ids), dtype=torch.float64)
        rows = max(1, _MOST_HELD // max(1, ids.shape[1] * self.model.config.vocab_size))
        with self.using(name), evaluating(self.model):
            return torch.cat(
                [self._losses(i, m) for i, m in zip(ids.split(rows), mask.split(rows), strict=True)]
            )

    def _losses(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
        return _mean_losses(self.model(input_ids=ids, use_cache=False).logits, ids, mask)


def _mean_state(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, P, D) and (B, P) -> (B, D) float32: the mean over the tokens that count."""
    counted = mask.to(hidden.device)[..., None]
    return hidden.float().masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1)


def _mean_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, P, V), (B, P) and (B, P) -> (B,) float64: nats per token that counts, from the second on."""
    logits, targets = logits[:, :-1], ids[:, 1:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    counted = mask[:, 1:].to(losses.device)
    losses = losses.view(targets.shape).double().masked_fill(~counted, 0)
    return losses.sum(1) / counted.sum(1).clamp_min(1)
