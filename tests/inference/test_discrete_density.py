"""A Pyro model as the density of its discrete site."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.potential.discrete_density import DiscreteDensity

Y = torch.tensor([0.3, -1.2, 2.0])
MEANS = torch.tensor([-1.0, 0.0, 2.0])


def in_a_plate(y: torch.Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(MEANS[z], 1.0), obs=y)


def as_a_vector(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1.0).expand([3]).to_event(1), obs=y)


def test_the_joint_of_each_row_and_the_evidence() -> None:
    density = DiscreteDensity(in_a_plate, "z", (Y,))
    assert density.cardinalities.tolist() == [3, 3, 3]
    rows = torch.cartesian_prod(*[torch.arange(3)] * 3)
    prior = torch.tensor([0.2, 0.3, 0.5]).log()
    terms = prior[rows] + dist.Normal(MEANS[rows], 1.0).log_prob(Y)
    assert torch.allclose(density(rows), terms.sum(1), atol=1e-6)
    evidence = (prior + dist.Normal(MEANS, 1.0).log_prob(Y[:, None])).logsumexp(1).sum()
    assert abs(float(density(rows).logsumexp(0) - evidence)) < 1e-5
    vector = DiscreteDensity(as_a_vector, "z", (Y,))
    assert vector.cardinalities.tolist() == [2, 2]
    row = torch.tensor([[1, 0]])
    expected = torch.tensor([0.3, 0.4]).log().sum() + dist.Normal(1.0, 1.0).log_prob(Y).sum()
    assert torch.allclose(vector(row), expected)


def test_models_that_are_none() -> None:
    def two() -> None:
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'w'"):
        DiscreteDensity(two, "z")
    with pytest.raises(ValueError, match="latent sites are"):
        DiscreteDensity(in_a_plate, "q", (Y,))
    with pytest.raises(ValueError, match="no finite list"):
        DiscreteDensity(lambda: pyro.sample("z", dist.Poisson(3.0)), "z")
    with pytest.raises(ValueError, match="law of its own"):
        DiscreteDensity(lambda: pyro.sample("z", dist.OneHotCategorical(torch.ones(3))), "z")
    with pytest.raises(TypeError, match="callable"):
        DiscreteDensity(3, "z")  # type: ignore[arg-type]
