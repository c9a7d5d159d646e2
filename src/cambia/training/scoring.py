"""How a model is scored while it trains: the current task's validation loss, and rows of the task matrix."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from cambia.config import resolve_function
from cambia.continual.methods import Method
from cambia.continual.methods.method import AnyStream
from cambia.data.batches import Batch
from cambia.data.streams import Stream
from cambia.evaluation import Route
from cambia.probes import Likelihood, bits_per_byte, slice_losses
from cambia.training.averaging import WeightAverage
from cambia.training.settings import EvaluationConfig


class Scorer:
    """Scores a model as it would be used: in the precision of training, with averaged weights where there
    are any, and as the method has it answer.

    Args:
        model: is not changed.
        config: how much text, and what else is measured.
        autocast: the precision of training.
        average: of the model's weights, or None.
        method: whose model it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: EvaluationConfig,
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        average: WeightAverage | None,
        method: Method,
    ):
        self.model, self.config, self.method = model, config, method
        self.autocast, self.average = autocast, average
        self.tokens, self.seconds = 0, 0.0
        self.read = 0
        """Tokens that models were given for validation, slices and probes."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """Who says which task a text is of: the model itself, an oracle that knows, or each in turn."""
        if self.method.contract.routes:
            return ("own", "oracle")
        return ("oracle",) if self.method.contract.needs_identity else ("own",)

    def task(self, stream: AnyStream, task: int, split: str, route: Route) -> Likelihood | None:
        """Likelihood of one task's text as the model answers it; None where it has no such split."""
        # Where only answers are trained on, they can be right or wrong.
        exact = isinstance(stream, Stream) and stream.tasks[task].corpus.splits[split].mask is not None
        with self.method.answering(task) if route == "oracle" else nullcontext():
            return self._likelihood(self.texts(stream, task, split), exact=exact)

    def row(self, stream: AnyStream, split: str, route: Route | None = None) -> dict[str, Likelihood]:
        """A row of the task matrix: every task's likelihood, by name.

        Args:
            route: who says which task a text is of; by default the first of `routes`.
        """
        route = route or self.routes[0]
        found = {name: self.task(stream, j, split, route) for j, name in enumerate(stream.names)}
        return {name: score for name, score in found.items() if score is not None}

    def validation(self, stream: AnyStream, stage: int) -> tuple[Likelihood | None, dict[str, float]]:
        """Of the tasks that a stage trains, with the model as it is now; and what else is measured.

        Where the learner may not see where tasks end, it is of all tasks: a jump would show it.
        """
        weights = stream.stages[stage].weights
        now = [j for j, weight in enumerate(weights) if weight > 0 or not stream.boundaries]
        likelihood = self._likelihood(self._read(stream, now))
        if likelihood is None:
            return None, {}
        values = {
            "validation_loss": likelihood.nats_per_token,
            "validation_bits_per_byte": likelihood.bits_per_byte,
        }
        with self._as_used():
            if self.config.slices:
                # Of all tasks so far, so that one of them can be a slice.
                met = [
                    j
                    for j in range(len(stream.names))
                    if any(s.weights[j] for s in stream.stages[: stage + 1])
                ]
                values |= slice_losses(self.asked, self._read(stream, met), self.config.slices)
            for name, function in self.config.probes.items():
                probe = resolve_function(function, (), "function")
                values[name] = float(probe(self.model, self._read(stream, now)))
        return likelihood, values

    def texts(self, stream: AnyStream, task: int, split: str) -> Iterable[Batch]:
        """What a task is scored on."""
        config = self.config
        return stream.evaluation(task, split, config.max_bytes, config.batch_size, config.context_tokens)

    @property
    def asked(self) -> Any:
        """Who is asked: the model, or what its method has answer in its place."""
        return self.method.answerer(self.model)

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds for each token that was scored so far."""
        return 1000 * self.seconds / self.tokens if self.tokens else None

    def _read(self, stream: AnyStream, tasks: Iterable[int]) -> Iterable[Batch]:
        """The validation texts of some tasks, counted as they are taken."""
        for batch in itertools.chain.from_iterable(self.texts(stream, j, "valid") for j in tasks):
            self.read += batch.input_ids.numel()
            yield batch

    def _likelihood(self, texts: Iterable[Batch], *, exact: bool = False) -> Likelihood | None:
        began = time.perf_counter()
        with self._as_used():
            found = bits_per_byte(self.asked, texts, exact=exact)
        self.seconds += time.perf_counter() - began
        self.tokens += found.tokens
        return found if found.tokens else None

    @contextmanager
    def _as_used(self) -> Generator[None]:
        with self.autocast(), self.average.applied() if self.average is not None else nullcontext():
            yield
