"""Newborn slices warm up while everything beside them trains on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from cambia.errors import ConfigError, GrowthError
from cambia.growth import (
    AddLayers,
    GrowthManager,
    GrowthRule,
    ScheduleTrigger,
    SliceWarmup,
    WidenFFN,
    grow,
)
from cambia.growth.disk.offline import plan_checkpoint
from cambia.training.checkpoint import load_state, save_checkpoint
from cambia.training.muon import Muon
from cambia.training.optim import load_optimizer_state, optimizer_state
from tests.conftest import tiny

GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NEW = {
    GATE: (slice(20, None), slice(None)),
    UP: (slice(20, None), slice(None)),
    DOWN: (slice(None), slice(20, None)),
}
OLD = {
    GATE: (slice(None, 20), slice(None)),
    UP: (slice(None, 20), slice(None)),
    DOWN: (slice(None), slice(None, 20)),
}


def in_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices apart from vectors."""
    matrices = [p for p in params if p.dim() == 2]
    return [{"params": matrices, "orthogonal": True}, {"params": [p for p in params if p.dim() < 2]}]


KINDS: dict[str, Callable[..., Optimizer]] = {
    "loop": lambda params, **kw: AdamW(params, lr=0.01, foreach=False, **kw),
    "foreach": lambda params, **kw: AdamW(params, lr=0.01, foreach=True, **kw),
    "fused": lambda params, **kw: AdamW(params, lr=0.01, fused=True, **kw),
    "muon": lambda params, **kw: Muon(in_groups([*params]), lr=0.01, **kw),
    "sgd": lambda params, **kw: SGD(params, lr=0.01, momentum=0.9),
}


def step(model: PreTrainedModel, optimizer: Optimizer, number: int) -> None:
    """A step whose gradients depend on its number and a parameter's name alone, not on the weights."""
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(1000 * number + place + len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    optimizer.step()


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(kind: str, *, warm: int | None, decay: float = 0.5, steps: int = 7) -> list[dict[str, Tensor]]:
    """All weights after growth and after each step that follows it."""
    model = tiny()
    optimizer = KINDS[kind](model.parameters(), weight_decay=decay)
    warmup = [] if warm is None else [SliceWarmup(optimizer, steps=warm)]
    for number in range(3):
        step(model, optimizer, number)
    grow(model, WidenFFN(add=3), optimizer=optimizer, holders=warmup)
    history = [values(model)]
    for number in range(3, 3 + steps):
        step(model, optimizer, number)
        history.append(values(model))
    return history


@pytest.mark.parametrize("kind", KINDS)
def test_old_entries_never_notice(kind: str) -> None:
    for warm, cold in zip(run(kind, warm=4), run(kind, warm=None), strict=True):
        for name in cold:
            place = OLD.get(name.replace("layers.1", "layers.0"), ())
            assert torch.equal(warm[name][place], cold[name][place])


@pytest.mark.parametrize("kind", KINDS)
def test_new_entries_move_at_a_rising_fraction_and_are_not_decayed(kind: str) -> None:
    warm, plain = run(kind, warm=4), run(kind, warm=None, decay=0.0)
    for name, place in NEW.items():
        for i, share in enumerate([1 / 5, 2 / 5, 3 / 5, 4 / 5]):
            moved = (warm[i + 1][name] - warm[i][name])[place]
            whole = (plain[i + 1][name] - plain[i][name])[place]
            assert whole.abs().mean() > 1e-3
            torch.testing.assert_close(moved, share * whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_afterwards_they_are_like_everybody(kind: str) -> None:
    warm, plain = run(kind, warm=4), run(kind, warm=None, decay=0.0)
    for name, place in NEW.items():
        moved = (warm[6][name] - warm[5][name])[place]
        whole = (plain[6][name] - plain[5][name])[place] - 0.01 * 0.5 * warm[5][name][place]
        torch.testing.assert_close(moved, whole, rtol=1e-3, atol=1e-6)


def test_a_warm_up_expires() -> None:
    model = tiny()
    optimizer = KINDS["loop"](model.parameters())
    warmup = SliceWarmup(optimizer, steps=2)
    grow(model, WidenFFN(add=3), optimizer=optimizer, holders=[warmup])
    assert len(warmup.newborns) == 2 * 3
    step(model, optimizer, 0)
    assert len(warmup.newborns) == 2 * 3
    step(model, optimizer, 1)
    assert not warmup.newborns


def test_zero_steps_switch_it_off() -> None:
    for warm, cold in zip(run("loop", warm=0), run("loop", warm=None), strict=True):
        assert all(torch.equal(warm[name], cold[name]) for name in cold)


def test_whole_new_layers_warm_up_too() -> None:
    histories = []
    for warm in (True, False):
        model = tiny()
        optimizer = KINDS["loop"](model.parameters(), weight_decay=0.0)
        holders = [SliceWarmup(optimizer, steps=3)] if warm else []
        grow(model, AddLayers(add=1, where="interpose"), optimizer=optimizer, holders=holders)
        before = values(model)
        step(model, optimizer, 0)
        histories.append({name: value - before[name] for name, value in values(model).items()})
    new = model.config.layer_ids.index(2)
    for name, whole in histories[1].items():
        share = 0.25 if f"layers.{new}." in name else 1.0
        torch.testing.assert_close(histories[0][name], share * whole, rtol=1e-3, atol=1e-6)


def test_a_warm_up_goes_on_through_a_second_growth() -> None:
    """Older newborns keep their age, older than the newest by the steps in between."""
    moved = []
    for warm in (True, False):
        model = tiny()
        optimizer = KINDS["loop"](model.parameters(), weight_decay=0.0)
        holders = [SliceWarmup(optimizer, steps=4)] if warm else []
        grow(model, WidenFFN(add=3), optimizer=optimizer, holders=holders)
        for number in range(2):
            step(model, optimizer, number)
        grow(
            model, WidenFFN(add=2), AddLayers(add=1, where="interpose"), optimizer=optimizer, holders=holders
        )
        before = values(model)
        step(model, optimizer, 2)
        moved.append({name: value - before[name] for name, value in values(model).items()})
    with_warmup, without = moved
    for rows, share in ((slice(0, 20), 1.0), (slice(20, 23), 3 / 5), (slice(23, 25), 1 / 5)):
        torch.testing.assert_close(with_warmup[GATE][rows], share * without[GATE][rows], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            with_warmup[DOWN][:, rows], share * without[DOWN][:, rows], rtol=1e-3, atol=1e-6
        )


def test_its_state_goes_through_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    def grown(warm: int) -> tuple[PreTrainedModel, Optimizer, SliceWarmup]:
        model = tiny("cambia")
        optimizer = KINDS["loop"](model.parameters(), weight_decay=0.5)
        warmup = SliceWarmup(optimizer, steps=warm)
        grow(model, WidenFFN(add=3), AddLayers(add=1), optimizer=optimizer, holders=[warmup])
        return model, optimizer, warmup

    model, optimizer, warmup = grown(5)
    for number in range(2):
        step(model, optimizer, number)
    state = {"warmup": warmup.state_dict(model), "optimizer": optimizer_state(optimizer, model)}
    save_checkpoint(tmp_path / "latest", model=model, state=state)

    again, second, follower = grown(5)
    again.load_state_dict(model.state_dict())
    loaded = load_state(tmp_path / "latest")
    load_optimizer_state(second, again, loaded["optimizer"])
    follower.load_state_dict(loaded["warmup"], again)
    for number in range(2, 6):
        step(model, optimizer, number)
        step(again, second, number)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not warmup.newborns and not follower.newborns


def test_what_is_frozen_does_not_move() -> None:
    """AdamW leaves a parameter without a gradient alone, decay included, and so must the warm-up."""
    model = tiny()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    optimizer = KINDS["loop"](model.parameters(), weight_decay=0.5)
    grow(model, WidenFFN(add=3), optimizer=optimizer, holders=[SliceWarmup(optimizer, steps=4)])
    before = values(model)
    for number in range(4):
        step(model, optimizer, number)
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == (name != "lm_head.weight")


@pytest.mark.parametrize("kind", ["loop", "fused"])
def test_a_step_that_the_loss_scaler_leaves_out_moves_nobody(kind: str) -> None:
    model = tiny()
    optimizer = KINDS[kind](model.parameters(), weight_decay=0.5)
    warmup = SliceWarmup(optimizer, steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    grow(model, WidenFFN(add=3), optimizer=optimizer, holders=[warmup])
    before = values(model)

    def scaled_step(gradient: float) -> None:
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()

    scaled_step(float("inf"))
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(newborn.age == 0 for newborn in warmup.newborns)
    scaled_step(1.0)
    assert all(newborn.age == 1 for newborn in warmup.newborns)
    assert not any(torch.equal(value, before[name]) for name, value in values(model).items())


FADED = AddLayers(to=4, where="stack", fade_in=0.5)


def faded(optimizer_kind: str = "loop") -> tuple[PreTrainedModel, Optimizer, SliceWarmup]:
    """Two layers and their silent copies, in a model that has taken three steps."""
    model = tiny("cambia")
    optimizer = KINDS[optimizer_kind](model.parameters(), weight_decay=0.5)
    warmup = SliceWarmup(optimizer, steps=4)
    for number in range(3):
        step(model, optimizer, number)
    return model, optimizer, warmup


def writers(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: value for name, value in values(model).items() if ".o_proj." in name or ".down_proj." in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_that_fade_in_come_up_to_what_their_originals_write(kind: str) -> None:
    """What they have more than copies that stay silent: at each step a quarter of half the original."""
    histories = []
    for fade_in in (0.5, 0.0):
        model, optimizer, warmup = faded(kind)
        event = grow(model, replace(FADED, fade_in=fade_in), optimizer=optimizer, holders=[warmup])
        assert event.logit_error < 1e-5, "at first they are silent"
        history = [writers(model)]
        for number in range(3, 9):
            step(model, optimizer, number)
            history.append(writers(model))
        histories.append(history)
        assert not warmup.newborns
    with_fading, silent = histories
    # Decay is taken back while they warm up, so that what comes up stays until then.
    for i in range(5):
        for name, value in with_fading[i].items():
            layer = int(name.split(".")[2])
            more = value - silent[i][name]
            if layer < 2:
                assert not more.any(), "the originals never notice"
                continue
            original = name.replace(f"layers.{layer}.", f"layers.{layer - 2}.")
            expected = sum(0.5 / 4 * silent[j][original] for j in range(1, i + 1)) + torch.zeros(())
            torch.testing.assert_close(more, expected.expand_as(more), rtol=1e-4, atol=1e-6)
            assert i == 0 or more.abs().max() > 1e-3


def test_fading_in_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer, warmup = faded()
    grow(model, FADED, WidenFFN(add=3), optimizer=optimizer, holders=[warmup])
    for number in range(3, 5):
        step(model, optimizer, number)
    state = {"warmup": warmup.state_dict(model), "optimizer": optimizer_state(optimizer, model)}
    save_checkpoint(tmp_path / "latest", model=model, state=state)

    again, second, follower = faded()
    grow(again, FADED, WidenFFN(add=3), optimizer=second, holders=[follower])
    again.load_state_dict(model.state_dict())
    loaded = load_state(tmp_path / "latest")
    load_optimizer_state(second, again, loaded["optimizer"])
    follower.load_state_dict(loaded["warmup"], again)
    assert sum(newborn.original is not None for newborn in follower.newborns) == 4
    for number in range(5, 9):
        step(model, optimizer, number)
        step(again, second, number)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("layers", ["all", [0]])
def test_fading_in_goes_on_through_a_second_growth(layers: Any) -> None:
    """Copy and original grow together, or the one alone: then the copy comes up no further."""
    model, optimizer, warmup = faded()
    grow(model, FADED, optimizer=optimizer, holders=[warmup])
    step(model, optimizer, 3)
    grow(model, WidenFFN(add=3, layers=layers), optimizer=optimizer, holders=[warmup])
    fading = {id(newborn.parameter) for newborn in warmup.newborns if newborn.original is not None}
    assert len(fading) == (4 if layers == "all" else 3)
    before = writers(model)
    step(model, optimizer, 4)
    name = "model.layers.{}.mlp.down_proj.weight"
    has_moved = (writers(model)[name.format(3)] - before[name.format(3)])[:, :20]
    assert has_moved.abs().max() > 1e-3


def test_what_is_frozen_does_not_fade_in() -> None:
    model, optimizer, warmup = faded()
    grow(model, FADED, optimizer=optimizer, holders=[warmup])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    before = values(model)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_fading_in_needs_a_warm_up_and_copies() -> None:
    model, optimizer, _ = faded()
    with pytest.raises(GrowthError, match="give rewarm_steps above 0"):
        grow(model, FADED, optimizer=optimizer)
    with pytest.raises(GrowthError, match="give rewarm_steps above 0"):
        grow(model, FADED, optimizer=optimizer, holders=[SliceWarmup(optimizer, steps=0)])
    rules = [GrowthRule(when=ScheduleTrigger(at_steps=[5]), then=FADED)]
    with pytest.raises(GrowthError, match="give rewarm_steps above 0"):
        GrowthManager(rules, model=model, optimizer=optimizer, rewarm_steps=0).check()
    GrowthManager(rules, model=model, optimizer=optimizer).check()
    for settings in ({"initial": "random"}, {"preserve": False}):
        with pytest.raises(ConfigError, match="it goes with"):
            AddLayers(add=1, fade_in=1.0, **settings)


def test_a_checkpoint_on_disk_fades_nothing_in(tmp_path: Path) -> None:
    tiny("cambia").save_pretrained(tmp_path / "small")
    with pytest.raises(GrowthError, match="a checkpoint on disk does not"):
        plan_checkpoint(tmp_path / "small", FADED)
