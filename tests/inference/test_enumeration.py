"""Masks and scales of discrete sites that are summed out, against sums by hand and Pyro's bound."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from inference.potential import LogDensity, Potential
from tests.inference import zoo


def mixture_of_rows(scale: float = 1.0, mask: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=zoo.F64), 2.0))
    y = torch.tensor([0.4, -1.0, 2.0], dtype=zoo.F64)
    with pyro.plate("row", 3), poutine.scale(scale=scale), poutine.mask(mask=True if mask is None else mask):
        z = pyro.sample("z", dist.Categorical(torch.stack([p, 1 - p])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(2 * z.to(y) - 1, 1.0), obs=y)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])])
def test_masks_and_scales_of_a_site_that_is_summed_out(scale, mask):
    """A masked row tells nothing (it counted as log K), and a scale counts rows; Pyro's and our own bound agree."""
    density = LogDensity(mixture_of_rows, (scale, mask))
    p = torch.tensor(0.3, dtype=zoo.F64)
    y = torch.tensor([0.4, -1.0, 2.0], dtype=zoo.F64)
    rows = torch.logaddexp(
        p.log() + dist.Normal(-1.0, 1.0).log_prob(y), (1 - p).log() + dist.Normal(1.0, 1.0).log_prob(y)
    )
    kept = rows if mask is None else rows[mask]
    prior = dist.Beta(torch.tensor(2.0, dtype=zoo.F64), 2.0).log_prob(p)
    jacobian = (p * (1 - p)).log()
    torch.testing.assert_close(density(p.logit()[None]), prior + jacobian + scale * kept.sum())

    def guide(*_: object) -> None:
        pyro.sample("p", dist.Delta(p, log_density=0.0))

    bound = -TraceEnum_ELBO(max_plate_nesting=1).loss(mixture_of_rows, guide, scale, mask)
    assert bound == pytest.approx(float(prior + scale * kept.sum()))


def test_the_evidence_of_partly_observed_flags():
    """What ``obs_mask`` leaves to be summed out has its observed elements masked."""
    y = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=zoo.F64)
    mask = torch.tensor([True, True, True, True, False, False])

    def model():
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=zoo.F64), 2.0))
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=mask)

    z = torch.linspace(-12, 12, 2001, dtype=zoo.F64)[:, None]
    evidence = torch.trapezoid((-Potential(LogDensity(model))(z)).exp(), z[:, 0]).log()
    expected = math.lgamma(5) + math.lgamma(3) - math.lgamma(8) + math.log(6)  # three ones and a zero seen
    assert float(evidence) == pytest.approx(expected, abs=1e-6)


def test_scales_are_one_in_any_order_of_handlers():
    """Their products differ in the last digit; a tensor of one number is one."""

    def model(scale):
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=zoo.F64), 2.0))
        rows = pyro.plate("row", 12, subsample_size=7)
        with rows, poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Bernoulli(p))
        with poutine.scale(scale=scale), rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(7, dtype=zoo.F64))

    densities = [LogDensity(model, (s,)) for s in (0.1, torch.tensor([0.1]))]
    number, tensor = (float(d(torch.tensor([0.4], dtype=zoo.F64), d.minibatch())) for d in densities)
    assert math.isfinite(number) and number == pytest.approx(tensor, rel=1e-6)


@pytest.mark.parametrize("weights", [0.5, torch.tensor([1.0, 2.0])])
def test_sites_that_share_a_discrete_one_have_one_scale(weights):
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("row", 2):
            z = pyro.sample("z", dist.Bernoulli(p))
            with poutine.scale(scale=weights):
                pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"'z' is summed out, and .*poutine.scale"):
        LogDensity(model)
