"""Distributions of features: sums that add up, densities as of a normal distribution, restored to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cambia.errors import ConfigError
from cambia.models.routing.gaussians import FeatureGaussian


def normal(rows: int, width: int, *, offset: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.randn(width, width, generator=generator)
    return (torch.randn(rows, width, generator=generator) @ turned + offset).float()


def fitted(features: Tensor) -> FeatureGaussian:
    gaussian = FeatureGaussian(features.shape[1])
    gaussian.observe(features)
    gaussian.seal()
    return gaussian


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([0.0, 1e4]))
def test_sums_of_batches_are_those_of_the_whole(sizes: list[int], offset: float) -> None:
    x = normal(sum(sizes) + 2, 4, offset=offset)
    apart = FeatureGaussian(4)
    for part in x.split([2, *sizes]):
        apart.observe(part)
    exact = x.double()
    assert apart.count == len(x)
    torch.testing.assert_close(apart.mean, exact.mean(0))
    centered = exact - exact.mean(0)
    torch.testing.assert_close(apart.scatter, centered.T @ centered, rtol=1e-9, atol=1e-6)


def test_the_density_is_that_of_a_normal_distribution() -> None:
    x = normal(400, 5, offset=3)
    gaussian = fitted(x)
    theirs = torch.distributions.MultivariateNormal(gaussian.mean, gaussian.covariance())
    torch.testing.assert_close(gaussian.log_density(x), theirs.log_prob(x.double()))


def test_the_shrinkage_is_that_of_oas() -> None:
    """Equation 23 of Chen et al. 2010, written out."""
    x = normal(12, 6).double()
    p, n = 6, 12
    s = torch.cov(x.T, correction=0)
    trace, square = s.trace(), (s @ s).trace()
    rho = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert 0.05 < rho < 1
    expected = (1 - rho) * s + rho * trace / p * torch.eye(p)
    torch.testing.assert_close(fitted(x.float()).covariance(), expected, rtol=1e-5, atol=1e-5)


def test_fewer_rows_than_dimensions_and_features_that_never_move_still_give_a_density() -> None:
    few = normal(3, 50)
    assert fitted(few).log_density(few).isfinite().all()
    still = torch.ones(4, 3)
    told = fitted(still).log_density(torch.cat([still[:1], still[:1] + 1]))
    assert told.isfinite().all() and told[0] > told[1]


def test_what_is_drawn_has_the_distribution() -> None:
    gaussian = fitted(normal(500, 4, offset=2))
    drawn = gaussian.draw(40_000, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(drawn.mean(0), gaussian.mean, atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), gaussian.covariance(), rtol=0.06, atol=0.15)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_restored_one_says_the_same_bits(sealed: bool) -> None:
    x = normal(30, 4)
    ours = FeatureGaussian(4)
    ours.observe(x)
    if sealed:
        ours.seal()
    theirs = FeatureGaussian(4)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.is_sealed == sealed
    if not sealed:
        for gaussian in (ours, theirs):
            gaussian.observe(x[:5] + 1)
            gaussian.seal()
    assert ours.log_density(x).equal(theirs.log_density(x))


def test_a_state_does_not_follow_the_one_that_it_is_of() -> None:
    gaussian = FeatureGaussian(2)
    gaussian.observe(torch.ones(3, 2))
    state = gaussian.state_dict()
    gaussian.observe(torch.zeros(3, 2))
    assert state["count"] == 3 and state["mean"].tolist() == [1, 1] and state["scatter"].eq(0).all()


def test_what_cannot_be_is_refused() -> None:
    gaussian = FeatureGaussian(2)
    gaussian.observe(torch.ones(0, 2))
    with pytest.raises(ConfigError, match="seal\\(\\) them first"):
        gaussian.log_density(torch.ones(1, 2))
    gaussian.observe(torch.ones(1, 2))
    with pytest.raises(ConfigError, match="at least 2 rows of text, and 1 came"):
        gaussian.seal()
    gaussian.observe(torch.zeros(1, 2))
    gaussian.seal()
    with pytest.raises(ConfigError, match="another Part"):
        gaussian.observe(torch.ones(1, 2))
