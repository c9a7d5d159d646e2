"""Arrow: the direction is the singular vector, the weights are a softmax over the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.errors import ConfigError
from cambia.models.routing.arrow import ArrowRouter, top_direction


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_the_direction_is_the_first_right_singular_vector(inputs: int, outputs: int, rank: int) -> None:
    A, B = torch.randn(rank, inputs), torch.randn(outputs, rank)
    found = top_direction(A, B).double()
    product = B.double() @ A.double()
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    assert (product @ found).norm() == pytest.approx(torch.linalg.matrix_norm(product, 2).item(), rel=1e-5)


def test_a_newborn_points_nowhere() -> None:
    assert top_direction(torch.randn(2, 5), torch.zeros(4, 2)).eq(0).all()


def router(top_k: int, temperature: float = 1.0) -> ArrowRouter:
    arrow = ArrowRouter(top_k, temperature)
    for number, name in enumerate(("a", "b", "c")):
        A = torch.eye(3)[number : number + 1]
        arrow.add(name, {"layer": (A, torch.ones(2, 1))})
    return arrow


def test_weights_are_a_softmax_over_the_nearest_whichever_way_they_point() -> None:
    x = torch.tensor([[[1.0, -3.0, 2.0]], [[0.0, 0.5, 0.0]]])  # (2, 1, 3)
    sparse = router(2, 0.5).weights("layer", x)
    assert sparse.shape == (2, 1, 3) and (sparse.sum(-1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(sparse[0, 0], torch.tensor([0, *torch.softmax(torch.tensor([6.0, 4.0]), 0)]))
    assert router(1).weights("layer", x).argmax(-1).flatten().tolist() == [1, 1]
    torch.testing.assert_close(router(9).weights("layer", x), torch.softmax(x.abs(), -1))


def test_a_later_part_leaves_directions_alone_and_a_name_is_taken_once() -> None:
    arrow = router(1)
    before = {name: value.clone() for name, value in arrow.directions["layer"].items()}
    arrow.add("d", {"layer": (torch.randn(2, 3), torch.randn(2, 2))})
    assert arrow.names("layer") == ["a", "b", "c", "d"]
    assert all(arrow.directions["layer"][name].equal(value) for name, value in before.items())
    with pytest.raises(ConfigError, match="'a' already"):
        arrow.add("a", {"other": (torch.ones(1, 3), torch.ones(2, 1))})


def test_a_restored_one_gives_the_same_weights() -> None:
    ours, theirs = router(2), ArrowRouter(2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3)
    assert ours.weights("layer", x).equal(theirs.weights("layer", x))
