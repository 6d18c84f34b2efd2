"""Relevances of inputs: the prior's moments, the posterior against quadrature, and what can't have them."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

from inference import NUTS
from inference.results.diagnostics import mcse_mean
from inference.runtime.generators import scoped_seed
from ppl_models import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.laplace_evidence import tune_prior_by_evidence

LINEAR: dict[str, Any] = {"hidden": (), "relevance": 0.5, "noise_variance": 0.3, "standardise": False}


@pytest.mark.parametrize("prior", ["gaussian", "hierarchical", "flow"])
@pytest.mark.parametrize("parametrisation", ["centred", "noncentred"])
def test_relevances_multiply_the_rows_of_the_first_layer(prior: str, parametrisation: str) -> None:
    """With all else as it was: the same seed without relevances, whose sites come first, has the same W1 but for them.

    Their logarithms are independent normals of standard deviation 0.5, one a column of x and function.
    """
    options: dict[str, Any] = {"hidden": (4,), "prior": prior, "parametrisation": parametrisation}
    weights = {}
    for relevance in (None, 0.5):
        bnn = FunctionalPriorBNN(3, relevance=relevance, **options).double()
        with scoped_seed(0), pyro.plate("functions", 2000):
            trace = poutine.trace(bnn.prior).get_trace()
        weights[relevance] = trace.nodes["_RETURN"]["value"]
    r = trace.nodes["relevance"]["value"]
    assert r.shape == (2000, 3)
    torch.testing.assert_close(weights[0.5]["W1"], r.unsqueeze(-1) * weights[None]["W1"])
    torch.testing.assert_close(weights[0.5]["b1"], weights[None]["b1"])
    moments = torch.cov(r.log().T)
    error = 0.25 * math.sqrt(2 / 2000)
    assert (moments - 0.25 * torch.eye(3)).abs().max() < 4 * error
    assert (r.log().mean(0).abs() < 4 * 0.5 / math.sqrt(2000)).all()


def test_posterior_of_relevances_is_that_of_quadrature() -> None:
    """Given the relevances a linear network is a conjugate regression, so that theirs is a two-dimensional integral."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=g, dtype=torch.float64)
    y = 3 * x[:, :1] + 0.5 * torch.randn(30, 1, generator=g, dtype=torch.float64)
    bnn = FunctionalPriorBNN(2, **LINEAR)

    def careful(model: FunctionalPriorBNN) -> NUTS:
        return NUTS(model, target_accept_prob=0.95)

    posterior = bnn.fit(
        x, y, num_chains=4, warmup_steps=300, num_samples=500, thin=1, batch_size=None, sampler=careful, progress=False
    )
    z = torch.linspace(-6, 6, 121, dtype=torch.float64)
    r = (0.5 * torch.cartesian_prod(z, z)).exp()
    prior = torch.cartesian_prod(z, z).square().sum(-1) / -2
    covariance = 1 + 0.3 * torch.eye(30) + (x * r.square().unsqueeze(-2) / 2) @ x.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance).log_prob(y[:, 0])
    weight = torch.softmax(prior + evidence, 0)
    log_relevance = 0.5 * posterior.samples["eps_relevance"]
    exact = weight @ r.log()
    assert exact[0] - exact[1] > 0.5  # the second column says nothing of y
    assert ((log_relevance.mean((0, 1)) - exact).abs() < 4 * mcse_mean(log_relevance)).all()
    square = (log_relevance - exact).square()
    assert ((square.mean((0, 1)) - weight @ (r.log() - exact).square()).abs() < 4 * mcse_mean(square)).all()
    # What is predicted is by the weights with their relevances in them.
    slope = posterior.predict(torch.eye(2).double()).functions - posterior.predict(torch.zeros(2, 2)).functions
    expected = 0.5 * posterior.samples["eps_relevance"]
    torch.testing.assert_close(
        slope[..., 0], expected.exp() * posterior.samples["eps_W1"][..., 0] / math.sqrt(2), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"relevance": 0.0}, ValueError, "relevance must"),
        ({"relevance": "auto"}, TypeError, "relevance must"),
        ({"relevance": float("nan")}, ValueError, "relevance must"),
        (
            {"in_features": None, "network": "lenet5", "image_shape": (1, 28, 28), "relevance": 1.0},
            ValueError,
            "pixels",
        ),
    ],
)
def test_bad_relevances(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionalPriorBNN(**{"in_features": 2, **options})


def test_relevances_are_no_part_of_the_laplace_evidence() -> None:
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="without relevances"):
        tune_prior_by_evidence(FunctionalPriorBNN(2, relevance=1.0), x, x[:, 0])
