"""The arms of `compute_to_loss`: what each changes of one experiment.

A        the final size from the start, also scored as if it had ended earlier
B-depth  few layers, and all of them from a share of the run on that is fixed beforehand
B-width  half of every width, and all of it from there on; B-both both
C        A, where the layers that B-depth would add forget their moments and warm up again when B grows
D-k      a fixed size of k layers that spends what B-depth spends, and more, to have a curve of its own
E        B-depth from a source that nobody trained: grown at the first step, as long as B is large
F-...    B-depth with layers that are copies, so that the loss jumps
G-...    B-depth, grown when a trigger says so
H-...    B-depth with other policies for the optimizer's moments
"""

# T tokens of a row

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cambia.experiment.starts import NativeModel
from cambia.growth.operators import Contract, Operator, Shape, Step
from cambia.models.bodies import flops_per_token, on_meta
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.nn.param_map import MEAN, AxisMap, ParamMap, TensorMap

BYTES = 257
"""Rows of the vocabulary: bytes and the end of a text."""


@dataclass(frozen=True)
class Sizes:
    """The final size, and how long it trains."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    start_layers: int
    """Of B-depth."""
    tokens: int
    rows: int = 8
    length: int = 256
    """T."""
    grow_at: float = 0.5
    """Share of the run after which B grows."""
    decay: float = 0.2
    """Share of the run in which the rate falls."""
    ends: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875)
    """Shares of a run at which A is scored as if it had ended there."""

    @property
    def steps(self) -> int:
        return round(self.tokens / (self.rows * self.length))

    def widths(self, parts: int = 1) -> dict[str, int]:
        """Every width of the native model, or one of so many equal parts of each."""
        return {
            "hidden_size": self.hidden // parts,
            "intermediate_size": self.ffn // parts,
            "num_attention_heads": self.heads // parts,
            "num_key_value_heads": max(1, self.kv_heads // parts),
        }

    def cost(self, layers: int | None = None) -> float:
        """Operations of a training step per token, with so many layers."""
        model = NativeModel(num_hidden_layers=layers or self.layers, **self.widths())
        config = model.config(vocab_size=BYTES, eos_token_id=0, sequence_length=self.length)
        return flops_per_token(on_meta(CambiaForCausalLM, config), self.length)

    @property
    def grown_share(self) -> float:
        """What B-depth costs, as a share of what A does."""
        return self.grow_at * self.cost(self.start_layers) / self.cost() + 1 - self.grow_at

    def model(self) -> dict[str, Any]:
        """The native model at its final size."""
        return {
            "type": "native",
            "num_hidden_layers": self.layers,
            **self.widths(),
            "initializer_range": 0.09,
            "zero_init_residual": True,
        }


@dataclass(frozen=True)
class Reborn(Operator):
    """No growth: all layers above the first ones forget their moments and warm up again. A control."""

    above: int = 0
    """Layers from the bottom that stay as they are."""

    @property
    def contract(self) -> Contract:
        return Contract(exactness="tolerance", alive_within=1)

    def step(self, shape: Shape) -> Step:
        tensors = {}
        for name, size in shape.shapes.items():
            layer = shape.table.layer_of(name)
            # Each entry is "new", and has the mean of one old entry: itself.
            reborn = AxisMap(torch.full((size[0],), MEAN), groups={i: [i] for i in range(size[0])})
            tensors[name] = TensorMap(name, {} if layer is None or layer < self.above else {0: reborn})
        return Step(shape.with_sizes(), ParamMap(tensors), [*range(shape.num_layers)])


def arms(sizes: Sizes, fixed: Sequence[int], *, longer: float = 1.25) -> dict[str, dict[str, Any]]:
    """Every arm's settings, laid over the experiment of A without growth.

    Args:
        fixed: layers of the fixed sizes D.
        longer: what D spends, as a multiple of what B-depth spends.
    """
    when = {"type": "schedule", "at_fractions": [sizes.grow_at]}
    deep = {"type": "add_layers", "to": sizes.layers}
    few = {"model.num_hidden_layers": sizes.start_layers}
    half = {f"model.{name}": size for name, size in sizes.widths(2).items()}
    wide = [
        {"type": "widen_hidden", "to": sizes.hidden},
        {"type": "widen_ffn", "to": sizes.ffn},
        {"type": "add_kv_heads", "to": sizes.kv_heads},
    ]

    def grows(*operators: Mapping[str, Any], at: Mapping[str, Any] = when) -> dict[str, Any]:
        return {"growth.rules": [{"when": dict(at), "then": dict(one)} for one in operators]}

    large = 1 - sizes.grow_at
    found: dict[str, dict[str, Any]] = {
        "A": {"evaluation.decayed_at": list(sizes.ends)},
        "B-depth": few | grows(deep),
        "B-width": half | grows(*wide),
        "B-both": few | half | grows(*wide, deep),
        "C": grows({"type": "compute.arms:Reborn", "above": sizes.start_layers}),
        "E": few
        | grows(deep, at={"type": "schedule", "at_steps": [1]})
        | {
            "training.steps": round(sizes.steps * large),
            "training.schedule.decay_fraction": sizes.decay / large,
        },
        "F-stack": few | grows(deep | {"where": "stack", "preserve": False}),
        "F-interpose": few | grows(deep | {"preserve": False}),
        "F-random": few | grows(deep | {"initial": "random"}),
        "G-plateau": few
        | grows(deep, at={"type": "plateau", "metric": "loss", "patience": 3})
        | {"evaluation.every_steps": None},
        "G-efficiency": few | grows(deep, at={"type": "efficiency"}),
        "H-zero": few | grows(deep) | {"growth.moments": "zero"},
        "H-reset": few | grows(deep) | {"growth.moments": "reset"},
    }
    spends = sizes.tokens * sizes.cost() * sizes.grown_share
    for layers in fixed:
        steps = round(longer * spends / sizes.cost(layers) / (sizes.rows * sizes.length))
        found[f"D-{layers}"] = {
            "model.num_hidden_layers": layers,
            "training.steps": steps,
            "evaluation.decayed_at": [0.8 / longer, 1 / longer],
        }
    return found
