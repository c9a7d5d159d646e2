"""Who decides what a batch trains, where nobody says what the text is.

`StreamAllocator` looks at every row that comes. One that a known domain accepts is left to the Part that
answers it, and is not trained on. One of the domain that is being learned trains its Part. One that is
strange to all of them goes into quarantine, and when the evidence is enough that something new has come, the
signal "novelty" says so: a growth rule adds a Part, and what lay in quarantine is the first that it reads.

    unknown ──▶ quarantine ──▶ seeding ──▶ consolidating ──▶ sealed
                    │              ▲  mature, or something else comes: a low rate, on rows kept until then
                    └── ordinary after all: back to the domain that is being learned

It decides and never trains; the loop asks it (`records.Allocator`).
"""

# N rows of a batch, T time, D features

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from cambia.continual.domains import Domain, ReadRows, read_by
from cambia.continual.novelty.detector import NoveltyDetector, Verdict
from cambia.data.batches import Batch
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.hybrid import Maturity
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.router import Router
from cambia.models.routing.strangeness import LEAST_ROWS
from cambia.records import Allocation, Signals

Phase = Literal["seeding", "consolidating"]


@dataclass(frozen=True)
class Course:
    """How a Part is taught."""

    warmup_steps: Annotated[int, Ge(0)] = 10
    """Steps in which its learning rate rises to the highest."""
    consolidation_steps: Annotated[int, Ge(0)] = 40
    """Steps at a falling rate at its end, on the rows that it has read last."""
    memory_rows: Annotated[int, Gt(0)] = 640
    """Rows of its text that are kept until it is sealed, the latest ones."""
    held_rows: Annotated[int, Ge(0)] = 16
    """Of its first rows so many are not trained on, to see what it has learned; at most a third."""
    calibration_rows: Annotated[int, Ge(0)] = 48
    """Later every eighth row waits too, up to so many; the oldest are learned from as newer ones come. They
    tell the router what is ordinary."""
    birth: Literal["zero", "nearest"] = "zero"
    """A new Part begins as nothing, or as a copy of the one that foretells its first rows best."""
    measure_steps: Annotated[int, Gt(0)] | None = 20
    """Steps between looks at its loss on the rows that are held back for good; null: it is never mature."""
    maturity: Maturity = field(default_factory=lambda: Maturity(window=8, slope=0.002))
    """When it has learned what it can and consolidates, though nothing else has come."""


class StreamAllocator:
    """What becomes of each row of a stream whose domains nobody names.

    Args:
        read: what the base makes of a batch's rows.
        background: the distribution of features of text in general.
        detector: says what is strange, and when that is certain enough.
        course: how a Part is taught.
        vocab_size: of the tokens.
        loss: nats per token that a Part gives rows.
        at_birth: called when a Part begins to be taught, with its name and the rows that called for it.
        at_end: called when a Part has been taught, with its name and the rows that were held back; answers
            with the Part that its domain is to be answered by, itself or another one, or None for the base.
        router: is told what is known of each domain, when its Part is sealed.
        prefixes: rows (N, T) for it to read.
        seed: of the rows that are read again.
    """

    def __init__(
        self,
        read: Callable[[Batch], ReadRows],
        background: FeatureGaussian,
        detector: NoveltyDetector,
        course: Course,
        *,
        vocab_size: int,
        loss: Callable[[str, ReadRows], float],
        at_birth: Callable[[str, ReadRows], None],
        at_end: Callable[[str, ReadRows], str | None],
        router: Router,
        prefixes: Callable[[Tensor], Prefixes],
        seed: int = 0,
    ):
        self.read, self.background, self.detector, self.course = read, background, detector, course
        self.vocab_size = vocab_size
        self.loss, self.at_birth, self.at_end = loss, at_birth, at_end
        self.router, self.prefixes = router, prefixes
        self.domains: dict[str, Domain] = {}
        self.open: str | None = None
        """The Part that is being taught."""
        self.phase: Phase = "seeding"
        self.steps = 0
        """Of the open Part, in its phase."""
        self.losses: list[float] = []
        """Of the open Part on rows that it never learns from, at every look."""
        self._next: str | None = None  # the Part that is waiting until the open one is sealed
        self._asked = False
        self._arrived = 0  # rows of the open Part's domain, since it was opened
        self._refresh_at = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        nothing = ReadRows.none(1, 1)
        self._quarantine, self._due, self._memory = nothing, nothing, nothing
        self._yardstick, self._waiting = nothing, nothing  # held back for good; for a while
        self._nearest: list[str | None] = []  # of each row in quarantine
        self._sources: list[str] = []
        self.taught: dict[str, dict[str, int]] = {}
        """For each Part, how many rows of which source it was taught. Nothing is decided by it: it tells
        afterwards which Part would have been the right one."""

    # ---- what the loop asks ------------------------------------------------------------------------

    def allocate(self, batch: Batch, signals: Signals) -> Allocation:
        """What of a batch trains, and what it says of novelty."""
        if not batch.fresh:
            return self._lesson_given(batch)
        if self._asked:
            self._turned_down()
        rows = self.read(batch)
        verdict = self.detector.judge(read_by(list(self.domains.values()), rows, self.background))
        decision = self.detector.observe(verdict)
        nearest = _least_strange(verdict)
        strange = verdict.novel.nonzero()[:, 0].tolist()
        mine = [i for i, name in enumerate(verdict.nearest) if name is not None and name == self.open]
        learned = mine
        if self.open is not None and mine:
            # First how strange they were, then what is in them: so it is seen what is ordinary for new rows.
            self.detector.remember(self.open, verdict.rows(torch.tensor(mine)))
            learned = self._hold(mine, rows)
            self._learn(rows.take(learned))
        self._quarantine = _joined(self._quarantine, rows.take(strange))
        self._nearest += [nearest[i] for i in strange]
        self._sources += [batch.source] * len(strange)
        if decision.reason is not None:
            self._asked = True
        elif decision.novel_windows == 0:
            self._release()
        measured = {
            "novelty": 1.0 if self._asked else min(decision.evidence, _UNCERTAIN),
            "novel_rows": len(strange) / max(1, len(rows)),
            "known_rows": (len(rows) - len(strange) - len(mine)) / max(1, len(rows)),
        }
        if not learned:
            return Allocation(train=False, measured=measured)
        assert self.open is not None
        self._count(self.open, [batch.source] * len(learned))
        rate, part = self._rate(), self.open
        return Allocation(rows=tuple(learned), parts=(part,), rate=rate, measured=measured | self._look())

    def _look(self) -> dict[str, float]:
        """Measure the open Part once in a while; a mature one consolidates."""
        every = self.course.measure_steps
        if every is None or self.open is None or not len(self._yardstick):
            return {}
        if self.phase != "seeding" or self.steps < every * (len(self.losses) + 1):
            return {}
        self.losses.append(self.loss(self.open, self._yardstick))
        if self.course.maturity.reached(self.losses):
            self.consolidate()
        return {"held_out_loss": self.losses[-1]}

    def lesson(self, batch_size: int) -> Batch | None:
        """What is to be read out of memory before the stream goes on; None: nothing."""
        self.settle()
        if self.open is None:
            return None
        if self.phase == "consolidating":
            chosen = torch.randperm(len(self._memory), generator=self._generator)[:batch_size]
            return self._memory.take(chosen.tolist()).batch(self.open)
        if len(self._due):
            return self._due.take(range(min(batch_size, len(self._due)))).batch(self.open)
        return None

    def _lesson_given(self, batch: Batch) -> Allocation:
        assert self.open is not None
        if self.phase == "seeding":
            count = len(batch.input_ids)
            self._remember(self._due.take(range(count)))
            self._due = self._due.take(range(count, len(self._due)))
        return Allocation(parts=(self.open,), rate=self._rate())

    def _rate(self) -> float:
        """The rate of the open Part's next step, as a share of the highest."""
        self.steps += 1
        if self.phase == "consolidating":
            return 1 - (self.steps - 0.5) / self.course.consolidation_steps
        return min(1.0, self.steps / (self.course.warmup_steps + 1))

    # ---- a Part's life -----------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """A new Part has come; it reads what lies in quarantine once the open one is sealed."""
        self._asked = False
        self._next = name
        if self.open is None:
            self._open(name)
        else:
            self.consolidate()

    def consolidate(self) -> None:
        """The open Part has learned enough, or something else has come."""
        if self.phase == "seeding":
            self.phase, self.steps = "consolidating", 0

    def settle(self) -> None:
        """Seal the open Part if it has had its last step."""
        while self.open is not None and self.phase == "consolidating" and self._is_over:
            self._seal()

    def finish(self) -> None:
        """The stream has ended: what is left is to consolidate the open Part."""
        if self.open is not None and not len(self._due):
            self.consolidate()

    @property
    def held_out(self) -> ReadRows:
        """Rows of the open Part's domain that it is not trained on."""
        return _joined(self._yardstick, self._waiting)

    @property
    def _is_over(self) -> bool:
        return self.steps >= self.course.consolidation_steps or not len(self._memory)

    def _open(self, name: str) -> None:
        rows = self._quarantine
        domain = Domain(name, self.vocab_size, rows.features.shape[1])
        self.domains[name] = domain
        self.open, self.phase, self.steps, self._next, self._arrived = name, "seeding", 0, None, 0
        self.losses = []
        self.at_birth(name, rows)
        kept = len(rows) - min(self.course.held_rows, len(rows) // 3)
        self._due, self._yardstick = rows.take(range(kept)), rows.take(range(kept, len(rows)))
        # One half says what is ordinary to the other. Rows that follow each other are alike, so by stretches.
        stretch = max(1, min(_STRETCH, len(rows) // 4))
        halves = [[i for i in range(len(rows)) if i // stretch % 2 == half] for half in (0, 1)]
        domain.observe(rows.take([i for i in halves[0] if i < kept]))
        domain.refresh()
        self.detector.remember(name, read_by([domain], rows.take(halves[1]), self.background))
        domain.observe(rows.take([i for i in halves[1] if i < kept]))
        self._refresh()
        self._memory = self._waiting = rows.take([])
        self._count(name, self._sources)
        self._forget_quarantine()

    def _count(self, name: str, sources: Sequence[str]) -> None:
        counts = self.taught.setdefault(name, {})
        for source in sources:
            counts[source] = counts.get(source, 0) + 1

    def right(self, source: str) -> str | None:
        """The Part that was taught most of a source; None: there is none."""
        counts = {name: taught.get(source, 0) for name, taught in self.taught.items()}
        best = max(counts, key=counts.__getitem__, default=None)
        return None if best is None or not counts[best] else self.domains[best].answers

    def _hold(self, mine: list[int], rows: ReadRows) -> list[int]:
        """Keep some of the open domain's rows back, and say which are left; what is too much is due now."""
        places = range(self._arrived, self._arrived + len(mine))
        self._arrived += len(mine)
        if not self.course.calibration_rows:
            return mine
        held = [i for i, place in zip(mine, places, strict=True) if place % _HELD == _HELD - 1]
        waiting = _joined(self._waiting, rows.take(held))
        over = len(waiting) - self.course.calibration_rows
        if over < len(rows) or self.open is None:  # not a step for a few rows
            over = 0
        else:
            self.domains[self.open].observe(waiting.take(range(over)))
            self._due = _joined(self._due, waiting.take(range(over)))
        self._waiting = waiting.take(range(over, len(waiting)))
        return [i for i in mine if i not in held]

    def _learn(self, rows: ReadRows) -> None:
        """Rows of the domain that is being learned."""
        assert self.open is not None
        self.domains[self.open].observe(rows)
        self._remember(rows)
        if self.domains[self.open].rows >= self._refresh_at:
            self._refresh()

    def _refresh(self) -> None:
        """The densities of the open domain are brought up to date, more and more seldom."""
        assert self.open is not None
        domain = self.domains[self.open]
        domain.refresh()
        self._refresh_at = _REFRESH * domain.rows

    def _remember(self, rows: ReadRows) -> None:
        memory = _joined(self._memory, rows)
        self._memory = memory.take(range(max(0, len(memory) - self.course.memory_rows), len(memory)))

    def _seal(self) -> None:
        assert self.open is not None
        self._refresh()
        domain = self.domains[self.open]
        if self.open in self.router.domains:
            self.router.forget(self.open)
        domain.answers = self.at_end(self.open, self.held_out)
        domain.seal()
        self._introduce(domain, sealed=True)
        self.open, self.steps = None, 0
        self._memory = self._due = self._yardstick = self._waiting = self._memory.take([])
        if self._next is not None:
            self._open(self._next)

    def introduce(self) -> None:
        """Let the router know the open Part as it is now."""
        if self.open is not None:
            self._introduce(self.domains[self.open], sealed=False)

    def _introduce(self, domain: Domain, *, sealed: bool) -> None:
        rows = self.held_out
        if sealed and len(rows) < LEAST_ROWS:  # too few came: better by rows that were learned from than not
            rows = _joined(self._memory, rows).take(range(-min(LEAST_ROWS, len(rows) + len(self._memory)), 0))
        if len(rows) >= LEAST_ROWS:
            known = domain.densities_so_far
            held = self.prefixes(rows.input_ids)
            self.router.add(domain.name, *known, held, answers=domain.answers, sealed=sealed)

    # ---- quarantine --------------------------------------------------------------------------------

    def _release(self) -> None:
        """It was nothing new: rows that the open domain is nearest to are read after all."""
        back = [i for i, name in enumerate(self._nearest) if name is not None and name == self.open]
        rows = self._quarantine.take(back)
        self._due = _joined(self._due, rows)
        if self.open is not None and len(rows):
            self.domains[self.open].observe(rows)
        self._forget_quarantine(reset=False)

    def _turned_down(self) -> None:
        """Nothing grew: the model may not become larger."""
        self._asked = False
        self._forget_quarantine()

    def _forget_quarantine(self, *, reset: bool = True) -> None:
        self._quarantine, self._nearest, self._sources = self._quarantine.take([]), [], []
        if reset:
            self.detector.reset()

    # ---- what must survive a restart ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "domains": [
                domain.state_dict(kept_elsewhere=name != self.open and name in self.router.domains)
                for name, domain in self.domains.items()
            ],
            "detector": self.detector.state_dict(),
            "generator": self._generator.get_state(),
            "plain": {name: getattr(self, name) for name in _PLAIN},
            "rows": {name: getattr(self, name).state_dict() for name in _ROWS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.domains = {}
        for saved in state["domains"]:
            self.domains[saved["name"]] = Domain.from_state(saved, self.vocab_size, self.router)
        self.detector.load_state_dict(state["detector"])
        self._generator.set_state(state["generator"])
        for name in _PLAIN:
            setattr(self, name, state["plain"][name])
        for name in _ROWS:
            setattr(self, name, ReadRows(**state["rows"][name]))


_PLAIN = (
    "open",
    "phase",
    "steps",
    "losses",
    "_next",
    "_asked",
    "_arrived",
    "_refresh_at",
    "_nearest",
    "_sources",
    "taught",
)
_ROWS = ("_quarantine", "_due", "_memory", "_yardstick", "_waiting")
_UNCERTAIN = 0.999
"""The novelty of what could still be chance: a rule acts at 1."""
_STRETCH = 8
"""Rows of the quarantine that are held back, or counted, together."""
_HELD = 8
"""One in so many rows of the open domain waits."""
_REFRESH = 1.25
"""Densities are worked out anew when so much more text has been seen."""


def _joined(rows: ReadRows, more: ReadRows) -> ReadRows:
    if not len(rows):
        return more
    return rows.and_then(more) if len(more) else rows


def _least_strange(verdict: Verdict) -> list[str | None]:
    """For each row the domain that it is least strange to, novel or not; None where none is known."""
    if not verdict.domains:
        return [None] * len(verdict.novel)
    return [verdict.domains[i] for i in verdict.strangeness.argmin(1).tolist()]
