"""The optimizer's groups, and its state by parameter name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cambia.config import build
from cambia.errors import CheckpointError, ConfigError
from cambia.growth import AddLayers, WidenFFN, grow
from cambia.training import muon
from cambia.training.muon import orthogonal
from cambia.training.optim import (
    OPTIMIZERS,
    AdamW,
    Muon,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from tests.conftest import tiny
from tests.laws.examples import loss_of


def train(model: Any, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = tiny(attention_bias=True)
    optimizer = AdamW(learning_rate=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3).build(model)
    decayed, plain = optimizer.param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize("settings", [AdamW(), Muon()])
def test_frozen_parameters_are_left_out_and_tied_ones_come_once(settings: Any) -> None:
    model = tiny(tie_word_embeddings=True)
    model.model.norm.requires_grad_(False)
    members = [p for group in settings.build(model).param_groups for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("kernel", "fused", "foreach"),
    [("auto", True, False), ("fused", True, False), ("foreach", False, True), ("loop", False, False)],
)
def test_the_kernel_is_the_one_that_was_asked_for(kernel: Any, fused: bool, foreach: bool) -> None:
    (group, _) = AdamW(kernel=kernel).build(tiny()).param_groups
    assert (bool(group["fused"]), bool(group["foreach"])) == (fused, foreach)


def test_all_kernels_agree() -> None:
    models = {}
    for kernel in ("fused", "foreach", "loop"):
        models[kernel] = tiny()
        train(models[kernel], AdamW(kernel=kernel).build(models[kernel]), 3)
    for kernel in ("fused", "foreach"):
        for one, two in zip(models[kernel].parameters(), models["loop"].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_one_rate_for_all_groups() -> None:
    optimizer = AdamW().build(tiny())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_muon_takes_the_matrices_inside_the_layers() -> None:
    for tied in (False, True):
        model = tiny(tie_word_embeddings=tied, attention_bias=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        matrices, tables, vectors = Muon(weight_decay=0.3).build(model).param_groups
        inside = {names[id(p)] for p in matrices["params"]}
        assert matrices["orthogonal"] and not tables["orthogonal"] and not vectors["orthogonal"]
        assert inside == {name for name in names.values() if "_proj.weight" in name}
        heads = set() if tied else {"lm_head.weight"}
        assert {names[id(p)] for p in tables["params"]} == {"model.embed_tokens.weight", *heads}
        assert {p.dim() for p in vectors["params"]} == {1}
        assert [group["weight_decay"] for group in (matrices, tables, vectors)] == [0.3, 0.3, 0.0]


def test_muon_is_torchs_own_for_matrices_and_adamw_for_the_rest() -> None:
    model, other = tiny(attention_bias=True), tiny(attention_bias=True)
    ours = Muon(learning_rate=0.01, betas=(0.8, 0.9), weight_decay=0.3).build(model)
    matrices, tables, vectors = ([*g["params"]] for g in Muon().build(other).param_groups)
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(tables, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3),
        torch.optim.AdamW(vectors, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(4):
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            generator = torch.Generator().manual_seed(100 * number + len(name))
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for (name, one), two in zip(model.named_parameters(), other.named_parameters(), strict=True):
        moved, expected = one - before[name], two[1] - before[name]
        near = 0.05 if "_proj.weight" in name else 1e-4  # torch's rounds are in bfloat16
        assert (moved - expected).norm() <= near * expected.norm(), name


@pytest.mark.parametrize("shape", [(7, 7), (5, 31), (31, 5), (64, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_brings_all_singular_values_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=dtype)
    result = orthogonal(matrix)
    assert result.dtype == dtype and result.shape == matrix.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    aligned = left.mT @ result @ right.mT  # diagonal: the singular vectors stay
    torch.testing.assert_close(aligned, torch.diag(aligned.diagonal()), rtol=0, atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_muon_refuses_what_is_not_a_matrix() -> None:
    bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot be made orthogonal"):
        muon.Muon([{"params": [bias], "orthogonal": True}])


@pytest.mark.parametrize(
    "settings", [AdamW(kernel="fused"), AdamW(kernel="foreach"), AdamW(kernel="loop"), Muon()], ids=str
)
def test_state_by_name_goes_into_a_rebuilt_optimizer_bit_by_bit(settings: Any) -> None:
    """Growth appended new parameters to the groups; a rebuilt optimizer has another order."""
    model, again = tiny("cambia"), tiny("cambia")
    optimizer = settings.build(model)
    train(model, optimizer)
    grow(model, AddLayers(add=1, where="interpose"), WidenFFN(add=3), optimizer=optimizer)
    train(model, optimizer)

    grow(again, AddLayers(add=1, where="interpose"), WidenFFN(add=3))
    again.load_state_dict(model.state_dict())
    second = settings.build(again)
    state = optimizer_state(optimizer, model)
    assert state.keys() == dict(model.named_parameters()).keys()
    copied = {n: {k: v.clone() for k, v in values.items()} for n, values in state.items()}
    load_optimizer_state(second, again, copied)
    train(model, optimizer)
    train(again, second)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_of_another_model_is_refused() -> None:
    model = tiny()
    optimizer = AdamW().build(model)
    train(model, optimizer, 1)
    state = optimizer_state(optimizer, model)
    shallow, narrow = tiny(num_hidden_layers=1), tiny(intermediate_size=19)
    with pytest.raises(CheckpointError, match=r"state for 'model\.layers\.1\..*which the model lacks"):
        load_optimizer_state(AdamW().build(shallow), shallow, state)
    with pytest.raises(CheckpointError, match=r"shape \(20, 24\), the parameter \(19, 24\)"):
        load_optimizer_state(AdamW().build(narrow), narrow, state)


def test_the_registry_and_the_ranges() -> None:
    assert OPTIMIZERS == {
        "adamw": "cambia.training.optim:AdamW",
        "muon": "cambia.training.optim:Muon",
        "sgd": "cambia.training.optim:SGD",
    }
    assert build(AdamW, {"learning_rate": 1, "betas": [0.5, 0.6]}).betas == (0.5, 0.6)
    for wrong in ({"learning_rate": 0}, {"eps": 0}, {"weight_decay": -1}, {"kernel": "slow"}, {"lr": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(AdamW, wrong)
