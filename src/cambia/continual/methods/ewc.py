"""Elastic weight consolidation: weights that mattered are held by springs."""

# N predicted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from cambia.continual.methods.method import AnyStream, Backward, Contract, Method, Situation
from cambia.data.batches import IGNORED, Batch
from cambia.nn.modes import evaluating

_ROWS = 4
"""Rows at once when Fisher information is estimated: more squares to average, and less memory."""


@dataclass
class EWC(Method):
    """Online elastic weight consolidation: ``strength / 2  sum F (w - w*)^2`` is added to the loss.

    F is the diagonal of the Fisher information, w* the weights at the end of the last task (Kirkpatrick et
    al. 2017, https://arxiv.org/abs/1612.00796; online: Schwarz et al. 2018,
    https://arxiv.org/abs/1805.06370).
    """

    CONTRACT: ClassVar[Contract] = Contract(needs_boundaries=True, grows=False)

    strength: Annotated[float, Ge(0)] = 1000.0
    """Of the springs. The Fisher information is per token, so this compares across batch sizes; try several
    powers of ten."""
    decay: Annotated[float, Ge(0), Le(1)] = 1.0
    """How much of the earlier tasks' Fisher information stays when a task is added."""
    batches: Annotated[int, Gt(0)] = 16
    """Batches of a task's training text from which its Fisher information is estimated."""

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._labels = torch.Generator().manual_seed(situation.seed)

    @torch.no_grad()
    def gradients(self, backward: Backward) -> float:
        if not self.strength or not self._fisher:
            return 0.0
        # By names that are there: a parameter without a gradient does not move.
        moving = {name: p for name, p in self._parameters().items() if p.grad is not None}
        fisher = [self._fisher[name] for name in moving]
        away = torch._foreach_sub([p.detach() for p in moving.values()], [self._anchor[n] for n in moving])
        pull = torch._foreach_mul(fisher, away)
        gradients = [p.grad for p in moving.values() if p.grad is not None]
        torch._foreach_add_(gradients, pull, alpha=self.strength)
        return (
            self.strength
            / 2
            * float(sum(torch.vdot(f.flatten(), d.flatten()) for f, d in zip(pull, away, strict=True)))
        )

    def end_stage(self, stream: AnyStream, stage: int) -> None:
        if not self.strength:
            return
        found: dict[str, Tensor] = {}
        pieces = 0
        place = stream.state_dict()  # looking at text is not reading on in it
        for number in range(self.batches):
            batch = stream.next_batch(stage, at=(number + 0.5) / self.batches)
            self.extra_tokens += batch.input_ids.numel()
            for rows in range(0, len(batch.input_ids), _ROWS):
                some = Batch(batch.input_ids[rows : rows + _ROWS], batch.targets[rows : rows + _ROWS], 0)
                for name, value in self._squared(some).items():
                    found[name] = found[name] + value if name in found else value
                pieces += 1
        stream.load_state_dict(place)
        for name, value in found.items():
            earlier = self._fisher.get(name)
            value = value / pieces
            self._fisher[name] = value if earlier is None else self.decay * earlier + value
        self._anchor = {name: p.detach().clone() for name, p in self._parameters().items()}

    def _squared(self, batch: Batch) -> dict[str, Tensor]:
        """An unbiased estimate of the Fisher diagonal per token.

        Labels are drawn from the model itself, independently for each token: the gradients of different
        tokens are then uncorrelated and of mean zero, so that the square of their sum has the sum of their
        squares as its mean (Kunstner et al. 2019, https://arxiv.org/abs/1905.12558, on why labels are drawn).
        """
        model, parameters = self.situation.model, self._parameters()
        with evaluating(model):
            with self.situation.autocast():
                logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
            scored = logits[(batch.targets != IGNORED).to(logits.device)].float()  # (N, V)
            drawn = torch.multinomial(scored.detach().softmax(-1).cpu(), 1, generator=self._labels)  # (N, 1)
            loss = nn.functional.cross_entropy(scored, drawn.squeeze(1).to(scored.device), reduction="sum")
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        count = len(scored)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient.square().div_(count)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self._fisher, "anchor": self._anchor, "labels": self._labels.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.situation.device
        self._fisher = {name: value.to(device) for name, value in state["fisher"].items()}
        self._anchor = {name: value.to(device) for name, value in state["anchor"].items()}
        self._labels.set_state(state["labels"])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self.situation.parameters()
