"""Noise of energy models: laws against sums and closed forms, what is chosen for data, noise of one's own."""

import math
from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference import SamplerWarning
from inference.objectives.unnormalised.noise import noise_from_config
from inference.runtime.generators import generator, scoped_seed
from ppl_models import EnergyModel
from ppl_models.compositional_ebm.noise import (
    BernoulliNoise,
    BoxNoise,
    DefensiveMixture,
    GaussianNoise,
    HalfLineNoise,
    NegativeBinomialNoise,
    PoissonNoise,
    as_noise,
    auto_noise,
)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


@pytest.mark.parametrize(("mean", "sd"), [(200.0, 8.0), (5000.0, 30.0)])
def test_counts_that_vary_less_than_poisson_ones_keep_their_digits(mean: float, sd: float) -> None:
    """Large terms of log q that nearly cancel: whole nats were lost in single precision."""
    counts = (mean + sd * torch.randn(500, generator=torch.Generator().manual_seed(0))).round()
    for noise in (NegativeBinomialNoise.fit(counts), PoissonNoise.fit(counts)):
        double = noise_from_config(type(noise).__name__, noise.config(), noise.state_dict()).double()
        torch.testing.assert_close(noise.log_prob(counts), double.log_prob(counts.double()).float(), rtol=1e-5, atol=0)


def test_automatic_noise_follows_the_data() -> None:
    assert isinstance(auto_noise(torch.randn(100, 2)), GaussianNoise)
    assert isinstance(auto_noise(torch.randn(500, 8)), DefensiveMixture)
    assert isinstance(auto_noise(torch.tensor([[0.0, 1.0], [1.0, 1.0]])), BernoulliNoise)
    assert isinstance(auto_noise(torch.tensor([3.0, 0.0, 4.0])), PoissonNoise)
    assert isinstance(auto_noise(torch.tensor([3.0, 0.0, 17.0])), NegativeBinomialNoise)
    assert isinstance(auto_noise(torch.rand(10), constraints.greater_than_eq(0.0)), HalfLineNoise)
    assert isinstance(auto_noise(torch.rand(10), constraints.interval(0.0, 1.0)), BoxNoise)


def test_counts_that_vary_more_than_poisson_ones(tmp_path: Path) -> None:
    """Counts of mean 20 and variance 220, on which Poisson noise collapses: the mean log-likelihood is their law's."""
    law = dist.GammaPoisson(2.0, 0.1)
    x = law.sample(torch.Size([600, 1]))
    ebm = EnergyModel(event_shape=(1,))
    ebm.fit(x, num_steps=200, progress=False)
    assert ebm.log_prob(x).mean().item() == pytest.approx(float(law.log_prob(x).mean()), abs=0.05)
    ebm.save(tmp_path / "counts")
    assert torch.equal(EnergyModel.load(tmp_path / "counts").log_prob(x), ebm.log_prob(x))


def test_automatic_noise_follows_narrow_components() -> None:
    """Five normals of a tenth of their centres' spread in six dimensions: within 1.3 nats of the truth on fresh rows.

    A ridge of 5 % of the data's variance, whatever the rows, left it 2.8 nats away.
    """
    draw = generator(4, "narrow")
    centres = torch.randn(5, 6, generator=draw)
    rows = torch.randint(5, (4000,), generator=draw)
    x = centres[rows] + 0.1 * torch.randn(4000, 6, generator=draw)
    exact = dist.Normal(centres, 0.1).to_event(1).log_prob(x[3000:, None]).logsumexp(1) - math.log(5)
    gap = float((exact - auto_noise(x[:3000]).log_prob(x[3000:])).mean())
    assert 0 < gap < 1.3


def test_whole_numbers_on_a_large_scale_are_real_data() -> None:
    """Prices with a correlation and losses below zero get a normal law; few or coarse values stay counts or labels."""
    z = torch.randn(2000, 2, generator=generator(3, "prices"))
    prices = (torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.4 * z[:, 1]], 1) * 40_000).round()
    assert isinstance(auto_noise(prices), GaussianNoise) and isinstance(auto_noise(prices.long()), GaussianNoise)
    assert isinstance(auto_noise(prices.abs(), constraints.nonnegative_integer), NegativeBinomialNoise)
    assert isinstance(auto_noise((prices / 1000).round() * 1000), GaussianNoise)  # 40 steps of a thousand
    assert isinstance(auto_noise((z.abs() * 20).round()), NegativeBinomialNoise)  # 12 steps
    assert isinstance(auto_noise((z.abs() * 2).round() * 1000), NegativeBinomialNoise)  # labels that happen to be large
    with pytest.raises(ValueError, match="whole numbers and the noise is continuous"):
        as_noise(GaussianNoise.fit(z), (z * 10).round())
    assert isinstance(as_noise(GaussianNoise.fit(prices), prices), GaussianNoise)
    assert isinstance(as_noise(PoissonNoise.fit(prices.abs()), prices.abs()), PoissonNoise)  # asked for is given
    with pytest.warns(SamplerWarning, match=r"coordinates \[0\] are whole numbers on a large scale and \[1\]"):
        auto_noise(torch.stack([prices[:, 0].abs(), (2 * z[:, 1]).abs().round()], 1))
    rain = torch.where(z > 0, z, 0.0)
    with pytest.warns(SamplerWarning, match=r"coordinates \[0, 1\] take one value .* 0 in 5\d%"):
        as_noise("auto", rain)


def test_a_density_of_whole_numbers_has_their_probabilities() -> None:
    """Counts of standard deviation 60, fitted as real data and as counts: the same likelihood, their law's."""
    law = dist.GammaPoisson(9.0, 0.05)
    x = law.sample(torch.Size([4000, 1]))
    found = []
    for support in (None, constraints.independent(constraints.nonnegative_integer, 1)):
        ebm = EnergyModel(event_shape=(1,), support=support)
        ebm.fit(x, num_steps=300, progress=False)
        found.append(float(ebm.log_prob(x).mean()))
        assert isinstance(ebm.noise, NegativeBinomialNoise if support is not None else GaussianNoise)
    exact = float(law.log_prob(x).mean())
    assert found == pytest.approx([exact, exact], abs=0.02)


@pytest.mark.parametrize("given", ["distribution", "guide"])
def test_noise_of_ones_own_may_adapt(given: str) -> None:
    law = dist.Normal(torch.zeros(2), 2.0).to_event(1)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.ones(2))

        def forward(self) -> Tensor:
            drawn: Tensor = pyro.sample("x", dist.Normal(self.loc, 2.0).to_event(1))
            return drawn

    guide = Guide()
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) - 1
    ebm = EnergyModel(event_shape=(2,))
    ebm.fit(x, noise=law if given == "distribution" else guide, num_steps=30, adapt="data", progress=False)
    assert torch.isfinite(ebm.log_prob(x)).all()
    if given == "guide":  # the noise has learned, and the law that it started from is the model's
        assert ebm.tilt is not None and not torch.equal(guide.loc, torch.ones(2))
        assert all(torch.equal(p, torch.ones(2)) for p in ebm.tilt.parameters())
