"""How LoRA experts answer when nobody says whose a text is: each sequence is routed by its own beginning.

A token is answered by an expert only if that expert was chosen from tokens before it. Until enough of a
sequence has been read the model alone answers, so what is said of any token never depends on a later one.
"""

# B batch (rows), T time, P tokens from which is routed, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from cambia.errors import ConfigError
from cambia.models.parts.deciding import Answer
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import Prefixes, PrefixReader
from cambia.models.routing.token_grams import TokenGrams

if TYPE_CHECKING:
    from cambia.models.parts.lora_experts import LoraExperts


def prefixes_of(
    experts: LoraExperts, input_ids: Tensor, attention_mask: Tensor | None, tokens: int
) -> Prefixes:
    """The first tokens of each row.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 0 where a row is padded, on either side.
        tokens: at most so many.
    """
    reader = PrefixReader(experts.model, experts.using, layer=experts.feature_layer)
    if attention_mask is None:
        return reader.read(input_ids[:, :tokens])
    starts, lengths = _extents(attention_mask)
    width = min(tokens, int(lengths.max()))
    place = starts[:, None] + torch.arange(width, device=starts.device)  # (B, P)
    rows = input_ids.gather(1, place.clamp(max=input_ids.shape[1] - 1))
    return reader.read(rows, lengths.clamp(max=width))


def measured(experts: LoraExperts, input_ids: Tensor) -> tuple[TokenGrams, FeatureGaussian, PrefixReader]:
    """Sealed statistics of rows (N, T), and what can read more of them."""
    model = experts.model
    reader = PrefixReader(model, experts.using, layer=experts.feature_layer)
    features = reader.read(input_ids).features()
    grams, gaussian = TokenGrams(experts.router.vocab_size), FeatureGaussian(features.shape[1])
    grams.observe(input_ids)
    gaussian.observe(features)
    grams.seal()
    gaussian.seal()
    return grams, gaussian, reader


def routed_logits(
    experts: LoraExperts,
    answer: Answer,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tokens: int,
    **settings: Any,
) -> CausalLMOutputWithPast:
    """Each row answered as was decided from its `tokens`-th token on, and by the model alone before.

    A row that the model alone answers is left as one reading gave it, to the bit: read in parts it would be
    rounded otherwise. The loss, where `labels` are given, is that of these logits.

    Raises:
        ConfigError: only some of the logits are asked for.
    """
    if settings.get("logits_to_keep"):
        raise ConfigError("rows that are routed need all of their logits: leave out logits_to_keep")
    model, labels = experts.model, settings.pop("labels", None)
    with answer.block():
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, **settings)
    if labels is not None:
        outputs.loss = None
    if any(answer.by_experts):
        _as_before(experts, answer, outputs, input_ids, attention_mask, tokens)
    if labels is not None:
        vocabulary = outputs.logits.shape[-1]
        outputs.loss = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocabulary)
    return outputs


def _as_before(
    experts: LoraExperts,
    answer: Answer,
    outputs: CausalLMOutputWithPast,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tokens: int,
) -> None:
    """Put in what the model alone says where too little had been read to decide."""
    with experts.using(None):
        first = slice(0, tokens - 1 + _padding(attention_mask))
        mask = None if attention_mask is None else attention_mask[:, first]
        alone = experts.model(input_ids=input_ids[:, first], attention_mask=mask, use_cache=False).logits
    assert outputs.logits is not None
    outputs.logits = outputs.logits.clone()
    unread = _read(input_ids, attention_mask)[:, first] < tokens  # (B, P - 1): too little was read there
    unread = unread & torch.tensor(answer.by_experts, device=unread.device)[:, None]
    outputs.logits[:, first][unread] = alone[unread]


def _read(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T): how many tokens of its row have been read at each place, itself included."""
    if attention_mask is None:
        return torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    return attention_mask.long().cumsum(1)


def _padding(attention_mask: Tensor | None) -> int:
    """Places before the last row begins."""
    return 0 if attention_mask is None else int(_extents(attention_mask)[0].max())


def _extents(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row begins, and its tokens, (B,) each.

    Raises:
        ConfigError: a row has holes, or no token.
    """
    mask = attention_mask.long()
    lengths = mask.sum(1)
    starts = mask.argmax(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    whole = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    if not bool((whole == mask.bool()).all()) or not bool((lengths > 0).all()):
        raise ConfigError("attention_mask has a row without tokens, or with padding between them")
    return starts, lengths
