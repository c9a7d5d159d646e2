"""Low-rank fine-tuning: the model stays, an adapter beside it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.continual.methods.method import Contract, Method, Parameters, Situation
from cambia.models.bodies import count_parameters
from cambia.nn.lora import LoraAdapter


@dataclass
class Adapting(Method):
    """A model of which only an adapter trains, and some small tensors of its own.

    Meant for a model that has learned already: what is adapted has to be worth it.
    """

    rank: Annotated[int, Gt(0)] = 16
    """Of the matrices that are added to each linear layer."""
    alpha: Annotated[float, Gt(0)] | None = None
    """What is added is multiplied by alpha / rank; rank where it is left out."""
    whole: bool = True
    """Train embeddings, norm gains and biases as well: at small sizes that is worth more than rank."""

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        model.requires_grad_(False)
        self.adapter = LoraAdapter(model, rank=self.rank, alpha=self.alpha)
        for parameter in whole_parameters(model).values() if self.whole else ():
            parameter.requires_grad_(True)
        return nn.ModuleDict({"model": model, "adapter": self.adapter})

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self.adapter.reset(situation.seed)
        # What a checkpoint, which holds the adapted model, does not tell: the weights below the adapter.
        adapted = {f"{name}.weight" for name in self.adapter.layers}
        self._base = {name: p.detach() for name, p in situation.model.named_parameters() if name in adapted}

    def forget_steps(self) -> None:
        """Let the optimizer forget its moments: what trains from here on is something new."""
        for parameter in self.situation.parameters().values():
            self.situation.optimizer.state.pop(parameter, None)

    def saved_weights(self) -> Mapping[str, Tensor]:
        return {**self.situation.model.state_dict(), **self.adapter.merged()}

    @property
    def cost(self) -> float:
        # Of a step's three passes the one that makes the gradients of weights is left out, and the adapter's
        # own three are added.
        added = sum(p.numel() for p in self.adapter.parameters())
        return 2 / 3 + added / count_parameters(self.situation.model)

    def parameters(self) -> Parameters:
        trained = sum(p.numel() for p in self.situation.parameters().values())
        model = count_parameters(self.situation.model)  # the adapter is merged into it at the end
        return Parameters(trained, model, model)

    def promised(self) -> Mapping[str, Tensor]:
        every = self.situation.model.named_parameters()
        return {name: p.detach() for name, p in every if not p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        return {"base": dict(self._base), "adapter": self.adapter.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self.situation.model.named_parameters())
        for name, value in state["base"].items():
            parameters[name].copy_(value)
        self.adapter.load_state_dict(state["adapter"])


@dataclass
class SharedLora(Adapting):
    """One adapter for all tasks: low-rank adaptation of every linear layer (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685)."""

    CONTRACT: ClassVar[Contract] = Contract(rewrites_weights=True, grows=False)


def whole_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Embeddings, and all vectors: norm gains and biases."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() < 2 or id(parameter) in tables
    }
