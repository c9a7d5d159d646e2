"""A data loader of one's own, made into a stream of one task.

A batch may be a tensor of token ids (B, T), a tuple whose first item is one, or a mapping with
`input_ids` and, where they are there, `labels` (what is trained on, -100 where it is not; not shifted, as
everywhere in transformers) and `attention_mask` (0 on padding, which must be on the right).

    >>> stream = LoaderStream(dataloader, validation=other_dataloader)
    >>> stream.next_batch(0).input_ids.shape
    torch.Size([16, 127])
"""

# B batch (rows), T time (sequence length)

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from cambia.data.batches import IGNORED, Batch
from cambia.data.streams import Stage
from cambia.errors import CheckpointError, DataError


class LoaderStream:
    """One task, read from an iterable of batches again and again.

    Args:
        loader: gives batches each time that it is iterated over; a generator is used up after one pass.
        validation: batches for the validation loss, read anew each time.
        tokenizer: with it text is counted in bytes, so that bits per byte can be told.
        name: of the task, and of its only stage.

    Raises:
        DataError: there is no batch in it, or the validation batches can be read only once.
    """

    boundaries = True

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        validation: Iterable[Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "data",
    ):
        self.names = [name]
        self.stages = [Stage.only(self.names, 0)]
        if validation is not None and iter(validation) is validation:
            raise DataError(
                "the validation batches are a generator, which is used up the first time: give a DataLoader "
                "or a list"
            )
        self.loader, self.validation, self.tokenizer = loader, validation, tokenizer
        self.epoch = 0
        self.index = 0  # batches taken in this epoch
        self._begin()
        first = next(self._batches, None)
        if first is None:
            raise DataError("the data loader gives no batch")
        self._batches = itertools.chain([first], self._batches)
        self.batch_size, self.sequence_length = self._read(first).input_ids.shape

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def lengths(self) -> list[int | None]:
        """Training tokens of an epoch; None where the loader does not say how long it is."""
        try:  # a DataLoader has a length by its class, and not where its dataset has none
            batches = len(self.loader) if isinstance(self.loader, Sized) else None
        except TypeError:
            batches = None
        return [None if batches is None else batches * self.tokens_per_batch]

    def next_batch(self, stage: int, *, at: float = 0.0, rows: int | None = None) -> Batch:
        """The next batch, whole whatever `rows` says; at the end the loader begins again."""
        batch = next(self._batches, None)
        if batch is None:
            self.epoch, self.index = self.epoch + 1, 0
            self._begin()
            batch = next(self._batches, None)
        if batch is None:
            raise DataError(
                "the data loader gave out before training ended, and begins with nothing: give a DataLoader "
                "or a list instead of a generator, or fewer steps"
            )
        self.index += 1
        return self._read(batch)

    def evaluation(
        self, task: int, split: str, max_bytes: int, batch_size: int, context: int = 0
    ) -> Iterator[Batch]:
        """The validation batches; there are no others, and they are read whole."""
        if split == "valid":
            yield from map(self._read, self.validation or ())

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches taken in it, and the random state from which a loader drew its order."""
        return {"epoch": self.epoch, "index": self.index, "random": self._random}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there: the epoch is begun as it was, and what was taken is read over.

        Raises:
            CheckpointError: it is the state of another kind of loader.
        """
        self.epoch, self.index = state["epoch"], state["index"]
        self._random = state.get("random", self._random)
        generators, drawn = _generators(self.loader), self._random["own"].values()
        if len(generators) != len(drawn):
            raise CheckpointError(
                f"the data loader has {len(generators)} random generators of its own, and the one that the "
                f"checkpoint was written with had {len(drawn)}: give the same loader"
            )
        if self.epoch == 0 and isinstance(self.loader, DataLoader):
            self.loader._iterator = None  # persistent workers begin their first epoch in a way of its own
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random["torch"])
            for generator, one in zip(generators, drawn, strict=True):
                generator.set_state(one)
            self._batches = iter(self.loader)
            # The very first batch was taken when the stream was made, and an order is drawn with it.
            taken = list(itertools.islice(self._batches, self.index or 1))
        if self.index == 0:
            self._batches = itertools.chain(taken, self._batches)

    def _begin(self) -> None:
        """Begin an epoch."""
        own = {str(i): generator.get_state() for i, generator in enumerate(_generators(self.loader))}
        self._random = {"torch": torch.get_rng_state(), "own": own}
        self._batches: Iterator[Any] = iter(self.loader)

    def _read(self, batch: Any) -> Batch:
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        ids = ids[0] if isinstance(ids, list | tuple) and ids and isinstance(ids[0], Tensor) else ids
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
            told = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise DataError(
                f"a batch holds {told} as input_ids; expected token ids (B, T) with at least two tokens a row"
            )
        labels = given.get("labels")
        labels = ids if labels is None else labels
        mask = given.get("attention_mask")
        if mask is not None:
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise DataError("a batch is padded on the left: pad on the right (padding_side='right')")
            labels = labels.masked_fill(mask == 0, IGNORED)
        targets = labels[:, 1:].clone()
        return Batch(ids[:, :-1], targets, self._count(targets), self.names[0])

    def _count(self, targets: Tensor) -> int:
        if self.tokenizer is None:
            return 0
        rows = [row[row != IGNORED].tolist() for row in torch.unbind(targets)]
        return sum(len(text.encode("utf-8", "replace")) for text in self.tokenizer.batch_decode(rows))


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """Generators that a DataLoader and its samplers draw from, if they have any of their own."""
    batches = getattr(loader, "batch_sampler", None)
    places = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = (getattr(place, "generator", None) for place in places)
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
