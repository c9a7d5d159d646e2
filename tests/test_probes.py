"""Probes: what is measured is what is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import build, dump
from cambia.data.batches import IGNORED, Batch
from cambia.probes import (
    SLICES,
    DomainSlice,
    FunctionSlice,
    LengthSlice,
    Slice,
    TokenSlice,
    bits_per_byte,
    slice_losses,
    token_losses,
)
from cambia.training.settings import EvaluationConfig
from tests.conftest import tiny


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for source in ("a", "b"):
        ids = torch.randint(0, 31, (3, 8), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, :3] = IGNORED
        found.append(Batch(ids[:, :-1], targets, 20, source))
    return found


def odd(batch: Batch) -> torch.Tensor:
    """A slice by a function: targets that are odd."""
    return batch.targets % 2 == 1


EXAMPLES: dict[str, Slice] = {
    "length": LengthSlice(name="late", at_least=4),
    "domain": DomainSlice(name="b"),
    "tokens": TokenSlice(name="few", tokens=[1, 2, 3, 4, 5]),
    "function": FunctionSlice(name="odd", function="tests.test_probes:odd"),
}


def test_every_kind_of_slice_is_shown_here() -> None:
    assert EXAMPLES.keys() == SLICES.keys()


@pytest.mark.parametrize("kind", SLICES)
def test_a_slice_and_the_rest_are_the_whole(kind: str) -> None:
    model, item = tiny(), EXAMPLES[kind]
    found = slice_losses(model, batches(), [item])
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for batch, losses in token_losses(model, batches()):
        mask = item.mask(batch)
        assert mask.shape == batch.targets.shape and mask.dtype == torch.bool
        for place in (batch.targets != IGNORED).nonzero().tolist():
            inside = bool(mask[tuple(place)])
            sums[inside] += losses[tuple(place)].item()
            counts[inside] += 1
    assert min(counts.values()) > 0
    assert found[f"slice_loss/{item.name}"] == pytest.approx(sums[True] / counts[True], rel=1e-5)
    assert found[f"rest_loss/{item.name}"] == pytest.approx(sums[False] / counts[False], rel=1e-5)
    whole = bits_per_byte(model, batches())
    assert whole.nats == pytest.approx(sum(sums.values()), rel=1e-5)
    assert whole.tokens == sum(counts.values())


def test_a_slice_without_targets_is_not_measured() -> None:
    found = slice_losses(tiny(), batches(), [TokenSlice(name="none", tokens=[99])])
    assert found.keys() == {"rest_loss/none"}


def test_slices_are_settings_and_name_what_is_measured() -> None:
    tree = {
        "slices": [
            {"type": "tokens", "name": "digits", "tokens": [48, 49]},
            {"type": "domain", "name": "cpp"},
        ],
        "probes": {"mood": "my_module:mood"},
    }
    config = build(EvaluationConfig, tree)
    assert config.slices == [TokenSlice(name="digits", tokens=[48, 49]), DomainSlice(name="cpp")]
    assert dump(config)["slices"][1] == {"type": "domain", "name": "cpp", "task": ""}
    names = {"validation_loss", "slice_loss/digits", "rest_loss/digits", "slice_loss/cpp", "mood"}
    assert names <= set(config.measured)
    config.every_steps = None
    assert config.measured == []


def test_likelihood_without_bytes_has_no_bits_per_byte() -> None:
    plain = [Batch(b.input_ids, b.targets, 0, b.source) for b in batches()]
    found = bits_per_byte(tiny(), plain)
    assert math.isnan(found.bits_per_byte) and found.nats_per_token > 0


def test_the_model_stays_in_its_mode() -> None:
    model: Any = tiny().train()
    bits_per_byte(model, batches())
    assert model.training


# ---- answers that are exactly right --------------------------------------------------------------


def answered(model: Any, *, spoiled: list[int]) -> Batch:
    """Two rows, each of two questions of 4 tokens with what the model says to it, 3 tokens; some spoiled."""
    rows = torch.zeros(2, 0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    for i in range(2):
        asked = torch.randint(1, 31, (2, 4), generator=generator)
        rows = model.generate(
            torch.cat([rows, asked], dim=1),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
        for row in range(2):
            if 2 * i + row in spoiled:  # its last token: what follows reads it, and answers that
                rows[row, -1] = (rows[row, -1] + 1) % 31
    targets = rows[:, 1:].clone()
    targets[:, :3] = targets[:, 6:10] = IGNORED
    return Batch(rows[:, :-1], targets, 20, "a")


@pytest.mark.parametrize("spoiled", [[], [0], [1, 2], [0, 1, 2, 3]])
def test_an_answer_is_exact_where_greedy_decoding_writes_it(spoiled: list[int]) -> None:
    model: Any = tiny().eval()
    model.generation_config.eos_token_id = None
    found = bits_per_byte(model, [answered(model, spoiled=spoiled)], exact=True)
    assert (found.exact, found.examples) == (4 - len(spoiled), 4)
    assert found.accuracy == 1 - len(spoiled) / 4


@given(st.lists(st.booleans(), min_size=14, max_size=14), st.lists(st.booleans(), min_size=14, max_size=14))
def test_answers_are_stretches_of_at_least_two_targets(counted: list[bool], wrong: list[bool]) -> None:
    model: Any = tiny().eval()
    ids = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    first = model(input_ids=ids).logits.argmax(-1)
    targets = torch.where(torch.tensor(wrong).view(2, 7), (first + 1) % 31, first)
    targets[~torch.tensor(counted).view(2, 7)] = IGNORED
    right = examples = 0
    for row in range(2):
        marks = "".join(
            " " if not counted[i] else "x" if wrong[i] else "." for i in range(7 * row, 7 * row + 7)
        )
        answers = [answer for answer in marks.split() if len(answer) > 1]
        examples += len(answers)
        right += sum("x" not in answer for answer in answers)
    found = bits_per_byte(model, [Batch(ids, targets, 14, "a")], exact=True)
    assert (found.exact, found.examples) == (right, examples)


def test_answers_are_counted_in_the_same_pass_and_only_when_asked() -> None:
    model: Any = tiny()
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    plain = bits_per_byte(model, batches())
    counted = bits_per_byte(model, batches(), exact=True)
    assert len(passes) == 2 * len(batches())
    assert (plain.nats, plain.tokens, plain.bytes) == (counted.nats, counted.tokens, counted.bytes)
    assert plain.examples == 0 and plain.accuracy is None
    assert counted.examples == 6 and counted.accuracy == counted.exact / 6
