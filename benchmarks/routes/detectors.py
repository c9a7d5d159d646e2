"""How well each novelty score tells text of a new domain from text of those that are known, and how soon.

Domains are learned one after another as `StreamAllocator` learns them, by counts and sums alone: first how
strange a row is, then what is in it. After each, test text of the known ones stands against test text of the
next. No expert is asked, so none has to be trained.
"""

# N rows, D features, K known domains

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cambia.continual.domains import Domain, ReadRows, read_by
from cambia.continual.novelty import NOVELTY_SCORES, NoveltyDetector, Verdict
from cambia.data.batches import TrainBatches
from cambia.data.sources import TEST, TRAIN
from cambia.data.streams import Stream
from cambia.generation import written_rows
from cambia.models import LoraExperts
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import PrefixReader

TOGETHER = "together"
"""The scores that the detector takes by default, averaged."""
_FIRST, _STRETCH, _REFRESH = 48, 8, 1.25
"""As in `StreamAllocator`: rows with which a domain begins, how they are halved, how often it is renewed."""
_BACKGROUND = (128, 64)
"""Rows of the base's own writing, and their tokens."""


@dataclass(frozen=True)
class Amount:
    """How much text."""

    rows: int
    """Of training text of each domain."""
    batches: int
    """Of test text of each domain, at most; as many stand before a change."""
    batch: int = 16
    """Rows of a batch."""
    trials: int = 4
    """Changes into each domain, at different places of its text."""


@dataclass(frozen=True, eq=False)
class Texts:
    """What the frozen base makes of all domains; it is the same for every order."""

    train: Mapping[str, ReadRows]
    test: Mapping[str, ReadRows]
    """In the order of the text."""
    background: FeatureGaussian
    vocab_size: int

    @classmethod
    def read(cls, model: PreTrainedModel, stream: Stream, amount: Amount) -> Texts:
        experts = LoraExperts(model)  # without an expert: it asks the base
        reader = PrefixReader(model, experts.using)
        length = stream.sequence_length

        def rows(task: int, split: str, count: int, *, shuffle: bool) -> ReadRows:
            file = stream.tasks[task].file(split)
            windows = TrainBatches(file, batch_size=1, sequence_length=length, seed=task, shuffle=shuffle)
            batch = windows.next(min(count, windows.windows_per_epoch))
            prefixes = reader.read(batch.input_ids)
            return ReadRows(batch.input_ids, batch.targets, prefixes.losses(None), prefixes.features())

        count, tokens = _BACKGROUND
        generator = torch.Generator().manual_seed(0)
        own = written_rows(model, count, tokens, first=model.config.bos_token_id or 0, generator=generator)
        background = FeatureGaussian(model.config.hidden_size)
        background.observe(reader.read(own).features())
        background.seal()
        most = amount.batches * amount.batch
        train = {name: rows(i, TRAIN, amount.rows, shuffle=True) for i, name in enumerate(stream.names)}
        test = {name: rows(i, TEST, most, shuffle=False) for i, name in enumerate(stream.names)}
        experts.remove()
        return cls(train, test, background, model.config.vocab_size)


def detected(texts: Texts, order: Sequence[str], amount: Amount) -> list[dict[str, Any]]:
    """For each domain that comes after others: AUROC by score, and the batches until it was noticed."""
    detectors = {name: NoveltyDetector(scores=[name]) for name in NOVELTY_SCORES}
    detectors[TOGETHER] = NoveltyDetector()
    known: list[Domain] = []
    found = []
    for name, new in zip(order, [*order[1:], None], strict=True):
        known.append(_learned(name, texts, amount, list(detectors.values())))
        if new is None:
            break
        names = [domain.name for domain in known]
        read = {domain: read_by(known, texts.test[domain], texts.background) for domain in [*names, new]}
        scores = {}
        for score, detector in detectors.items():
            verdicts = {domain: detector.judge(readings) for domain, readings in read.items()}
            old = [verdicts[domain].scores for domain in names]
            scores[score] = {
                "window": auroc(torch.cat(old), verdicts[new].scores),
                "batch": auroc(
                    torch.cat([in_batches(rows, amount.batch) for rows in old]),
                    in_batches(verdicts[new].scores, amount.batch),
                ),
                **noticed(detector, verdicts[name], verdicts[new], amount),
            }
        found.append({"known": names, "new": new, "scores": scores})
    return found


def _learned(name: str, texts: Texts, amount: Amount, detectors: Sequence[NoveltyDetector]) -> Domain:
    """A domain that has read its training text, and detectors that know what is ordinary for it."""
    rows = texts.train[name]
    domain = Domain(name, texts.vocab_size, rows.features.shape[1])

    def remember(some: ReadRows) -> None:
        readings = read_by([domain], some, texts.background)
        for detector in detectors:
            detector.remember(name, readings)

    first = min(_FIRST, len(rows) // 2)
    halves = [[i for i in range(first) if i // _STRETCH % 2 == half] for half in (0, 1)]
    domain.observe(rows.take(halves[0]))
    domain.refresh()
    remember(rows.take(halves[1]))
    domain.observe(rows.take(halves[1]))
    renewed = 0
    for start in range(first, len(rows), amount.batch):
        if domain.rows >= _REFRESH * renewed:
            domain.refresh()
            renewed = domain.rows
        batch = rows.take(range(start, min(start + amount.batch, len(rows))))
        remember(batch)
        domain.observe(batch)
    domain.seal()
    return domain


def noticed(detector: NoveltyDetector, old: Verdict, new: Verdict, amount: Amount) -> dict[str, Any]:
    """What a stream of old text that changes into new text is seen as.

    Args:
        old, new: test text of the latest domain, and of the next.

    Returns:
        `delays`: for each trial the batches of new text until the alarm, None if it never came; `false`:
        alarms before the change; `quiet`: batches of old text that were watched.
    """
    delays: list[int | None] = []
    false = quiet = 0
    for trial in range(amount.trials):
        watching = copy.deepcopy(detector)
        for rows in _turns(old, trial, amount):
            quiet += 1
            if watching.observe(rows).reason is not None:
                false += 1
                watching.reset()
        # An alarm that was false would shorten or lengthen what comes now.
        watching = copy.deepcopy(detector) if false else watching
        alarms = [watching.observe(rows).reason is not None for rows in _turns(new, trial, amount)]
        delays.append(alarms.index(True) + 1 if True in alarms else None)
    return {"delays": delays, "false": false, "quiet": quiet}


def _turns(verdict: Verdict, trial: int, amount: Amount) -> list[Verdict]:
    """Batches of a text, begun at another place for each trial."""
    count = len(verdict.novel) // amount.batch
    first = trial * count // amount.trials
    places = [(first + i) % count * amount.batch for i in range(count)]
    return [verdict.rows(slice(place, place + amount.batch)) for place in places]


def in_batches(scores: Tensor, rows: int) -> Tensor:
    """(N,) -> (N // rows,): the means of so many that follow each other."""
    count = len(scores) // rows
    return scores[: count * rows].view(count, rows).mean(1)


def auroc(known: Tensor, new: Tensor) -> float:
    """How often a score of new text is above one of known text; ties count half."""
    above = (new[:, None] > known).double() + (new[:, None] == known).double() / 2
    return float(above.mean())
