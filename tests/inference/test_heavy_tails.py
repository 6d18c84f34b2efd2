"""Noise with a power law's tails: its density and draws, and which data it is for."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.objectives.unnormalised.heavy_tails import StudentTNoise, heavy_tailed
from inference.objectives.unnormalised.noise import noise_from_config
from inference.runtime.generators import scoped_seed

FACTOR = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
LAWS = {
    "laplace": dist.Laplace(0.0, 1.0),
    "logistic": dist.Logistic(0.0, 1.0),
    "cauchy": dist.Cauchy(3.0, 1.0),
    "lognormal": dist.LogNormal(0.0, 1.5),
    "t": dist.StudentT(2.0),
    "spike": dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.9, 0.1])), dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([0.2, 3.0]))
    ),
}
LIGHT = {
    "normal": dist.Normal(5.0, 2.0),
    "uniform": dist.Uniform(0.0, 1.0),
    "clusters": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-3.0, 3.0]), torch.ones(2))
    ),
}


def rows(law: dist.Distribution, num: int, seed: int = 0) -> Tensor:
    with scoped_seed(seed):
        return law.sample((num,))[:, None]


def test_density_and_draws_are_those_of_the_t_law() -> None:
    noise = StudentTNoise(torch.tensor([1.0, -2.0]), FACTOR, 3.0)
    law = dist.MultivariateStudentT(torch.tensor(3.0), torch.tensor([1.0, -2.0]), FACTOR)
    with scoped_seed(0):
        drawn, expected = noise.draw(100_000), law.sample((100_000,))
    torch.testing.assert_close(noise.log_prob(drawn), law.log_prob(drawn), rtol=1e-4, atol=1e-4)
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    for direction in (torch.tensor([1.0, 0.0]), torch.tensor([0.6, -0.8])):
        found, wanted = ((v @ direction).quantile(levels) for v in (drawn, expected))
        torch.testing.assert_close(found, wanted, rtol=0.06, atol=0.03)
    again = noise_from_config("StudentTNoise", noise.config(), noise.state_dict())
    assert torch.equal(again.log_prob(drawn), noise.log_prob(drawn))


def test_fit_finds_location_scale_and_tails() -> None:
    with scoped_seed(0):
        x = dist.MultivariateStudentT(torch.tensor(4.0), torch.tensor([1.0, -2.0]), FACTOR).sample((5000,))
    noise = StudentTNoise.fit(1000 * x, inflation=1.0)
    torch.testing.assert_close(noise.mean / 1000, torch.tensor([1.0, -2.0]), rtol=0, atol=0.06)
    torch.testing.assert_close(noise.factor / 1000, FACTOR, rtol=0, atol=0.05)
    assert 1.5 <= float(noise.degrees) <= 3.0  # heavier than the data's four


@pytest.mark.parametrize("name", [*LAWS, *LIGHT])
def test_which_data_have_heavy_tails(name: str) -> None:
    x = rows({**LAWS, **LIGHT}[name], 2000)
    assert heavy_tailed(x) is (name in LAWS)
    assert heavy_tailed(1e4 * x - 3e4) is (name in LAWS)  # in whatever units


def test_constant_and_few_rows_have_no_heavy_tails() -> None:
    cauchy = rows(LAWS["cauchy"], 100)
    assert heavy_tailed(cauchy) and not heavy_tailed(cauchy[:19])
    assert not heavy_tailed(cauchy[:1])
    assert not heavy_tailed(torch.ones(50, 1)) and not heavy_tailed(torch.zeros(100, 3))
    assert not heavy_tailed(torch.cat([cauchy, torch.ones(100, 1)], 1))
