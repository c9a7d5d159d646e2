"""Laws 1, 2, 4, 6 and 7 for LoRA experts: on every family, in every shape."""

# B rows of a batch, T tokens, V vocabulary

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from cambia.errors import GrowthError
from cambia.growth import AddLoraExpert, WidenFFN, grow
from cambia.models import LoraExperts, LoraShape
from cambia.models.bodies import count_parameters
from cambia.models.parts.optimizing import let_go
from cambia.nn.routed import bare_copy
from tests.conftest import tiny
from tests.laws.examples import FAMILIES, logits

SHAPES = {
    "default": LoraShape(),
    "rank 3": LoraShape(rank=3, alpha=7.0),
    "full": LoraShape(kind="full"),
    "low-rank tables": LoraShape(rank=4, tables="lora"),
    "linears alone": LoraShape(rank=5, tables="none", gains=False),
}
EVERY = [
    pytest.param(family, name, id=f"{family}, {name}")
    for family in FAMILIES
    for name in SHAPES
    # What a shape adds to are linear layers, tables and norms: GPT-2's are of another kind than all others.
    if family in ("llama", "gpt2") or name == "default"
]
TIED = {"default", "full"}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT's, and the next two
    "ignore:fan_in_fan_out is set to True:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
BATCH = torch.randint(0, 31, (6, 9), generator=torch.Generator().manual_seed(5))


def moved(experts: LoraExperts, name: str, seed: int = 0) -> None:
    """As if it had been trained: every tensor of it is something else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts[name].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))


def beside(family: str, shape: str = "default", *names: str, **sizes: Any) -> LoraExperts:
    """A model with experts that say something."""
    model = tiny(family, tie_word_embeddings=shape in TIED, **sizes)
    experts = LoraExperts(model, SHAPES[shape])
    for seed, name in enumerate(names):
        experts.add(name)
        moved(experts, name, seed)
    return experts


def said(experts: LoraExperts, names: list[str | None], batch: Tensor = BATCH) -> Tensor:
    with experts.routed(names):
        return logits(experts.model, batch)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# ---- born as nothing, and alive --------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_a_new_expert_changes_not_one_bit(family: str, shape: str) -> None:
    experts = beside(family, shape)
    before = logits(experts.model, BATCH)
    experts.add("new")
    assert torch.equal(logits(experts.model, BATCH), before)
    assert torch.equal(said(experts, ["new"]), before)
    with experts.teaching("new"):
        assert torch.equal(logits(experts.model, BATCH), before)


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_every_tensor_of_a_new_expert_learns_within_two_steps(family: str, shape: str) -> None:
    experts = beside(family, shape)
    part = experts.add("new")
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    alive: set[str] = set()
    for _ in range(2):
        with experts.teaching("new"):
            experts.model(input_ids=BATCH, labels=BATCH).loss.backward()
        alive |= {n for n, p in part.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert alive == set(dict(part.named_parameters()))
    assert all(p.grad is None for p in experts.model.parameters())


def test_an_expert_born_from_another_says_what_that_one_says() -> None:
    experts = beside("llama", "default", "old")
    experts.add("new", like="old")
    assert torch.equal(said(experts, ["new"] * 6), said(experts, ["old"] * 6))
    assert experts["new"].parents == ("old",)
    moved(experts, "new")
    assert not torch.equal(said(experts, ["new"] * 6), said(experts, ["old"] * 6))


# ---- nothing is forgotten --------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_what_is_sealed_says_the_same_bits_while_ten_others_come(family: str, shape: str) -> None:
    experts = beside(family, shape, "a", "b")
    experts.seal("a")
    before, hashed = said(experts, ["a", None, "b", "a", None, "b"]), experts["a"].sha256
    for number in range(8):
        wider = LoraShape(rank=6 + number, tables="lora") if number % 2 else None
        experts.add(f"later_{number}", shape=wider)
        moved(experts, f"later_{number}", number)
    after = said(experts, ["a", None, "later_3", "a", "later_0", "later_7"])
    kept = torch.tensor([0, 1, 3])
    assert torch.equal(after[kept], before[kept])
    assert not torch.equal(after[2], before[2])
    assert experts["a"].sha256 == hashed


@given(st.lists(st.sampled_from([None, "a", "b", "wide"]), min_size=6, max_size=6), st.randoms())
def test_a_row_does_not_feel_who_answers_the_others(names: list[str | None], random: Any) -> None:
    experts = beside("llama", "default", "a", "b")
    experts.add("wide", shape=LoraShape(rank=9))
    moved(experts, "wide", 3)
    one = said(experts, names)
    others = [random.choice([None, "a", "b", "wide"]) for _ in names]
    stays = random.randrange(6)
    others[stays] = names[stays]
    assert torch.equal(said(experts, others)[stays], one[stays])


def test_training_one_leaves_the_others_and_the_model_alone() -> None:
    experts = beside("llama", "default", "old")
    experts.seal("old")
    weights = copy.deepcopy(experts.model.state_dict())
    hashed, before = experts["old"].sha256, said(experts, ["old", None] * 3)
    part = experts.add("new")
    # Of everything there is: what is sealed has no gradient, and so neither momentum nor decay.
    trained = [p for p in experts.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        with experts.teaching("new"):
            experts.model(input_ids=BATCH, labels=BATCH).loss.backward()
        torch.nn.utils.clip_grad_norm_(experts.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert experts["old"].sha256 == hashed
    assert all(torch.equal(tensor, weights[name]) for name, tensor in experts.model.state_dict().items())
    assert torch.equal(said(experts, ["old", None] * 3), before)
    assert any(p.abs().sum() > 0 for p in part.parameters())


# ---- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_rows_training_and_merging_come_to_the_same(family: str, shape: str) -> None:
    experts = beside(family, shape, "a", "b", dtype=torch.float64)
    by_row = said(experts, ["a", "b", None, "a", "b", None])
    for name, rows in (("a", [0, 3]), ("b", [1, 4])):
        with experts.teaching(name):
            alone = logits(experts.model, BATCH)
        assert close(alone[rows], by_row[rows], 1e-10)
        assert close(logits(experts.merged(name), BATCH)[rows], by_row[rows], 1e-10)
    assert torch.equal(by_row[[2, 5]], logits(experts.model, BATCH)[[2, 5]])


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_with_weight_one_is_the_expert_and_weights_may_differ_by_token(family: str) -> None:
    experts = beside(family, "rank 3", "a", "b", dtype=torch.float64)
    alone = said(experts, ["a", "b"] * 3)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1)
    with experts.mixed(["a", "b"], weights):
        assert close(logits(experts.model, BATCH), alone, 1e-10)
    # From the fifth token on by another expert: what stands before does not feel it.
    later = weights[:, None].repeat(1, 9, 1)
    later[:, 4:] = later[:, 4:].flip(-1)
    with experts.mixed(["a", "b"], later):
        changed = logits(experts.model, BATCH)
    assert close(changed[:, :4], alone[:, :4], 1e-10)
    assert not close(changed[:, 4:], alone[:, 4:], 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_keep_their_type(family: str) -> None:
    experts = beside(family, "default", "a", dtype=torch.bfloat16, attention_bias=True)
    assert all(p.dtype == torch.float32 for p in experts["a"].parameters())
    assert said(experts, ["a", None] * 3).dtype == torch.bfloat16


# ---- on the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_experts_are_read_as_they_were_written(family: str, shape: str, tmp_path: Path) -> None:
    experts = beside(family, shape, "a", "b")
    experts.seal("a")
    experts.save_pretrained(tmp_path / "saved", with_base=True)
    before = said(experts, ["a", "b", None] * 2)
    again = LoraExperts.from_pretrained(tmp_path / "saved")
    assert torch.equal(said(again, ["a", "b", None] * 2), before)
    assert [again[n].state for n in again.names] == ["sealed", "seeding"]
    assert again["a"].sha256 == experts["a"].sha256
    assert not any(p.requires_grad for p in again["a"].parameters())


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_peft_reads_every_expert_and_says_the_same(family: str, shape: str, tmp_path: Path) -> None:
    experts = beside(family, shape, "first", attention_bias=True)
    expected = said(experts, ["first"] * 6)
    folder = experts.to_peft("first", tmp_path / "first")
    stock = PeftModel.from_pretrained(bare_copy(experts.model), folder).eval()
    assert close(logits(stock, BATCH), expected)


@pytest.mark.parametrize(("family", "shape"), EVERY)
def test_an_adapter_goes_out_and_comes_in_as_it_was(family: str, shape: str, tmp_path: Path) -> None:
    experts = beside(family, shape, "first")
    folder = experts.to_peft("first", tmp_path / "first")
    experts.from_peft(folder, "again")
    assert experts["again"].state == "sealed"
    assert torch.equal(said(experts, ["again"] * 6), said(experts, ["first"] * 6))
    assert experts["again"].num_parameters == experts["first"].num_parameters


# ---- through grow() --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_grow_adds_an_expert_and_the_optimizer_takes_it_up(family: str) -> None:
    model = tiny(family)
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(2, 2))]}, {"params": []}], lr=0.1)
    event = grow(model, AddLoraExpert(rank=3), optimizer=optimizer, check_batch=BATCH)
    experts = LoraExperts.of(model)
    assert experts is not None
    assert experts.names == ["expert_0"]
    assert (event.exactness, event.logit_error) == ("bits", 0.0)
    assert event.loss_before == event.loss_after
    part = experts["expert_0"]
    assert event.parameters_after - event.parameters_before == part.num_parameters
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in part.parameters()} <= taken

    moved(experts, "expert_0")
    event = grow(model, AddLoraExpert(like="expert_0"), optimizer=optimizer, check_batch=BATCH)
    assert event.parameters_before == count_parameters(model) + part.num_parameters
    assert torch.equal(said(experts, ["expert_1"] * 6), said(experts, ["expert_0"] * 6))
    let_go(optimizer, part)
    left = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not left & {id(p) for p in part.parameters()}


def test_a_model_with_parts_keeps_its_shape() -> None:
    model = tiny("llama")
    grow(model, AddLoraExpert())
    with pytest.raises(GrowthError, match="grow it before the first Part"):
        grow(model, WidenFFN(add=2))
    with pytest.raises(GrowthError, match=r"an event of its own: call grow\(\) for it"):
        grow(tiny("llama"), WidenFFN(add=2), AddLoraExpert())
