"""Pareto smoothing against ArviZ and against laws whose tail is known."""

import math

import arviz
import pytest
import torch

from inference.results.pareto import pareto_k, smooth_weights
from inference.runtime.generators import generator, scoped_seed


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("count", [25, 300, 5000])
def test_it_is_arvizs(spread, count):
    psislw = getattr(arviz, "psislw", None)
    if psislw is None:
        pytest.skip("ArviZ 1.x has the function elsewhere")
    log_weights = spread * torch.randn(count, generator=generator(count, "weights"), dtype=torch.float64) - 700
    smoothed, k = smooth_weights(log_weights)
    expected, expected_k = psislw(log_weights.numpy())
    assert k == pytest.approx(float(expected_k), abs=1e-10)
    torch.testing.assert_close(
        smoothed - smoothed.logsumexp(0), torch.as_tensor(expected), rtol=0, atol=1e-10
    )  # ArviZ's weights are normalised
    # the tail is smoothed in place, the rest is as it was, and no weight exceeds the largest
    assert smoothed.max() <= log_weights.max() and (smoothed == log_weights).sum() >= 0.7 * count


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_shape_of_a_pareto_law(k):
    uniform = torch.rand(100_000, generator=generator(0, "pareto"), dtype=torch.float64)
    # 950 tail draws: the estimator's standard deviation is (1 + k) / sqrt(950), at most 0.062
    assert pareto_k(-k * torch.log(uniform)) == pytest.approx(k, abs=4 * (1 + k) / math.sqrt(950))


@pytest.mark.parametrize(("step", "count"), [(1.2, 1000), (1.6, 5000), (1.2, 20_000)])
def test_the_shape_of_weights_with_ties(step, count):
    """Geometric draws, P(z >= n) = 2^-n, with weights step^z: the index is log 2 / log step, which is 1 / k."""
    draws = torch.distributions.Geometric(torch.tensor(0.5, dtype=torch.float64))
    with scoped_seed(0):
        log_weights = math.log(step) * draws.sample(torch.Size((count,)))
    k = math.log(step) / math.log(2)
    # as above, for 3 sqrt(count) draws of the tail; with the ties left, k comes out above 300
    assert pareto_k(log_weights) == pytest.approx(k, abs=4 * (1 + k) / math.sqrt(3 * math.sqrt(count)))


def test_bounded_weights_with_ties_have_no_tail():
    with scoped_seed(0):
        counts = torch.poisson(torch.full((5000,), 3.9, dtype=torch.float64))
    assert pareto_k(math.log(3 / 3.9) * counts) < 0.1  # weights of Poisson(3) against Poisson(3.9), largest at zero


def test_extreme_weights():
    equal = torch.zeros(100)
    assert pareto_k(equal) == -math.inf and torch.equal(smooth_weights(equal)[0], equal)
    assert pareto_k(torch.full((100,), -math.inf)) == math.inf
    assert pareto_k(torch.tensor([math.nan] + [0.0] * 50)) == math.inf
    few = torch.full((200,), -math.inf)
    few[:40] = torch.randn(40, generator=generator(1, "few"))
    smoothed, k = smooth_weights(few)
    assert math.isfinite(k) and not smoothed.isnan().any() and (smoothed[40:].exp() == 0).all()
    for bad in (torch.zeros(24), torch.zeros(3, 40)):
        with pytest.raises(ValueError, match="at least 25 draws"):
            smooth_weights(bad)
