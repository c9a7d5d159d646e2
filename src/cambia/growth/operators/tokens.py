"""Tokens: more rows in the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cambia.errors import ConfigError, GrowthError
from cambia.growth.operators.operator import OLD_AMOUNTS, Amount, Contract, Operator, Shape, Step
from cambia.nn.param_map import AxisMap, ParamMap, TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AddTokens(Amount, Operator):
    """More rows in the vocabulary, each the mean of old ones.

    The logits of old tokens are what they were. The loss is not: the new tokens take a share of the
    probability, about the number of new over the number of old tokens, and training gives it back. (On the
    mean: Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.) A native model can hide them
    from prediction (`hidden`); then the loss is what it was, too.

    With no amount the vocabulary is padded to the next multiple of 64, which matrix kernels like.

        >>> words = ["photosynthesis", "chlorophyll"]
        >>> grow(model, AddTokens.spelled(tokenizer, words))
        >>> tokenizer.add_tokens(words)
    """

    OLD_SPELLINGS: ClassVar[Mapping[str, str]] = OLD_AMOUNTS

    pieces: list[list[int]] | None = None
    """For each new token the old ones that spell it: it starts as their mean. New tokens beyond these, or
    all where it is left out, start as the mean of all old ones."""
    tokenizer_length: int | None = None
    """How many tokens the tokenizer knows. Where the vocabulary has more rows already, new tokens would get
    those, and the new rows would stay unused: this is refused."""
    hidden: bool = False
    """Hide all new tokens from prediction, so that the loss stays too; set `model.config.predictable_tokens`
    to None when training on them begins. Only for native models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pieces is not None and not all(self.pieces):
            raise ConfigError("pieces= must name at least one old token for each new one")

    @classmethod
    def spelled(cls, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], **settings: Any) -> AddTokens:
        """New tokens for words, each the mean of the tokens that spell it now.

        Args:
            tokenizer: as it is, before the words are added to it.
            settings: other fields.

        Raises:
            ConfigError: a word is one token already.
        """
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, spelling in zip(words, pieces, strict=True):
            if len(spelling) < 2:
                raise ConfigError(f"{word!r} is the token {spelling} already: leave it out")
        return cls(pieces=pieces, tokenizer_length=len(tokenizer), **settings)

    @property
    def contract(self) -> Contract:
        return Contract(exactness="old tokens", alive_within=1)

    def step(self, shape: Shape) -> Step:
        shape.need("vocab")
        old, pieces = shape.config.vocab_size, self.pieces or []
        self._check(shape, old)
        if pieces and self.factor is None and self.add is None and self.to is None:
            new = old + len(pieces)
        else:
            new = self.after(old, multiple_of=64)
        if new - old < len(pieces):
            raise GrowthError(f"pieces= spell {len(pieces)} tokens, and {new - old} are added: add more")
        groups = {old + i: spelling for i, spelling in enumerate(pieces)}
        axis = dataclasses.replace(AxisMap.averaged(old, new), groups=groups)
        params = {}
        for name in shape.shapes:
            names = shape.table.axes(name).names
            params[name] = TensorMap(name, {names.index("vocab"): axis} if "vocab" in names else {})
        config = shape.with_sizes(vocab_size=new)
        if self.hidden and config.predictable_tokens is None:
            config.predictable_tokens = old
        return Step(config, ParamMap(params), list(range(shape.num_layers)))

    def _check(self, shape: Shape, old: int) -> None:
        """Refuse what does not fit a vocabulary of `old` rows."""
        free = old - (self.tokenizer_length or old)
        if free > 0:
            raise GrowthError(
                f"the tokenizer knows {self.tokenizer_length} tokens and the vocabulary has {old} rows: the "
                f"next {free} tokens have rows already, so add them to the tokenizer alone"
            )
        if free < 0:
            raise GrowthError(
                f"the tokenizer knows {self.tokenizer_length} tokens and the vocabulary has only {old} rows: "
                f"grow it to={self.tokenizer_length} first, without tokenizer_length="
            )
        unknown = [i for spelling in self.pieces or [] for i in spelling if not 0 <= i < old]
        if unknown:
            raise GrowthError(f"pieces= name the tokens {unknown[:5]}, and the vocabulary has {old}")
        if self.hidden and not shape.table.hides_tokens:
            raise GrowthError(
                f"a stock {shape.table.name} model cannot hide tokens from prediction: leave hidden= out, "
                "and the loss moves by the new tokens' share of the probability"
            )
