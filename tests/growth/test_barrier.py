"""The barrier: everything about a growth happens, or nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from cambia.config import build
from cambia.errors import GrowthError
from cambia.growth import AddLayers, Contract, GrowthEvent, GrowthRule, Operator, WidenFFN, grow
from cambia.growth.operators import Shape, Step
from cambia.models.architectures import layer_ids
from cambia.models.bodies import count_parameters
from cambia.nn.param_map import Fill, ParamMap
from tests.conftest import tiny
from tests.laws.examples import (
    FAMILIES,
    everything,
    field,
    final_norm,
    gate,
    layers_of,
    logits,
    loss_of,
    readers,
    tokens,
    units,
)

MODES: list[Any] = ["append", "interpose", "stack", "middle"]
BOTH = (WidenFFN(add=3), AddLayers(add=1, where="interpose"))


@dataclass(frozen=True)
class LoudReaders(Operator):
    """Widens, but new units are heard at once: not exact, whatever it says."""

    contract = Contract(exactness="tolerance", alive_within=1)

    def step(self, shape: Shape) -> Step:
        right = WidenFFN(add=3).step(shape)
        tensors = {
            name: dataclasses.replace(tensor_map, fill=Fill.normal(0.1))
            for name, tensor_map in right.params.tensors.items()
        }
        return Step(right.config, ParamMap(tensors), right.layers)


@dataclass(frozen=True)
class LoudLayer(Operator):
    """Adds a layer that is heard at once."""

    contract = Contract(exactness="tolerance", alive_within=1)

    def step(self, shape: Shape) -> Step:
        return AddLayers(add=1, where="interpose", preserve=False).step(shape)


def trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


class Refuses:
    """A holder that cannot take part."""

    def prepare(self, changes: Any) -> Callable[[], None]:
        raise MemoryError("no room for the averages")


class Interruption:
    """A hook that raises in the given forward pass from now on."""

    def __init__(self, model: PreTrainedModel):
        self.calls_left = 0
        final_norm(model).register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise KeyboardInterrupt


# ---- everything or nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "holders", "interrupted", "error"),
    [
        pytest.param((LoudReaders(),), (), 0, GrowthError, id="not exact"),
        pytest.param((WidenFFN(add=2), LoudLayer()), (), 0, GrowthError, id="a layer is not exact"),
        pytest.param(BOTH, (Refuses(),), 0, MemoryError, id="a holder refuses"),
        pytest.param(BOTH, (), 2, KeyboardInterrupt, id="interrupted after the swap"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_growth_that_fails_leaves_no_trace(
    family: str, operators: Any, holders: Any, interrupted: int, error: type[BaseException]
) -> None:
    model, twin = tiny(family), tiny(family)
    optimizer, other = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(twin.parameters())
    trained(model, optimizer)
    trained(twin, other)
    interruption = Interruption(model)
    before = everything(model, optimizer)
    interruption.calls_left = interrupted
    with pytest.raises(error):
        grow(model, *operators, optimizer=optimizer, holders=holders)
    assert everything(model, optimizer) == before
    trained(model, optimizer)
    trained(twin, other)
    assert torch.equal(logits(model), logits(twin))
    grow(model, *BOTH, optimizer=optimizer)
    trained(model, optimizer)


def test_a_model_that_has_broken_down_already_is_not_grown() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(GrowthError):
        grow(model, *BOTH)
    assert model.config.num_hidden_layers == 2


def test_the_batch_on_which_growth_is_checked_may_be_ones_own() -> None:
    model = tiny()
    batch = tokens(model, rows=1)
    expected = loss_of(model, batch).item()
    event = grow(model, WidenFFN(add=3), check_batch=batch)
    assert event.loss_before == pytest.approx(expected, rel=1e-6)
    assert event.loss_after == pytest.approx(loss_of(model, batch).item(), rel=1e-6)
    assert grow(model, WidenFFN(add=3)).loss_before != pytest.approx(expected, rel=1e-2)


def test_growing_consumes_no_randomness_of_the_run() -> None:
    model = tiny()
    before = torch.get_rng_state()
    grow(model, WidenFFN(add=3), AddLayers(add=1, initial="random"))
    assert torch.equal(torch.get_rng_state(), before)


def test_new_weights_depend_on_the_seed_and_nothing_else() -> None:
    first, second, other = tiny(), tiny(), tiny()
    torch.manual_seed(123)
    events = [grow(model, *BOTH, seed=seed) for model, seed in ((first, 5), (second, 5), (other, 6))]
    pairs = zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), two, _ in pairs)
    gates = [gate(model, 0)[20:] for model in (first, other)]
    assert not torch.equal(*gates)
    assert events[0].as_dict() == events[1].as_dict(), "equal growths are recorded equally"


# ---- what the grown model is ---------------------------------------------------------------------


@pytest.mark.parametrize("where", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_is_generating_without(family: str, where: Any) -> None:
    model = tiny(family).eval()
    grow(model, AddLayers(add=2, where=where, initial="random", preserve=False), WidenFFN(add=5))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = tokens(model, rows=2, length=5)
    mask = torch.ones_like(batch)
    cached = model.generate(batch, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(batch, attention_mask=mask, use_cache=False, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_come_from_every_layer(family: str) -> None:
    model = tiny(family)
    batch = tokens(model)
    assert len(model(input_ids=batch, output_hidden_states=True).hidden_states) == 3
    grow(model, AddLayers(add=2))
    assert len(model(input_ids=batch, output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_stay_tied(family: str) -> None:
    model = tiny(family, tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    grow(model, *BOTH, optimizer=optimizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    trained(model, optimizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_units_are_no_clones(family: str) -> None:
    """Equal units get equal gradients and stay equal: two for the price of none."""
    model = tiny(family, mlp_bias=True)
    optimizer = torch.optim.AdamW(model.parameters())
    grow(model, WidenFFN(add=6), optimizer=optimizer)
    trained(model, optimizer)
    for place in range(2):
        rows = units(model, place)
        assert len(rows.unique(dim=0)) == len(rows) == 26


# ---- what must survive ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_that_is_being_accumulated_goes_along(family: str) -> None:
    model = tiny(family)
    loss_of(model).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    grow(model, WidenFFN(add=3))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        old = tuple(slice(0, size) for size in before[name].shape)
        assert torch.equal(parameter.grad[old], before[name])
        assert parameter.grad.abs().sum() == pytest.approx(before[name].abs().sum().item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_modes_stay(family: str, training: bool) -> None:
    model = tiny(family).train(training)
    layers_of(model)[1].mlp.train(not training)
    quiet = {id(module) for module in layers_of(model)[1].mlp.modules()}
    grow(model, AddLayers(add=1, where="append"), WidenFFN(add=3))
    for name, module in model.named_modules():
        assert module.training == (not training if id(module) in quiet else training), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_stays_on_in_new_layers_too(family: str) -> None:
    model, plain = tiny(family), tiny(family)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    for one in (model, plain):
        grow(one, AddLayers(add=2, preserve=False), WidenFFN(add=3))
    for layer in layers_of(model):
        assert layer.gradient_checkpointing
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(model.train()).backward()
    loss_of(plain.train()).backward()
    assert len(calls) == 2 * 4, "each layer is computed again on the way back"
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_stay(family: str) -> None:
    model = tiny(family)
    heard: list[str] = []
    for place, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, place=place: heard.append(f"layer {place}"))
        (reader,) = readers(model, "ffn", layer=place)
        module = model.get_submodule(reader.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda *_, place=place: heard.append(f"ffn {place}"))
    final_norm(model).register_forward_hook(lambda *_: heard.append("norm"))
    grow(model, *BOTH)
    heard.clear()
    logits(model)
    assert {"layer 0", "ffn 0", "layer 1", "ffn 1", "norm"} <= set(heard)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_stays_frozen(family: str) -> None:
    model = tiny(family, num_hidden_layers=3, tie_word_embeddings=False)
    layers_of(model)[1].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    grow(model, WidenFFN(add=3), AddLayers(add=3, where="interpose"))
    frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in layers_of(model)]
    assert frozen == [False, False, True, True, False, False], "a copy is trained like its original"
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_somebody_changed_on_a_module_stay(family: str) -> None:
    """Growth sets the sizes that it changes and nothing else."""
    model = tiny(family).train()
    path, setting = ("attn.attn_dropout", "p") if family == "gpt2" else ("self_attn", "attention_dropout")
    if family == "cambia":
        setting = "dropout"
    module = layers_of(model)[0].get_submodule(path)
    assert getattr(module, setting) == 0.0
    setattr(module, setting, 0.5)
    final_norm(model).added_by_somebody = 7
    grow(model, *BOTH)
    assert getattr(layers_of(model)[0].get_submodule(path), setting) == 0.5
    assert final_norm(model).added_by_somebody == 7


@settings(max_examples=6)
@given(growths=st.lists(st.tuples(st.sampled_from(MODES), st.integers(1, 3)), min_size=1, max_size=4))
def test_a_layer_keeps_its_id_and_its_parameters_for_life(growths: list[tuple[Any, int]]) -> None:
    model = tiny(seed=3)
    seen: dict[int, tuple[int, ...]] = {}
    for where, count in growths:
        grow(model, AddLayers(add=count, where=where))
        ids = layer_ids(model.config)
        assert len(set(ids)) == len(ids) == len(model.model.layers)
        now = {
            layer_id: tuple(id(parameter) for parameter in layer.parameters())
            for layer_id, layer in zip(ids, model.model.layers, strict=True)
        }
        assert now.items() >= seen.items(), "nobody is renamed"
        fresh = now.keys() - seen.keys()
        if seen:
            assert min(fresh) > max(seen), "an id is never used again"
        seen = now


def test_the_id_of_a_layer_that_is_gone_is_not_given_again() -> None:
    model = tiny("cambia", layer_ids=[9, 0])
    grow(model, AddLayers(add=2, where="append"))
    assert layer_ids(model.config) == [9, 0, 10, 11]


# ---- one's own, and what is recorded -------------------------------------------------------------


OWN_OPERATOR = """
from dataclasses import dataclass
from cambia.growth import Contract, Operator, WidenFFN

@dataclass(frozen=True)
class Inflate(Operator):
    units: int = 2
    contract = Contract(exactness="tolerance", alive_within=2)

    def step(self, shape):
        return WidenFFN(add=self.units).step(shape)
"""


def test_an_operator_of_ones_own_needs_no_more_than_its_name(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "my_growth.py").write_text(OWN_OPERATOR)
    monkeypatch.syspath_prepend(tmp_path)
    rule = build(
        GrowthRule,
        {"when": {"type": "schedule", "at_steps": [1]}, "then": {"type": "my_growth:Inflate", "units": 5}},
    )
    model = tiny()
    event = grow(model, rule.then)
    assert model.config.intermediate_size == 25
    assert event.operators == ({"type": "my_growth:Inflate", "units": 5},)


def test_a_holder_of_ones_own_is_told_of_every_change() -> None:
    """Averages of weights are multiplied like weights, and get the new parameters too."""

    class Averages:
        def __init__(self, model: PreTrainedModel):
            self.kept = {id(p): (p, 0.5 * p.detach()) for p in model.parameters()}

        def prepare(self, changes: Any) -> Callable[[], None]:
            grown = {
                id(c.new): (
                    c.new,
                    c.lineage.carry(self.kept[id(c.old)][1], power=1) if c.old is not None else c.new,
                )
                for c in changes
            }
            gone = {id(c.old) for c in changes}
            rest = {key: value for key, value in self.kept.items() if key not in gone}
            return lambda undo: setattr(self, "kept", {**rest, **grown})

    model = tiny()
    averages = Averages(model)
    before = gate(model, 1).detach().clone()
    grow(model, *BOTH, holders=[averages])
    assert averages.kept.keys() == {id(p) for p in model.parameters()}
    assert all(mean.shape == p.shape for p, mean in averages.kept.values())
    grown = next(layer for layer in layers_of(model) if torch.equal(layer.mlp.gate_proj.weight[:20], before))
    mean = averages.kept[id(grown.mlp.gate_proj.weight)][1]
    assert torch.equal(mean[:20], 0.5 * before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_event_says_what_was_done(family: str) -> None:
    model = tiny(family)
    before = count_parameters(model)
    event = grow(model, WidenFFN(factor=1.5), AddLayers(add=2, where="stack"), reason="because")
    assert [operator["type"] for operator in event.operators] == ["widen_ffn", "add_layers"]
    assert event.operators[1]["where"] == "stack"
    assert event.reason == "because"
    assert event.exactness == "tolerance"
    assert event.logit_error is not None and event.logit_error <= 1e-5
    assert (event.parameters_before, event.parameters_after) == (before, count_parameters(model))
    assert event.flops_per_token_after > event.flops_per_token_before
    assert event.config_changes[field(model, "num_hidden_layers")] == (2, 4)
    assert event.config_changes[field(model, "intermediate_size")] == (20, 32)
    assert event.loss_before == pytest.approx(event.loss_after, rel=1e-5)
    again = GrowthEvent(**json.loads(json.dumps(event.as_dict())))
    assert json.dumps(again.as_dict()) == json.dumps(event.as_dict())


def test_a_module_without_parameters_may_be_attached() -> None:
    model = tiny()
    model.model.layers[0].mlp.probe = nn.Identity()
    grow(model, *BOTH)
    assert isinstance(model.model.layers[0].mlp.probe, nn.Identity)


def test_a_family_without_a_table_is_refused() -> None:
    model = tiny("gpt_neox")
    with pytest.raises(
        GrowthError, match=r"no architecture table for model type 'gpt_neox' yet; growable are cambia, llama"
    ):
        grow(model, WidenFFN(add=2))


def test_a_model_with_something_attached_is_refused() -> None:
    model = tiny()
    model.model.layers[0].mlp.adapter = nn.Linear(24, 2)
    with pytest.raises(GrowthError, match=r"'model\.layers\.0\.mlp\.adapter\.weight'.*unload adapters"):
        grow(model, WidenFFN(add=2))
    with pytest.raises(GrowthError, match="adapter"):
        grow(model, AddLayers(add=1))
    with pytest.raises(GrowthError, match="name at least one operator"):
        grow(model)


def test_a_new_optimizer_takes_up_the_state_of_a_grown_one() -> None:
    """An optimizer's state dict goes by places, and new layers stand in the middle of the model."""
    model = tiny()
    groups = [list(model.model.embed_tokens.parameters()), list(model.model.layers.parameters())]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    grow(model, AddLayers(add=1, where="middle"), optimizer=optimizer)
    groups = [list(model.model.embed_tokens.parameters()), list(model.model.layers.parameters())]
    for group, expected in zip(optimizer.param_groups, groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected))
    mine = [*groups[1][::-1], *groups[0]]  # somebody's own order stays
    optimizer = torch.optim.AdamW(mine, lr=1e-3)
    grow(model, AddLayers(add=1, where="middle"), optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"][: len(mine)])) == list(map(id, mine))
