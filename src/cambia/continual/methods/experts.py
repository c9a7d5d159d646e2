"""One LoRA expert for each domain of a stream, found without being told where one ends and another begins.

The model itself is frozen. An allocator says of every row whether it is known, of the domain that is being
learned, or new (`cambia.continual.allocators`); a growth rule adds an expert where something new has come
(``when: novelty, then: add_lora_expert``); and a router says who answers (`cambia.models.routing`).
"""

# N rows, T time, D features

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.continual.allocators import Outcome, StreamAllocator
from cambia.continual.course import Course
from cambia.continual.domains import ReadRows
from cambia.continual.methods.method import AnyStream, Contract, Method, Parameters, Situation
from cambia.continual.monitoring import MEASURES
from cambia.continual.novelty.detector import NoveltyDetector
from cambia.continual.returns import Reopen
from cambia.data.batches import Batch
from cambia.errors import ConfigError
from cambia.generation import written_rows
from cambia.models.bodies import count_parameters
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.parts.lora_experts import LoraExperts
from cambia.models.parts.lora_shape import LoraShape, new_deltas
from cambia.models.parts.optimizing import let_go, take_up
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.prefixes import PrefixReader
from cambia.records import Allocator, StreamEvent

EXPERTS_FOLDER = "experts"
"""In a checkpoint: ``LoraExperts.from_pretrained("RUN/latest/experts", cambia.load("RUN"))``."""


@dataclass
class Experts(Method):
    """A LoRA expert for each domain that the stream turns out to have."""

    CONTRACT: ClassVar[Contract] = Contract(
        chooses_rows=True, rewrites_weights=True, needs_growth=True, routes=True
    )

    shape: LoraShape = field(default_factory=LoraShape)
    """What an expert adds to, and how much."""
    detector: NoveltyDetector = field(default_factory=NoveltyDetector)
    """Says what is new, and when that is certain enough."""
    course: Course = field(default_factory=Course)
    """How an expert is taught."""
    keep_margin: Annotated[float, Ge(0)] = 0.01
    """An expert stays only if it gives held-out rows of its domain so many nats per token less than the best
    of the others does."""
    routing: Literal["compete", "first_claim", "likelihood"] = "compete"
    """Who answers a text: of the experts to which its beginning is not strange the likeliest, or the oldest
    (what that answers once, it answers for good); or whoever foretells the beginning best."""
    prefix_tokens: Annotated[int, Ge(2)] = 64
    """First tokens of a text from which is decided who answers it; until then the base answers."""
    reopen: Reopen = "never"
    """When text of a sealed expert gives a new version of it, which begins as a copy and answers in its place
    once it is sealed; the old one stays as it is, bit by bit. `never`: such text trains nobody. `drifted`:
    once the expert foretells it clearly worse than rows that were held back from it in its own time.
    `always`: whenever `detector.min_windows` rows of it have come. Not with `routing: first_claim`."""
    collaborators: Annotated[int, Ge(0)] = 0
    """Sealed experts beside which a young one learns: those that foretell its first rows best, if better than
    the model alone. Their share falls from 1 to 0 as it matures, and it consolidates and answers alone."""
    feature_layer: int = -1
    """The hidden layer of the base whose outputs are the features: 0 are the embeddings."""
    background_rows: Annotated[int, Gt(1)] = 128
    """Rows of the base's own writing that stand for text in general."""

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        if self.reopen != "never" and self.routing == "first_claim":
            raise ConfigError(
                "routing first_claim promises that an expert answers for good what it once accepted, and "
                f"reopen {self.reopen} lets a new version answer in its place: leave one of them out"
            )

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        self.experts = LoraExperts(model, self.shape)
        self.experts.routing = self.routing
        self.experts.prefix_tokens, self.experts.feature_layer = self.prefix_tokens, self.feature_layer
        return self.experts

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        model = situation.model
        self.experts.seed = situation.seed
        self._beside: list[str] = []  # who takes part while the open one is young
        self.reader = PrefixReader(model, self.experts.using, layer=self.feature_layer)
        self._allocator = StreamAllocator(
            self.read,
            self._background(),
            self.detector,
            self.course,
            vocab_size=model.config.vocab_size,
            losses=self._losses,
            at_birth=self._born,
            at_end=self._ended,
            router=self.experts.router,
            prefixes=self.reader.read,
            reopen=self.reopen,
            seed=situation.seed,
        )

    # ---- what the loop calls -----------------------------------------------------------------------

    def allocator(self) -> Allocator | None:
        return self._allocator

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES

    def told(self) -> list[StreamEvent]:
        return self._allocator.told()

    def batch(self, stream: AnyStream, stage: int, at: float) -> Batch:
        self.meet_newcomer()
        if at >= 1:
            self._allocator.finish(stream.batch_size)
        lesson = self._allocator.lesson(stream.batch_size)
        if lesson is not None:
            return lesson
        # Named after its stage, so that it can be told afterwards who was taught what.
        return replace(super().batch(stream, stage, at), source=stream.stages[stage].name)

    def begin_stage(self, stage: int) -> None:
        if stage:
            self._allocator.begin_text()

    @property
    def owes(self) -> bool:
        self.meet_newcomer()
        self._allocator.settle()
        return self._allocator.open is not None

    @contextmanager
    def teaching(self, parts: tuple[str, ...]) -> Generator[None]:
        (name,) = parts
        with self.experts.teaching(name, beside=self._beside, share=self._youth):
            yield

    @property
    def _youth(self) -> float:
        """How far the open expert is from mature: 1 at its birth, 0 from consolidation on."""
        allocator = self._allocator
        return 1 - self.course.maturity.progress(allocator.losses) if allocator.phase == "seeding" else 0.0

    def meet_newcomer(self) -> None:
        """A growth rule may have added an expert since the last batch."""
        new = [name for name in self.experts.names if name not in self._allocator.domains]
        if new:
            self._allocator.begin(new[-1])

    # ---- what the allocator asks -------------------------------------------------------------------

    def read(self, batch: Batch) -> ReadRows:
        """What the base makes of a batch's rows; every row costs a forward pass."""
        ids = batch.input_ids
        self.extra_tokens += ids.numel() / 3
        prefixes = self.reader.read_at_once(ids)
        return ReadRows(
            ids, batch.targets, prefixes.losses(None), prefixes.features(), float(batch.num_bytes)
        )

    def _background(self) -> FeatureGaussian:
        """The distribution of features of text in general: of what the base writes by itself."""
        model, stream = self.situation.model, self.situation.stream
        generator = torch.Generator().manual_seed(self.situation.seed)
        first = model.config.bos_token_id or 0
        length = min(_BACKGROUND_TOKENS, stream.sequence_length)
        with self.experts.using(None):
            rows = written_rows(model, self.background_rows, length, first=first, generator=generator)
        features = self.reader.read(rows).features()
        background = FeatureGaussian(features.shape[1])
        background.observe(features)
        background.seal()
        return background

    def _born(self, name: str, rows: ReadRows, version_of: str | None) -> None:
        """An expert begins to be taught: as nothing, as the one of which it is a new version, or as the one
        that foretells its first rows best."""
        self._beside = []
        if version_of is not None:
            self.experts[name].become(self.experts[version_of])
            return
        if not self.collaborators and self.course.birth == "zero":
            return
        losses = self._losses_of_others(rows)
        nearest = sorted(losses, key=losses.__getitem__)
        # Those before the model alone, which is None, do better than it.
        self._beside = [other for other in nearest[: nearest.index(None)] if other][: self.collaborators]
        if self.course.birth == "nearest" and nearest[0] is not None:
            self.experts[name].become(self.experts[nearest[0]])

    def _ended(self, name: str, held: ReadRows) -> Outcome:
        """An expert has been taught: it stays if it is worth it, and never changes again."""
        part = self.experts[name]
        losses = self._losses_of_others(held)
        best = min(losses, key=lambda other: losses[other])
        mine = self._loss(name, held)
        let_go(self.situation.optimizer, part)
        said = (
            f"{mine:.3f} nats per token on {len(held)} held-out rows, {best or 'the model alone'} "
            f"{losses[best]:.3f}"
        )
        if len(held) and mine > losses[best] - self.keep_margin:
            self.experts.drop(name)
            return Outcome(best, said)
        self.experts.seal(name)
        return Outcome(name, said)

    def _losses(self, name: str | None, rows: ReadRows) -> Tensor:
        """(N,) nats per token that an expert, or the base, gives rows."""
        return self.reader.read(rows.input_ids).losses(name)

    def _loss(self, name: str | None, rows: ReadRows) -> float:
        return float(self._losses(name, rows).mean()) if len(rows) else 0.0

    def _losses_of_others(self, rows: ReadRows) -> dict[str | None, float]:
        """Nats per token that the model alone (None) and each sealed expert give rows."""
        return {other: self._loss(other, rows) for other in (None, *self.experts.sealed)}

    # ---- who answers -------------------------------------------------------------------------------

    def answerer(self, model: PreTrainedModel) -> Any:
        self._allocator.introduce()
        return self.experts

    @contextmanager
    def answering(self, task: int) -> Generator[None]:
        with self.experts.answered_by(self.right(self.situation.stream.names[task])):
            yield

    @contextmanager
    def answered_by(self, part: str | None) -> Generator[None]:
        with self.experts.answered_by(part):
            yield

    def routes(self, input_ids: Tensor) -> list[str | None]:
        self._allocator.introduce()
        return self.experts.route(input_ids)

    def answerers_for_good(self, task: int) -> list[str | None]:
        right = self.right(self.situation.stream.names[task])
        return [right] if right is None or right in self.experts.sealed else []

    def right(self, source: str) -> str | None:
        """The expert that was taught most of a source; None: the base."""
        return self._allocator.right(source)

    def taught(self) -> Mapping[str, Mapping[str, int]]:
        """For each expert, how many rows of which source it was taught."""
        found: dict[str, dict[str, int]] = {}
        for name, rows in self._allocator.taught.items():
            is_there = name in self.experts  # else who answers in its place, so that no text is left out
            answers = name if is_there else self._allocator.domains[name].answers
            if answers is not None:
                counts = found.setdefault(answers, {})
                for source, count in rows.items():
                    counts[source] = counts.get(source, 0) + count
        return found

    # ---- what it costs and keeps -------------------------------------------------------------------

    @property
    def cost(self) -> float:
        model = count_parameters(self.situation.model)
        added = max((self.experts[name].num_parameters for name in self.experts.names), default=0)
        return 2 / 3 + added / model

    def parameters(self) -> Parameters:
        sizes = [self.experts[name].num_parameters for name in self.experts.names]
        model = count_parameters(self.situation.model)
        return Parameters(max(sizes, default=0), model + sum(sizes), model + max(sizes, default=0))

    def promised(self) -> Mapping[str, Tensor]:
        base = {f"base: {name}": p.detach() for name, p in self.situation.model.named_parameters()}
        parts = {
            f"{name}: {key}": parameter.detach()
            for name in self.experts.sealed
            for key, parameter in self.experts[name].named_parameters()
        }
        return {**base, **parts}

    def write_beside(self, folder: Path) -> None:
        if self.experts.names:
            self._allocator.introduce()
            self.experts.save_pretrained(folder / EXPERTS_FOLDER)

    def state_dict(self) -> dict[str, Any]:
        return {
            "born": self.experts.born,
            "beside": list(self._beside),
            "experts": [
                {
                    "name": name,
                    "state": self.experts[name].state,
                    "parents": list(self.experts[name].parents),
                    "rank": self.experts[name].rank,
                    "tensors": {key: p.detach() for key, p in self.experts[name].named_parameters()},
                }
                for name in self.experts.names
            ],
            # What strangeness is measured in: a run that goes on with another seed must not measure anew.
            "background": self._allocator.background.state_dict(),
            "row_tokens": self.situation.stream.sequence_length,
            # The open one is measured anew when it is asked for.
            "router": self.experts.router.state_dict(sealed_only=True),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        model, optimizer = self.situation.model, self.situation.optimizer
        for saved in state["experts"]:
            shape = replace(self.shape, rank=saved["rank"] or self.shape.rank)
            part = LoraExpert(saved["name"], new_deltas(model, shape), tuple(saved["parents"]))
            with torch.no_grad():
                for key, parameter in part.named_parameters():
                    parameter.copy_(saved["tensors"][key])
            part.state = saved["state"]
            if part.state == "sealed":
                part.seal()
            else:
                take_up(optimizer, part)
            self.experts.hang(part)
        self.experts.router.load_state_dict(state["router"])
        self.experts.born, self._beside = state["born"], list(state["beside"])
        self._allocator.background.load_state_dict(state["background"])


_BACKGROUND_TOKENS = 64
