"""Who decides what a batch trains, where nobody says what the text is.

`StreamAllocator` looks at every row that comes. One that a known domain accepts is left to the Part that
answers it, and is not trained on. One of the domain that is being learned trains its Part. One that is
strange to all of them goes into quarantine, and when the evidence is enough that something new has come, the
signal "novelty" says so: a growth rule adds a Part, and what lay in quarantine is the first that it reads.

    unknown ──▶ quarantine ──▶ seeding ──▶ consolidating ──▶ sealed ──▶ (reopened: a new version is seeded)
                    │              ▲  mature, or something else comes: a low rate, on rows kept until then
                    └── ordinary after all: back to the domain that is being learned

It decides and never trains; the loop asks it (`records.Allocator`).
"""

# N rows of a batch, T time, D features

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cambia.continual.course import Course, Phase
from cambia.continual.domains import Domain, ReadRows, read_by
from cambia.continual.kept_rows import Material, Quarantine, joined
from cambia.continual.monitoring import certainty, count_taught, shares_of, taught_most, use_of
from cambia.continual.novelty.detector import NoveltyDetector, Verdict
from cambia.continual.returns import Reopen, Returns
from cambia.data.batches import Batch
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.router import Router
from cambia.models.routing.strangeness import LEAST_ROWS
from cambia.records import Allocation, Signals, StreamEvent


@dataclass(frozen=True)
class Outcome:
    """What came of a Part that has been taught."""

    answers: str | None
    """Who answers its domain: itself, another Part that does so as well, or None, the base."""
    reason: str


class StreamAllocator:
    """What becomes of each row of a stream whose domains nobody names.

    Args:
        read: what the base makes of a batch's rows.
        background: the distribution of features of text in general.
        detector: says what is strange, and when that is certain enough.
        course: how a Part is taught.
        vocab_size: of the tokens.
        losses: (N,) nats per token that a Part gives rows.
        at_birth: called when a Part begins to be taught, with its name, the rows that called for it, and the
            Part of which it is a new version, or None.
        at_end: called when a Part has been taught, with its name and the rows that were held back.
        router: is told what is known of each domain, when its Part is sealed.
        prefixes: rows (N, T) for it to read.
        reopen: when text of a sealed Part gives a new version of it; the old one stays as it is.
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
        losses: Callable[[str, ReadRows], Tensor],
        at_birth: Callable[[str, ReadRows, str | None], None],
        at_end: Callable[[str, ReadRows], Outcome],
        router: Router,
        prefixes: Callable[[Tensor], Prefixes],
        reopen: Reopen = "never",
        seed: int = 0,
    ):
        self.read, self.background, self.detector, self.course = read, background, detector, course
        self.vocab_size = vocab_size
        self.losses_of, self.at_birth, self.at_end = losses, at_birth, at_end
        self.router, self.prefixes = router, prefixes
        self.domains: dict[str, Domain] = {}
        self.open: str | None = None
        """The Part that is being taught."""
        self.phase: Phase = "seeding"
        self.steps = 0
        """Of the open Part, in its phase."""
        self.losses: list[float] = []
        """Of the open Part on rows that it never learns from, at every look."""
        self.quarantine, self.material = Quarantine(), Material()
        self.returns = Returns(reopen, detector.min_windows)
        self.taught: dict[str, dict[str, int]] = {}
        """For each Part, how many rows of which source it was taught. Nothing is decided by it: it tells
        afterwards which Part would have been the right one."""
        self._next: str | None = None  # the Part that is waiting until the open one is sealed
        self._version_of: str | None = None  # the Part that the open one is a new version of
        self._asked = False
        self._asked_for: str | None = None  # the Part of which a new version is asked for
        self._refresh_at = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._events: list[StreamEvent] = []
        self._introduced: tuple[Any, ...] | None = None  # as what the router knows the open Part

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
        strange = verdict.novel.nonzero()[:, 0].tolist()
        owners = [None if name is None else self._owner(name) for name in verdict.nearest]
        mine = [i for i, owner in enumerate(owners) if owner is not None and owner == self.open]
        learned = self._learn(mine, rows, verdict)
        nearest = verdict.least_strange
        self.quarantine.add(rows.take(strange), [nearest[i] for i in strange], batch.source)
        if decision.reason is not None:
            self._asked = True
            self._tell("novel", None, decision.reason)
        elif decision.novel_windows == 0:
            self._release()
        self._watch_returns(owners, rows, batch.source)
        use = use_of(owners, self.parts)
        measured = {
            "novelty": 1.0 if self._asked else min(decision.evidence, _UNCERTAIN),
            "novel_rows": len(strange) / max(1, len(rows)),
            "known_rows": (len(rows) - len(strange) - len(mine)) / max(1, len(rows)),
            **shares_of(use, len(rows)),
            **certainty(verdict, [self._owner(domain) for domain in verdict.domains]),
        }
        if not learned:
            return Allocation(train=False, measured=measured, use=use)
        assert self.open is not None
        count_taught(self.taught, self.open, [batch.source] * len(learned))
        rate, part = self._rate(), self.open
        return Allocation(
            rows=tuple(learned), parts=(part,), rate=rate, measured=measured | self._look(), use=use
        )

    def _owner(self, domain: str) -> str | None:
        """The Part that rows of a known domain are left to; None: the base."""
        answers = self.domains[domain].answers
        is_continued = self.open is not None and answers is not None and answers == self._version_of
        return self.open if is_continued else answers

    @property
    def parts(self) -> list[str]:
        """The Parts that answer a known domain, the one that is being taught and the one that waits."""
        answering = [domain.answers for domain in self.domains.values()]
        return list(dict.fromkeys(part for part in (*answering, self._next) if part is not None))

    def told(self) -> list[StreamEvent]:
        """What was decided since this was asked last."""
        events, self._events = self._events, []
        return events

    def _tell(self, what: str, part: str | None, reason: str) -> None:
        self._events.append(StreamEvent(what, part, reason))

    def _look(self) -> dict[str, float]:
        """Measure the open Part once in a while; a mature one consolidates."""
        every, yardstick = self.course.measure_steps, self.material.yardstick
        if every is None or self.open is None or not len(yardstick):
            return {}
        if self.phase != "seeding" or self.steps < every * (len(self.losses) + 1):
            return {}
        self.losses.append(float(self.losses_of(self.open, yardstick).mean()))
        progress = self.course.maturity.progress(self.losses)
        if self.course.maturity.reached(self.losses):
            self.consolidate("mature: its loss on held-out rows no longer falls")
        return {"held_out_loss": self.losses[-1], "maturity": progress}

    def lesson(self, batch_size: int) -> Batch | None:
        """What is to be read out of memory before the stream goes on; None: nothing."""
        self.settle()
        if self.open is None:
            return None
        if self.phase == "consolidating":
            memory = self.material.memory
            chosen = torch.randperm(len(memory), generator=self._generator)[:batch_size]
            return memory.take(chosen.tolist()).batch(self.open)
        due = self.material.first_due(batch_size)
        return due.batch(self.open) if len(due) == batch_size else None

    def _lesson_given(self, batch: Batch) -> Allocation:
        assert self.open is not None
        if self.phase == "seeding":
            self._read_due(len(batch.input_ids))
        return Allocation(parts=(self.open,), rate=self._rate())

    def _read_due(self, rows: int) -> None:
        self.material.read_due(rows, self.course.memory_rows, self._generator)

    def _rate(self) -> float:
        """The rate of the open Part's next step, as a share of the highest."""
        self.steps += 1
        return self.course.rate(self.phase, self.steps)

    # ---- a Part's life -----------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """A new Part has come; it reads what lies in quarantine once the open one is sealed."""
        if name != self._next:
            waiting = f"{len(self.quarantine.rows)} strange rows wait for it"
            self._tell("grew", name, f"a new version of {self._asked_for}" if self._asked_for else waiting)
        self._asked = False
        self._next = name
        if self.open is None:
            self._open(name)
        else:
            self.consolidate("something else has come")

    def consolidate(self, reason: str) -> None:
        """The open Part has learned enough, or something else has come; what is still due is read now."""
        if self.open is not None and self.phase == "seeding":
            self._read_due(len(self.material.due))
            self.phase, self.steps = "consolidating", 0
            self._tell("consolidating", self.open, reason)

    def settle(self) -> None:
        """Seal the open Part if it has had its last step."""
        while self.open is not None and self.phase == "consolidating" and self._is_over:
            self._seal()

    def finish(self, batch_size: int) -> None:
        """The text has ended: what is left is to consolidate the open Part, once no whole batch is due."""
        if len(self.material.due) < batch_size:
            self.consolidate("the text has ended")

    def begin_text(self) -> None:
        """Another text begins, as was told: what was strange and not yet certain went with the last one."""
        if not self._asked:
            self._release()
            self.detector.reset(cooldown=False)

    @property
    def _is_over(self) -> bool:
        return self.steps >= self.course.consolidation_steps or not len(self.material.memory)

    def _open(self, name: str) -> None:
        self._version_of, self._asked_for = self._asked_for, None
        if self._version_of is None:
            rows, sources = self.quarantine.rows, self.quarantine.sources
            self._forget_quarantine()
        else:
            returned = self.returns.take(self._version_of)
            rows, sources = returned.rows, returned.sources
        domain = Domain(name, self.vocab_size, rows.features.shape[1])
        self.domains[name] = domain
        self.open, self.phase, self.steps, self._next = name, "seeding", 0, None
        self.losses = []
        self.at_birth(name, rows, self._version_of)
        held = min(self.course.held_rows, len(rows) // 3)
        kept = len(rows) - held
        self.material.begin(rows, held)
        # One half says what is ordinary to the other. Rows that follow each other are alike, so by stretches.
        stretch = max(1, min(_STRETCH, len(rows) // 4))
        halves = [[i for i in range(len(rows)) if i // stretch % 2 == half] for half in (0, 1)]
        domain.observe(rows.take([i for i in halves[0] if i < kept]))
        domain.refresh()
        self.detector.remember(name, read_by([domain], rows.take(halves[1]), self.background))
        domain.observe(rows.take([i for i in halves[1] if i < kept]))
        self._refresh()
        count_taught(self.taught, name, sources)

    def right(self, source: str) -> str | None:
        """The Part that was taught most of a source; None: there is none."""
        best = taught_most(self.taught, source)
        return None if best is None else self.domains[best].answers

    def _learn(self, mine: list[int], rows: ReadRows, verdict: Verdict) -> list[int]:
        """Rows of the domain that is being learned: those of them that train its Part now."""
        if self.open is None or not mine:
            return mine
        # First how strange they were, then what is in them: so it is seen what is ordinary for new rows.
        self.detector.remember(self.open, verdict.rows(torch.tensor(mine)))
        domain = self.domains[self.open]
        most = self.course.calibration_rows
        left, freed = self.material.hold(rows.take(mine), most, at_once=len(rows))
        domain.observe(freed)
        learned = [mine[i] for i in left]
        domain.observe(rows.take(learned))
        if domain.rows >= self._refresh_at:
            self._refresh()
        if len(learned) < _LEAST_SHARE * len(rows):
            self.material.due = joined(self.material.due, rows.take(learned))
            return []
        self.material.remember(rows.take(learned), self.course.memory_rows, self._generator)
        return learned

    def _refresh(self) -> None:
        assert self.open is not None
        domain = self.domains[self.open]
        domain.refresh()
        self._refresh_at = _REFRESH * domain.rows

    def _seal(self) -> None:
        assert self.open is not None
        self._refresh()
        domain = self.domains[self.open]
        if self.open in self.router.domains:
            self.router.forget(self.open)
        outcome = self.at_end(self.open, self.material.held_out)
        domain.answers = outcome.answers
        self._tell("sealed" if outcome.answers == self.open else "dropped", self.open, outcome.reason)
        self._succeeded(self.open, outcome)
        domain.seal()
        self.detector.complete(self.open)
        self._introduce(domain, sealed=True)
        self.open, self.steps = None, 0
        self.material.end()
        if self._next is not None:
            self._open(self._next)

    def _succeeded(self, name: str, outcome: Outcome) -> None:
        """A Part is kept or not. A new version that is kept answers whatever the old one answered."""
        old, self._version_of = self._version_of, None
        if outcome.answers != name:
            if old is not None:
                self.returns.failed_once_more(old)
            return
        if len(self.material.held_out):  # whatever the setting is: a run that goes on may have another
            self.returns.sealed(name, self.losses_of(name, self.material.held_out))
        if old is not None:
            for domain in self.domains.values():
                if domain.answers == old:
                    domain.answers = name
            self.router.succeed(old, name)

    def introduce(self) -> None:
        """Let the router know the open Part as it is now; nothing where it knows it so already."""
        if self.open is None:
            return
        domain, arrived = self.domains[self.open], self.material.arrived
        now = (self.open, self.phase, self.steps, arrived, domain.rows, self._refresh_at)
        if now != self._introduced or self.open not in self.router.domains:
            self._introduce(domain, sealed=False)
            self._introduced = now

    def _introduce(self, domain: Domain, *, sealed: bool) -> None:
        rows, memory = self.material.held_out, self.material.memory
        if sealed and len(rows) < LEAST_ROWS:  # too few came: better by rows that were learned from than not
            rows = joined(memory, rows).take(range(-min(LEAST_ROWS, len(rows) + len(memory)), 0))
        if len(rows) >= LEAST_ROWS:
            known = domain.densities_so_far
            held = self.prefixes(rows.input_ids)
            # A new version answers once it is sealed, and until then the old one.
            answers = domain.answers if self._version_of is None else self._version_of
            self.router.add(domain.name, *known, held, answers=answers, sealed=sealed)

    # ---- quarantine --------------------------------------------------------------------------------

    def _release(self) -> None:
        """It was nothing new: rows that the open domain is nearest to are read after all."""
        rows = self.quarantine.of(self.open)
        if len(self.quarantine.rows):
            of = f"{len(rows)} of {len(self.quarantine.rows)} strange rows are {self.open}'s after all"
            self._tell("released", self.open, of if len(rows) else "nothing to learn: no more came")
        self.material.due = joined(self.material.due, rows)
        if self.open is not None and len(rows):
            domain = self.domains[self.open]
            # What is ordinary has a tail, without which the next row would be strange sooner.
            self.detector.remember(self.open, read_by([domain], rows, self.background))
            domain.observe(rows)
        self._forget_quarantine(reset=False)

    def _turned_down(self) -> None:
        """Nothing grew: the model may not become larger."""
        self._asked = False
        old, self._asked_for = self._asked_for, None
        if old is not None:
            self._tell("turned down", old, "no new version of it has come")
            self.returns.failed_once_more(old)
            return
        self._tell("turned down", None, f"nothing grew for {len(self.quarantine.rows)} strange rows")
        self._forget_quarantine()

    def _forget_quarantine(self, *, reset: bool = True) -> None:
        self.quarantine.clear()
        if reset:
            self.detector.reset()

    # ---- text that comes again ---------------------------------------------------------------------

    def _watch_returns(self, owners: Sequence[str | None], rows: ReadRows, source: str) -> None:
        """Rows that sealed Parts answer; where they are reason enough, a new version is asked for."""
        for part in dict.fromkeys(owners):
            if part is not None and part != self.open:
                its_own = [i for i, owner in enumerate(owners) if owner == part]
                self.returns.add(part, rows.take(its_own), source)
        if self._asked or (self.open is not None and self.open in owners):  # that one comes first
            return
        self._asked_for = self.returns.asks(self.losses_of)
        if self._asked_for is not None:
            self._asked = True
            rows_of = f"{self.returns.enough(self._asked_for)} rows of its text have come"
            self._tell("reopened", self._asked_for, rows_of)

    # ---- what must survive a restart ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "domains": [
                domain.state_dict(kept_elsewhere=name != self.open and name in self.router.domains)
                for name, domain in self.domains.items()
            ],
            "detector": self.detector.state_dict(),
            "generator": self._generator.get_state(),
            "quarantine": self.quarantine.state_dict(),
            "material": self.material.state_dict(),
            "returns": self.returns.state_dict(),
            "events": [asdict(event) for event in self._events],
            "plain": {name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.domains = {}
        for saved in state["domains"]:
            self.domains[saved["name"]] = Domain.from_state(saved, self.vocab_size, self.router)
        self.detector.load_state_dict(state["detector"])
        self._generator.set_state(state["generator"])
        self.quarantine.load_state_dict(state["quarantine"])
        self.material.load_state_dict(state["material"])
        self.returns.load_state_dict(state["returns"])
        self._events = [StreamEvent(**event) for event in state["events"]]
        for name in _PLAIN:
            setattr(self, name, state["plain"][name])
        self._introduced = None


_PLAIN = ("open", "phase", "steps", "losses", "taught")
_PLAIN += ("_next", "_version_of", "_asked", "_asked_for", "_refresh_at")
_UNCERTAIN = 0.999
"""The novelty of what could still be chance: a rule acts at 1."""
_LEAST_SHARE = 0.5
"""Of a batch's rows that make a step of their own; on fewer it would be mostly noise, and they wait."""
_STRETCH = 8
"""Rows of the quarantine that are held back, or counted, together."""
_REFRESH = 1.25
"""Densities are worked out anew when so much more text has been seen."""
