"""Freezing: some parameters stop training, for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia.continual.methods.method import Contract, Method, Situation
from cambia.errors import ConfigError


@dataclass
class Freeze(Method):
    """Parameters with these names no longer train.

    Freezing embeddings and the lowest layers prevents part of what looks like forgetting and is a loss of
    alignment (Zheng et al. 2025, https://arxiv.org/abs/2501.13453).
    """

    CONTRACT: ClassVar[Contract] = Contract(seals_weights=True, grows=False)

    names: list[str] = field(
        default_factory=lambda: ["*embed*", "*.layers.0.*", "*.wte.*", "*.wpe.*", "*.h.0.*"]
    )
    """Patterns of parameter names: * stands for anything."""
    after: Annotated[int, Ge(0)] = 1
    """Tasks after which they freeze; 0: from the start."""

    def __post_init__(self) -> None:
        self._frozen: dict[str, nn.Parameter] = {}

    @property
    def contract(self) -> Contract:
        return replace(self.CONTRACT, needs_boundaries=self.after > 0)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        if not self._chosen(model):
            raise ConfigError(
                f"no parameter's name is like {' or '.join(self.names)}: set names of freeze; the first here "
                f"is {next(iter(dict(model.named_parameters())))!r}"
            )
        if not self.after:
            self._freeze(model)
        return model

    def attach(self, situation: Situation) -> None:
        super().attach(situation)
        self._frozen = {} if self.after else self._chosen(situation.model)

    def end_stage(self, stream: object, stage: int) -> None:
        if stage + 1 == self.after:
            self._freeze(self.situation.model)

    def promised(self) -> Mapping[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._frozen.items()}

    def state_dict(self) -> dict[str, bool]:
        return {"frozen": bool(self._frozen)}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        if state["frozen"]:
            self._freeze(self.situation.model)

    def _chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in self.names)
        }

    def _freeze(self, model: nn.Module) -> None:
        self._frozen = self._chosen(model)
        for parameter in self._frozen.values():
            # An optimizer leaves out what has no gradient: neither momentum nor decay moves it.
            parameter.requires_grad_(False)
            parameter.grad = None
