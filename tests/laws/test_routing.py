"""Nothing is forgotten by routes: what was claimed once is answered with the same bits for good."""

# B rows, T tokens

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cambia.errors import CheckpointError, ConfigError
from cambia.models import LoraExperts, LoraShape
from cambia.models.routing.prefixes import PrefixReader
from cambia.nn.routed import bare_copy
from tests.laws.test_parts import beside

WIDTH = 12


def text(kind: int, rows: int, seed: int = 0) -> Tensor:
    """Of its own few tokens, and now and then of any."""
    generator = torch.Generator().manual_seed(100 * seed + kind)
    own = torch.randint(4 * kind, 4 * kind + 4, (rows, WIDTH), generator=generator)
    any_of = torch.randint(0, 31, (rows, WIDTH), generator=generator)
    return torch.where(torch.rand(rows, WIDTH, generator=generator) < 0.9, own, any_of)


def learned(experts: LoraExperts, kind: int) -> None:
    """An expert is taught a kind of text."""
    name = f"kind_{kind}"
    part = experts.add(name, shape=LoraShape(rank=3 + kind % 2, tables="none", gains=False))
    optimizer, rows = torch.optim.AdamW(part.parameters(), lr=0.02), text(kind, 32, seed=2)
    with experts.teaching(name):
        for _ in range(12):
            experts.model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    experts.seal(name)
    experts.calibrate(name, text(kind, 64))


def with_kinds(*kinds: int, routing: str = "first_claim") -> LoraExperts:
    experts = beside("llama", "linears alone")
    experts.routing, experts.prefix_tokens = routing, 8
    for kind in kinds:
        learned(experts, kind)
    return experts


BATCH = torch.cat([text(kind, 4, seed=1) for kind in range(7)])


def said(experts: LoraExperts) -> Tensor:
    with torch.no_grad():
        return experts(BATCH).logits


def test_what_was_claimed_once_is_answered_by_the_same_bits_for_good() -> None:
    experts = with_kinds(0, 1)
    names, before = experts.route(BATCH), said(experts)
    claimed = torch.tensor([name is not None for name in names])
    assert names[:4].count("kind_0") + names[4:8].count("kind_1") >= 5
    for kind in range(2, 7):
        learned(experts, kind)
    after = experts.route(BATCH)
    assert [name for name, was in zip(after, names, strict=True) if was] == [name for name in names if name]
    assert torch.equal(said(experts)[claimed], before[claimed])
    assert len({name for name in after if name}) > 4, "the later ones answer something too"


def test_what_nobody_claims_is_answered_by_the_bits_of_the_model_alone() -> None:
    experts = with_kinds(0, 1)
    alone = bare_copy(experts.model).eval()
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):  # whoever stands beside it in a batch
        rows = BATCH[torch.randperm(len(BATCH), generator=generator)]
        left = torch.tensor([name is None for name in experts.route(rows)])
        assert 0 < left.sum() < len(rows)
        with torch.no_grad():
            assert torch.equal(experts(rows).logits[left], alone(input_ids=rows).logits[left])


@pytest.mark.parametrize("routing", ["compete", "first_claim"])
def test_routes_are_read_as_they_were_written(routing: str, tmp_path: Path) -> None:
    experts = with_kinds(0, 1, routing=routing)
    routes, before = experts.decide(BATCH), said(experts)
    experts.save_pretrained(tmp_path / "saved")
    again = LoraExperts.from_pretrained(tmp_path / "saved", bare_copy(experts.model))
    assert (again.routing, again.prefix_tokens) == (routing, 8)
    found = again.decide(BATCH)
    assert found.names == routes.names and torch.equal(found.confidence, routes.confidence)
    assert torch.equal(said(again), before)

    path = tmp_path / "saved/router.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is not what was written"):
        LoraExperts.from_pretrained(tmp_path / "saved", bare_copy(experts.model))


def test_experts_that_the_router_does_not_know_answer_what_they_foretell_best(tmp_path: Path) -> None:
    elsewhere = with_kinds(1)
    elsewhere.to_peft("kind_1", tmp_path / "mine")
    experts = with_kinds(0)
    experts.from_peft(tmp_path / "mine", "other")
    with pytest.raises(ConfigError, match=r"no statistics of LoRA expert 'other'.*calibrate\('other', rows"):
        experts.route(BATCH)
    experts.routing = "compete"
    assert experts.route(text(0, 20)).count("kind_0") >= 15
    assert experts.route(text(1, 20)).count("other") >= 10
    experts.calibrate("other", text(1, 64))
    assert experts.route(text(1, 20)).count("other") >= 15


def test_every_routing_answers_and_writes() -> None:
    experts = with_kinds(0, 1)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    for routing in ("compete", "first_claim", "likelihood", "hybrid", "arrow"):
        experts.routing = routing
        assert said(experts).isfinite().all()
        assert experts.generate(BATCH[:3], **settings).shape == (3, WIDTH + 2)
        if routing in ("compete", "hybrid"):
            assert experts.route(BATCH[:8]).count(None) <= 3
    with pytest.raises(ConfigError, match="token by token"):
        experts.route(BATCH)


def test_nothing_is_read_before_it_may_be() -> None:
    experts = with_kinds(0, 1)
    other = BATCH.clone()
    other[:, 8:] = (other[:, 8:] + 5) % 31
    with torch.no_grad():
        assert torch.equal(experts(other).logits[:, :7], said(experts)[:, :7])
    reader = PrefixReader(experts.model, experts.using, layer=experts.feature_layer)
    assert experts.router.route(reader.read(other[:, :8])).names == tuple(experts.route(BATCH))


def test_the_loss_is_that_of_the_logits_and_so_looks_at_nothing_later() -> None:
    experts = with_kinds(0, 1)
    labels = BATCH.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        found = experts(BATCH, labels=labels)
    logits, targets = found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.equal(found.logits, said(experts))
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(logits, targets))
    with pytest.raises(ConfigError, match="leave out logits_to_keep"):
        experts(BATCH, logits_to_keep=1)


def test_what_cannot_be_chosen_is_refused() -> None:
    experts = with_kinds(0)
    with pytest.raises(ConfigError, match="no routing 'competes'; did you mean"):
        experts.routing = "competes"
    with pytest.raises(ConfigError, match="prefix_tokens is 1: nothing can be told"):
        experts.prefix_tokens = 1
    with pytest.raises(ConfigError, match="no LoRA expert 'x'"):
        experts.decide(BATCH, before=["x"] * len(BATCH))
    with pytest.raises(ConfigError, match="no LoRA expert 'x'"):
        experts.calibrate("x", text(0, 64))
    with pytest.raises(ConfigError, match="3 held-out rows"):
        experts.add("new")
        experts.calibrate("new", text(1, 12))
