"""The arms of `compute_to_loss`: what each changes of one experiment.

A        the final size from the start, also scored as if it had ended earlier
B-depth  a quarter of the layers, doubled twice after the shares of the run that `cambia plan` chooses
B-once   half of the layers, doubled once where B-depth grows for the last time
B-width  half of every width, and all of it where B-depth, as large until then, grows for the first time
B-both   half of every width and of the layers; widened where B-depth grows first, doubled where it grows last
C        A, where the layers that B-once would add forget their moments and warm up again when B grows
D-k      a fixed size of k layers that spends what B-depth spends, and more, to have a curve of its own
E        B-once from a source that nobody trained: grown at the first step, as long as B is large
F-...    B-depth with layers that are heard at once, so that the loss jumps; that stay silent until they have
         learned; that stand beside their originals; that are random
G-...    B-depth, grown after other shares of the run, or when a trigger says so
H-...    B-width with other policies for the optimizer's moments; in depth all of them are the same, since old
         tensors keep what they have and new layers begin with nothing
"""

# T tokens of a row

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cambia.experiment.planning import GrowingSizes
from cambia.experiment.starts import NativeModel
from cambia.growth import AddLayers, plan_growth
from cambia.growth.operators import Contract, Operator, Shape, Step
from cambia.models.bodies import count_parameters, flops_per_token, on_meta
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
    tokens: int
    rows: int = 8
    length: int = 256
    """T."""
    decay: float = 0.2
    """Share of the run in which the rate falls."""
    ends: tuple[float, ...] = (0.625, 0.75, 0.875)
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

    @property
    def parameters(self) -> int:
        """Of the final size."""
        return count_parameters(self._on_meta(self.layers))

    def cost(self, layers: int | None = None) -> float:
        """Operations of a training step per token, with so many layers."""
        return flops_per_token(self._on_meta(layers or self.layers), self.length)

    def _on_meta(self, layers: int) -> CambiaForCausalLM:
        model = NativeModel(num_hidden_layers=layers, **self.widths())
        config = model.config(vocab_size=BYTES, eos_token_id=0, sequence_length=self.length)
        return on_meta(CambiaForCausalLM, config)

    @property
    def start_layers(self) -> int:
        """Of B-depth."""
        return self.layers // 4

    @property
    def doublings(self) -> list[float]:
        """Shares of the run after which B-depth doubles its layers."""
        return self._growing.shares(self._growing.last(self.tokens, self.decay))

    @property
    def grown_share(self) -> float:
        """What B-depth costs, as a share of what A does."""
        return self._growing.mean_cost(self.doublings) / self.cost()

    @cached_property
    def _growing(self) -> GrowingSizes:
        start, depths = self._on_meta(self.start_layers), (2 * self.start_layers, self.layers)
        growths = [plan_growth(start, AddLayers(to=depth), context=self.length) for depth in depths]
        return GrowingSizes.of(growths)

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
    twice = {"type": "add_layers", "factor": 2.0, "where": "stack", "fade_in": 1.0}
    few = {"model.num_hidden_layers": sizes.start_layers}
    half = {"model.num_hidden_layers": sizes.layers // 2}
    narrow = {f"model.{name}": size for name, size in sizes.widths(2).items()}
    wide = [
        {"type": "widen_hidden", "to": sizes.hidden},
        {"type": "widen_ffn", "to": sizes.ffn},
        {"type": "add_kv_heads", "to": sizes.kv_heads},
    ]
    first, last = sizes.doublings[0], sizes.doublings[-1]
    # By the training loss, which costs nothing to read.
    tenth, patience = sizes.steps // 10, max(1, sizes.steps // 40)
    flat = {
        "type": "plateau",
        "metric": "loss",
        "window": tenth,
        "patience": patience,
        "min_improvement": 0.02,
    }

    def at(*shares: float) -> dict[str, Any]:
        return {"type": "schedule", "at_fractions": list(shares)}

    def rules(*operators: Mapping[str, Any], when: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = [{"when": dict(when), "then": dict(one)} for one in operators]
        for rule in found:
            if "factor" in rule["then"]:  # what says `to` acts once by itself
                rule["max_events"] = len(sizes.doublings)
        return found

    def grows(*operators: Mapping[str, Any], when: Mapping[str, Any]) -> dict[str, Any]:
        return {"growth.rules": rules(*operators, when=when)}

    def doubles(when: Mapping[str, Any] = at(*sizes.doublings), **changed: Any) -> dict[str, Any]:
        return few | grows(twice | changed, when=when)

    widens = narrow | grows(*wide, when=at(first))
    found: dict[str, dict[str, Any]] = {
        "A": {"evaluation.decayed_at": list(sizes.ends)},
        "B-depth": doubles(),
        "B-once": half | grows(twice, when=at(last)),
        "B-width": widens,
        "B-both": narrow
        | half
        | {"growth.rules": [*rules(*wide, when=at(first)), *rules(twice, when=at(last))]},
        "C": grows({"type": "compute.arms:Reborn", "above": sizes.layers // 2}, when=at(last)),
        "E": half
        | grows(twice, when={"type": "schedule", "at_steps": [1]})
        | {
            "training.steps": round(sizes.steps * (1 - last)),
            "training.schedule.decay_fraction": sizes.decay / (1 - last),
        },
        "F-jump": doubles(fade_in=0.0, preserve=False),
        "F-silent": doubles(fade_in=0.0),
        "F-interpose": doubles(where="interpose"),
        "F-random": doubles(fade_in=0.0, initial="random"),
        **{
            f"G-{first:g}-{second:g}": doubles(at(first, second))
            for first, second in ((0.1, 0.4), (0.1, 0.7), (0.2, 0.6), (0.2, 0.8))
        },
        "G-plateau": doubles(flat),
        "G-efficiency": doubles({"type": "efficiency"}),
        "H-zero": widens | {"growth.moments": "zero"},
        "H-reset": widens | {"growth.moments": "reset"},
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
