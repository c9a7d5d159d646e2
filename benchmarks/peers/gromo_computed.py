"""GroMo's own method: new units computed from gradients, in a plain two-layer block beside each gated layer.

    python -m peers.gromo_computed tiny CHECKPOINT --tokens TEXT.pt --amount 64 --steps 200

Computed units (TINY, Verbockhaven et al. 2024, arXiv:2405.19816) need two plain layers with an activation
between them. So a block of two layers with a SiLU between them and no units yet stands beside each gated
layer, and GroMo grows it: statistics over some batches, then new units, then a search for the scale at which
the loss is least, as in GroMo's tutorial, one block after the other. The model is no Llama afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from gromo.containers.growing_block import LinearGrowingBlock
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peers.judging import alive
from peers.llama import adamw, batches, relative_error, train, validation_loss
from peers.process import fate

TINY = {"compute_delta": False, "use_covariance": True, "use_projection": True}
GRADMAX = {  # what GroMo's documentation gives for Evci et al. 2022, arXiv:2201.05125
    "compute_delta": False,
    "use_covariance": False,
    "alpha_zero": True,
    "use_projection": False,
    "ignore_singular_values": True,
}
METHODS: dict[str, dict[str, Any]] = {"tiny": TINY, "gradmax": GRADMAX}
SCALES = [0.1 * 2**i for i in range(12)]


class Nothing(nn.Module):
    """In place of the block's own residual connection, which the Llama has already."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Beside(nn.Module):
    """A gated layer and a growing block, whose outputs are added."""

    def __init__(self, gated: nn.Module, width: int):
        super().__init__()
        self.gated = gated
        self.block = LinearGrowingBlock(
            width,
            width,
            hidden_features=0,
            pre_activation=nn.Identity(),
            mid_activation=nn.SiLU(),
            downsample=Nothing(),
            kwargs_layer={"use_bias": False},
        )
        self.extended = False

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        added = self.block.extended_forward(flat) if self.extended else self.block(flat)
        return self.gated(x) + added.view_as(x)


def grow(
    model: nn.Module, grown: list[Beside], stream: Iterator[Tensor], *, amount: int, method: str, passes: int
) -> float:
    """One growth event of some blocks; the scale that was chosen."""
    model.eval()
    used = [next(stream) for _ in range(passes)]
    for beside in grown:
        beside.block.init_computation()
    for ids in used:
        model.zero_grad()
        # The sum over tokens, since GroMo divides by their number.
        (model(input_ids=ids, labels=ids, use_cache=False).loss * (ids.numel() - len(ids))).backward()
        for beside in grown:
            beside.block.update_computation()
    for beside in grown:
        # A threshold of zero, so that the number asked for is the number that comes.
        beside.block.compute_optimal_updates(
            maximum_added_neurons=amount, statistical_threshold=0.0, **METHODS[method]
        )
        beside.block.reset_computation()
    best = _search(model, grown, used) if method == "tiny" else 1.0
    for beside in grown:
        beside.block.set_scaling_factor(best)
        beside.block.apply_change()
        beside.block.delete_update()
    model.zero_grad()
    return best


@torch.no_grad()
def _search(model: nn.Module, grown: list[Beside], used: list[Tensor]) -> float:
    """The scale with the least loss, doubled until the loss rises."""
    for beside in grown:
        beside.extended = True
    losses: dict[float, float] = {}
    for scale in SCALES:
        for beside in grown:
            beside.block.set_scaling_factor(scale)
        losses[scale] = sum(model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in used)
        if losses[scale] > min(losses.values()):
            break
    for beside in grown:
        beside.extended = False
    return min(losses, key=lambda scale: losses[scale])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("source")
    parser.add_argument("--tokens", required=True, help="a file of torch: tokens to train and to measure on")
    parser.add_argument("--amount", type=int, required=True, help="new units in each block")
    parser.add_argument("--passes", type=int, default=8, help="batches that are looked at for one event")
    parser.add_argument("--judge", action="store_true", help="say how exact it was, and what is alive")
    parser.add_argument("--steps", type=int, default=0, help="training steps afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="batches that were seen before growth")
    parser.add_argument("--together", action="store_true", help="all blocks in one event")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(options.seed)
    tokens, held_out = torch.load(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.source)
    blocks = [Beside(layer.mlp, model.config.hidden_size) for layer in model.model.layers]
    for layer, block in zip(model.model.layers, blocks, strict=True):
        layer.mlp = block
    trained_before = adamw(model)
    began = time.perf_counter()
    looked_at = batches(tokens, 10_000 + options.seed)
    settings = {"amount": options.amount, "method": options.method, "passes": options.passes}
    events = [blocks] if options.together else [[block] for block in blocks]
    scales = [grow(model, event, looked_at, **settings) for event in events]
    result: dict[str, Any] = {
        "grow_seconds": time.perf_counter() - began,
        "scales": scales,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batches_looked_at": options.passes * len(events),
        "class": "LlamaForCausalLM with other modules",
        "stock": False,
    }
    if options.steps:
        result["loss_grown"] = validation_loss(model, held_out)
        stream = itertools.islice(batches(tokens, options.seed), options.skip, None)
        train(model, adamw(model), stream, options.steps)
        result["loss_trained"] = validation_loss(model, held_out)
    if options.judge:
        before = AutoModelForCausalLM.from_pretrained(options.source)
        result["optimizer"] = fate(model, trained_before)
        result["logit_error"] = relative_error(before, model, next(batches(tokens, 0)))
        new = {
            name: torch.ones_like(parameter, dtype=torch.bool)
            for name, parameter in model.named_parameters()
            if ".block." in name
        }
        result["alive"] = alive(model, new, batches(tokens, 0))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
