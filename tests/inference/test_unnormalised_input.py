"""What the objectives for unnormalised models refuse."""

import pyro
import pyro.distributions as dist
import pytest
from pyro.distributions import constraints
from torch import Tensor

from inference import CompositionalLikelihood
from tests.inference.unnormalised_cases import Tilted, data, normal_noise


def test_bad_arguments() -> None:
    q = normal_noise(0.0, 1.0)
    with pytest.raises(ValueError, match="needs noise"):
        CompositionalLikelihood(Tilted(), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a Pyro callable"):
        CompositionalLikelihood(3, q)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_samples=1 with beta=1"):
        CompositionalLikelihood(Tilted(), q, 1, beta=1.0)
    with pytest.raises(ValueError, match="beta"):
        CompositionalLikelihood(Tilted(), q, beta=0.0)
    with pytest.raises(ValueError, match="correction must be one of"):
        CompositionalLikelihood(Tilted(), q, correction="storm")
    with pytest.raises(ValueError, match="adapt must be one of"):
        CompositionalLikelihood(Tilted(), q, adapt="yes")
    with pytest.raises(ValueError, match="noise_samples must be at least 1"):
        CompositionalLikelihood(Tilted(), q, 0)


def test_pairs_that_do_not_fit() -> None:
    x = data(20, 0.0, 1.0, 12)

    def other_site() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no sites of the model"):
        CompositionalLikelihood(Tilted(), other_site)(x)

    def counts() -> None:
        pyro.sample("x", dist.Poisson(1.0))

    with pytest.raises(ValueError, match="continuous and the noise is discrete"):
        CompositionalLikelihood(Tilted(), counts)(x)

    def narrow() -> None:
        pyro.sample("x", dist.Uniform(-0.1, 0.1))

    with pytest.raises(ValueError, match="rows of data lie outside the noise's support"):
        CompositionalLikelihood(Tilted(), narrow)(x)

    class Summed(Tilted):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", (self.theta * x - x**2 / 2).sum())

    with pytest.raises(ValueError, match="must sit inside the data plate"):
        CompositionalLikelihood(Summed(), normal_noise(0.0, 1.0))(x)


def test_an_argument_that_is_bound_already_takes_none_of_the_data() -> None:
    x, law = data(20, 0.0, 1.0, 12), dist.Normal(0.0, 1.5)

    def rows(x: Tensor | None = None) -> None:
        with pyro.plate("noise", 8 if x is None else len(x)):
            pyro.sample("x", law)

    bound = CompositionalLikelihood(Tilted(), lambda law=law: pyro.sample("x", law), 8)
    bound(x)
    assert bound.noise_samples == 8
    CompositionalLikelihood(Tilted(), rows, 32)(x)  # None is no value: the guide sees the rows
