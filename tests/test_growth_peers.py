"""The pieces of benchmarks/growth_peers.py that are its own: clones, zeros, mergekit's recipe, the page."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def windows(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, 31, (4, 16), generator=generator)


def test_equal_clones_say_the_same_and_stay_equal(peers: ModuleType) -> None:
    before, after = tiny(), tiny()
    peers.by_hand.net2net(after, 7)
    assert after.config.intermediate_size == 27
    assert peers.llama.relative_error(before, after, next(windows())) < 1e-5
    clones = peers.judging.Clones(after, 20)
    assert clones.likeness(after) == pytest.approx(1)
    masks = peers.judging.new_entries(before, after, [])
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * 3 * 7 * 24
    assert peers.judging.alive(after, masks, windows()) == 1
    peers.llama.train(after, torch.optim.AdamW(after.parameters(), lr=1e-2), windows(), 60)
    assert clones.likeness(after) > 0.9999


def test_uneven_clones_part(peers: ModuleType) -> None:
    from cambia.growth import WidenFFN, grow

    model = tiny()
    grow(model, WidenFFN(add=7, initial="split"))
    clones = peers.judging.Clones(model, 20)
    peers.llama.train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), windows(), 60)
    assert clones.likeness(model) < 0.999


def test_zeros_on_both_sides_are_dead(peers: ModuleType) -> None:
    before, after = tiny(), tiny()
    peers.by_hand.zeros(after, 8)
    assert peers.llama.relative_error(before, after, next(windows())) < 1e-5
    masks = peers.judging.new_entries(before, after, [])
    assert peers.judging.alive(after, masks, windows()) == 0


@pytest.mark.parametrize(("depth", "count"), [(5, 5), (5, 2), (4, 7)])
def test_mergekit_is_told_the_order_that_cambia_makes(
    peers: ModuleType, tmp_path: Path, depth: int, count: int
) -> None:
    from cambia.growth import AddLayers, plan_growth

    ours = plan_growth(tiny(num_hidden_layers=depth), AddLayers(add=count)).layers
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": depth}))
    recipe = peers.sides.mergekit_recipe(tmp_path, count, silent=True)
    sources = [piece["sources"][0] for piece in recipe["slices"]]
    assert [i for i, layer in enumerate(ours) if layer is None] == peers.sides.new_places(depth, count)
    assert [i for i, source in enumerate(sources) if "parameters" in source] == peers.sides.new_places(
        depth, count
    )
    kept = [source["layer_range"][0] for source in sources if "parameters" not in source]
    assert kept == list(range(depth))


@pytest.mark.parametrize(
    ("operation", "fate"), [("net2net", "lost"), ("zeros", "lost"), ("resize", "fails"), ("cambia", "kept")]
)
def test_what_becomes_of_an_optimizer(peers: ModuleType, operation: str, fate: str) -> None:
    from cambia.growth import WidenFFN, grow

    model = tiny(tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    peers.llama.train(model, optimizer, windows(), 1)
    if operation == "cambia":
        grow(model, WidenFFN(add=4), optimizer=optimizer)
    else:
        peers.by_hand.OPERATIONS[operation](model, 4)
    assert peers.process.fate(model, optimizer) == fate


def test_the_page_has_a_row_for_each_side_and_arm(peers: ModuleType) -> None:
    fact = {"logit_error": 0.0, "alive": 1.0, "optimizer": "kept", "stock": True}
    cost = {"seconds": [1.0, 0.9, 1.1], "grow_seconds": None, "start_up_seconds": 0.5, "anonymous_bytes": 2e6}
    arm = {"seed": 0, "parameters": 1000, "loss_grown": 2.0}
    page = peers.page.markdown(
        {
            "facts": {"cambia": fact, "zeros": {**fact, "alive": 0.0}, "mergekit": {"failed": "no room"}},
            "costs": {"cambia": cost},
            "training": [
                {"arm": "random", **arm, "loss_trained": 1.5},
                {"arm": "net2net", **arm, "loss_trained": 1.75, "clone_cosine": 1.0},
            ],
        }
    )
    lines = page.splitlines()
    assert len(lines) == 10
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "did not run: no room" in page
    assert "+0.2500 (+0.2500 to +0.2500)" in page
