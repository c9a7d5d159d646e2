"""Who answers a text, told by each way that there is, and what it costs in loss.

All of them see the same first bytes. Where a way decides sequence by sequence, the loss behind these bytes
follows from who was chosen; so every expert reads every window once, and each way picks among what they said.
"""

# N windows, T their bytes, E experts, P bytes from which is decided

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from forgetting.streams import PREFIX
from torch import Tensor, nn

from cambia import rundir
from cambia.continual.methods.experts import Experts
from cambia.data.batches import TrainBatches
from cambia.data.streams import Stream
from cambia.experiment.build import open_stream
from cambia.experiment.reopen import reopen
from cambia.experiment.tree import experiment_from
from cambia.models import LoraExperts
from cambia.models.parts.deciding import by_arrow, decided
from cambia.models.routing.evidence import Evidence
from cambia.models.routing.prefixes import Prefixes, PrefixReader
from cambia.rundir import RunReader

Names = Sequence[str | None]
_ROWS = 64
"""Windows that are read at once."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What a run has learned."""

    experts: LoraExperts
    stream: Stream
    right: Mapping[str, str | None]
    """Domain -> the expert that was taught most of it; None: the base."""

    @classmethod
    def by(cls, run: RunReader) -> Learned:
        """Open what a finished run has kept."""
        tree = run.config()
        _, stream = open_stream(experiment_from(tree, source=str(run.folder), flags={}))
        method = reopen(run.folder / rundir.LATEST, tree).method
        assert isinstance(method, Experts)
        right = {name: method.right(name) for name in stream.names}
        return cls(method.experts, stream, right)

    def windows(self, split: str, count: int) -> dict[str, Tensor]:
        """By domain: windows (N, T) from all over a text, at most so many."""
        found = {}
        for name, task in zip(self.stream.names, self.stream.tasks, strict=True):
            length = self.stream.sequence_length
            batches = TrainBatches(task.file(split), batch_size=1, sequence_length=length, seed=0)
            found[name] = batches.next(min(count, batches.windows_per_epoch)).input_ids
        return found


# ---- the ways ------------------------------------------------------------------------------------


def _routing(name: str) -> Callable[[LoraExperts, Prefixes], Names]:
    """One of the package's own."""

    def names(experts: LoraExperts, prefixes: Prefixes) -> Names:
        experts.routing = name
        return decided(experts, prefixes).names

    return names


def by_grams(experts: LoraExperts, prefixes: Prefixes) -> Names:
    """The domain whose n-grams foretell a prefix best; nothing is ever strange."""
    read, known = Evidence(prefixes), list(experts.router.domains.values())
    scores = torch.stack([read.grams(domain.grams) for domain in known])
    return [known[i].answers for i in scores.argmax(0).tolist()]


def by_features(experts: LoraExperts, prefixes: Prefixes) -> Names:
    """The domain whose distribution of features a prefix lies in most likely."""
    read, known = Evidence(prefixes), list(experts.router.domains.values())
    scores = torch.stack([read.features(domain.gaussian) for domain in known])
    return [known[i].answers for i in scores.argmax(0).tolist()]


WAYS: dict[str, Callable[[LoraExperts, Prefixes], Names]] = {
    "compete": _routing("compete"),
    "first_claim": _routing("first_claim"),
    "likelihood": _routing("likelihood"),
    "n-grams": by_grams,
    "features": by_features,
    "hybrid": _routing("hybrid"),
}
LABELS = {
    "oracle": "right routes",
    "compete": "`compete`",
    "first_claim": "`first_claim`",
    "likelihood": "likelihood of the experts alone",
    "n-grams": "n-grams alone",
    "features": "features alone",
    "hybrid": "`hybrid`, a trained gate",
    "arrow": "Arrow of Cambia, the best one",
    "peft_arrow_1": "Arrow of PEFT, the best one",
    "peft_arrow_3": "Arrow of PEFT, the best three (its default)",
    "xlora": "X-LoRA of PEFT",
    "single": "the best single answerer",
    "base": "the base",
}
"""Row -> what it is called in the tables."""


# ---- what comes of them --------------------------------------------------------------------------


def suffix_losses(
    model: nn.Module,
    windows: Tensor,
    block: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Tensor:
    """(N, T) -> (N,): nats per byte of what follows the first P bytes of each window.

    Args:
        block: inside of it the right ones answer.
    """
    found = []
    with torch.no_grad(), block():
        for rows in windows.split(_ROWS):
            logits = model(input_ids=rows, use_cache=False).logits[:, PREFIX - 1 : -1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, PREFIX:].flatten(), reduction="none"
            )
            found.append(losses.view(len(rows), -1).double().mean(1))
    return torch.cat(found)


def answered(experts: LoraExperts, windows: Mapping[str, Tensor]) -> dict[str, dict[str | None, Tensor]]:
    """Domain -> who -> `suffix_losses` (N,), of the base (None) and each expert."""
    every: list[str | None] = [None, *experts.names]
    return {
        domain: {who: suffix_losses(experts.model, rows, lambda w=who: experts.using(w)) for who in every}
        for domain, rows in windows.items()
    }


def compared(learned: Learned, windows: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """Every way on every window.

    Args:
        lengths: bytes of the prefixes, P among them.

    Returns:
        `right`: way -> domain -> the share of windows answered by the right one, for each length;
        `losses`: row -> domain -> bits per byte behind the first P bytes; `single`: the same, by who answers
        everything; `asked`: way -> how often an expert read a prefix of P bytes, a window.
    """
    experts = learned.experts
    experts.model.eval()
    losses = answered(experts, windows)
    reader = PrefixReader(experts.model, experts.using, layer=experts.feature_layer)
    right: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    rows: dict[str, dict[str, float]] = {row: {} for row in ("oracle", "base", *WAYS)}
    for domain, ids in windows.items():
        own, said = learned.right[domain], losses[domain]
        rows["oracle"][domain], rows["base"][domain] = bits(said[own]), bits(said[None])
        for length in lengths:
            prefixes = reader.read(ids[:, :length])
            for way, decide in WAYS.items():
                names = decide(experts, prefixes)
                right[way].setdefault(domain, []).append(sum(n == own for n in names) / len(names))
                if length == PREFIX:
                    each = torch.stack([said[name][i] for i, name in enumerate(names)])
                    rows[way][domain] = bits(each)
    single = {str(who): {d: bits(losses[d][who]) for d in windows} for who in (None, *experts.names)}
    return {"right": right, "losses": rows, "single": single}


def by_tokens(experts: LoraExperts, windows: Mapping[str, Tensor]) -> dict[str, float]:
    """Bits per byte of each domain with our Arrow, which decides token by token and layer by layer."""
    with by_arrow(experts):
        return {domain: bits(suffix_losses(experts.model, rows)) for domain, rows in windows.items()}


def bits(losses: Tensor) -> float:
    """The mean of nats, in bits."""
    return float(losses.mean()) / math.log(2)
