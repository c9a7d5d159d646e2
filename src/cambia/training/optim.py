"""The optimizers, and their state by parameter name.

torch numbers an optimizer's state by position, which growth changes. Here it is kept by the name of the
parameter, so a checkpoint can be read whatever order the groups have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn
from transformers import PreTrainedModel

from cambia.errors import CheckpointError, ConfigError
from cambia.training import muon


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Vectors, norm gains and biases, are not decayed."""

    learning_rate: Annotated[float, Gt(0)] = 3e-3
    """The highest rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Memory of the first and second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment, so that nothing is divided by zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled decay of matrices."""
    kernel: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """How it is computed; auto takes the fused one."""

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """An optimizer of all of the model's trainable parameters."""
        return torch.optim.AdamW(
            _decayed_and_not(model, self.weight_decay),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=self.kernel in ("auto", "fused"),
            foreach=self.kernel == "foreach",
        )


@dataclass(frozen=True)
class Muon:
    """Muon for the matrices inside the layers, AdamW for the rest: fewer steps to the same loss.

    See `cambia.training.muon`. Rates and decay are AdamW's.
    """

    learning_rate: Annotated[float, Gt(0)] = 3e-3
    """The highest rate; the schedule multiplies it."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Memory of the momentum of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Memory of the first and second moment of the rest."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment, so that nothing is divided by zero."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled decay of matrices."""

    def build(self, model: nn.Module) -> muon.Muon:
        """An optimizer of all of the model's trainable parameters."""
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        apart = {id(weight) for weight in (*tables, getattr(head, "weight", None))}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() == 2 and id(p) not in apart]
        inside = {id(p) for p in matrices}
        rest = [p for p in trained if id(p) not in inside]
        groups = [
            {"params": matrices, "orthogonal": True},
            {"params": [p for p in rest if p.dim() >= 2]},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        return muon.Muon(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            momentum=self.momentum,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum. Vectors, norm gains and biases, are not decayed."""

    learning_rate: Annotated[float, Gt(0)] = 0.1
    """The highest rate; the schedule multiplies it."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Memory of the direction."""
    nesterov: bool = False
    """Look ahead along the momentum (Nesterov 1983)."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decay of matrices, added to their gradient."""

    def build(self, model: nn.Module) -> torch.optim.SGD:
        """An optimizer of all of the model's trainable parameters."""
        return torch.optim.SGD(
            _decayed_and_not(model, self.weight_decay),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )


Optimizer = AdamW | Muon | SGD
"""The settings of an optimizer."""
OPTIMIZERS: dict[str, str] = {
    "adamw": "cambia.training.optim:AdamW",
    "muon": "cambia.training.optim:Muon",
    "sgd": "cambia.training.optim:SGD",
}


def _decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, and vectors, which are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def check_covered(optimizer: torch.optim.Optimizer, trained: nn.Module, model: nn.Module) -> None:
    """Refuse an optimizer that knows nothing of what a method trains beside the model.

    Raises:
        ConfigError: it was made before the method had its say.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    lacking = [p for p in trained.parameters() if p.requires_grad and id(p) not in known | own]
    if lacking:
        raise ConfigError(
            f"the method trains {len(lacking)} tensors beside the model, which the optimizer does not know: "
            "give the optimizer's settings, optimizer=AdamW(learning_rate=...), and it is made to fit"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of each parameter by its name: ``{name: {"exp_avg": tensor, ...}}``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give an optimizer of the same parameters its state back.

    Raises:
        CheckpointError: the state is of a model of another shape.
    """
    parameters = dict(model.named_parameters())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, values in state.items():
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state for {name!r}, which the model lacks")
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"the checkpoint's {key} of {name!r} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(parameters[name].shape)}: optimizer and model are from different steps"
                )
        parameter = parameters[name]
        group = groups[id(parameter)]
        # The step count lies on the CPU, except where a kernel on the device reads it, as Muon's does.
        counts_there = isinstance(optimizer, muon.Muon) or group.get("fused") or group.get("capturable")
        optimizer.state[parameter] = {
            key: value.to(parameter.device)
            if isinstance(value, torch.Tensor) and (value.dim() or counts_there)
            else value
            for key, value in values.items()
        }
