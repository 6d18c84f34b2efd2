"""Priors on an unnormalised model's parameters: the point of largest posterior density, against closed forms."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from inference import CompositionalLikelihood, fit
from inference.objectives.unnormalised import NoiseContrastive
from inference.runtime.generators import scoped_seed
from tests.inference.unnormalised_cases import DOUBLE, data, normal_noise

SPREAD = 0.3  # of the prior on theta
X = data(20, 1.0, 1.0, 20)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


class WithPrior(PyroModule):
    """``l(x) = theta x - k x^2 / 2``, theta ~ N(0, 0.3^2), k ~ LogNormal(0, 0.1^2)."""

    theta: Any

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=DOUBLE)
        self.theta, self.rows = PyroSample(dist.Normal(zero, SPREAD)), rows
        self.spread = dist.LogNormal(zero, 0.1)

    def forward(self, x: Tensor) -> None:
        theta, k = self.theta, pyro.sample("k", self.spread)
        rows: dict[str, Any] = {} if self.rows is None else {"subsample": torch.arange(len(x))}
        with pyro.plate("data", self.rows or len(x), **rows):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", theta * x - k * x**2 / 2)


def largest(rows: int) -> tuple[Tensor, float]:
    """theta and k that maximise mean log-likelihood + log prior / rows on a grid, and minus the maximum."""
    theta = torch.linspace(0.3, 1.5, 601, dtype=DOUBLE)[:, None]
    k = torch.linspace(0.7, 1.3, 601, dtype=DOUBLE)
    log_z = theta**2 / (2 * k) + 0.5 * (2 * math.pi / k).log()
    value = theta * X.mean() - k * X.square().mean() / 2 - log_z
    prior = dist.Normal(0.0, SPREAD).log_prob(theta) + dist.LogNormal(0.0, 0.1).log_prob(k)
    value = value + prior / rows
    place = divmod(int(value.argmax()), 601)
    return torch.stack([theta[place[0], 0], k[place[1]]]), -float(value.max())


@pytest.mark.parametrize("of_plate", [False, True])
def test_the_point_of_largest_posterior_density(of_plate: bool) -> None:
    """The prior's weight is one over all data, given or of the plate; twenty data move theta from 1.35 to 0.81."""
    model = WithPrior(20 if of_plate else None)
    objective = CompositionalLikelihood(model, normal_noise(0.5, 1.5), 128, num_data=None if of_plate else 20)
    size = 10 if of_plate else None  # a plate of twenty rows of which ten are shown
    found = fit(objective, X, batch_size=size, num_steps=400, lr=0.03, average_last=0.5, progress=False)
    best, loss = largest(20)
    point = objective.point_estimate
    assert set(point) == {"theta", "k"}
    assert abs(float(point["theta"] - best[0])) < 0.03 and abs(float(point["k"] - best[1])) < 0.02
    assert abs(float(X.mean()) - float(best[0])) > 0.3
    theta, k = float(point["theta"]), float(point["k"])
    log_z = theta**2 / (2 * k) + 0.5 * math.log(2 * math.pi / k)
    assert objective.log_partition(20_000).value == pytest.approx(log_z, abs=0.03)  # without the prior's density
    assert float(found.losses[-200:].mean()) == pytest.approx(loss, abs=0.01)


def test_priors_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"has priors \(theta, k\).*give num_data="):
        CompositionalLikelihood(WithPrior(), normal_noise(0.5, 1.5), 8)(X)
    with pytest.raises(ValueError, match="NoiseContrastive learns parameters alone"):
        NoiseContrastive(WithPrior(), normal_noise(0.5, 1.5), 8)(X)
    with pytest.raises(ValueError, match="num_data must be"):
        CompositionalLikelihood(WithPrior(), normal_noise(0.5, 1.5), 8, num_data=0)

    def of_rows(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", -((x - shift) ** 2))

    with pytest.raises(ValueError, match=r"latent sites \['shift'\] in the rows"):
        CompositionalLikelihood(of_rows, normal_noise(0.5, 1.5), 8, num_data=20)(X)

    def of_counts(x: Tensor) -> None:
        count = pyro.sample("count", dist.Poisson(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", -count * x**2)

    with pytest.raises(ValueError, match="'count' is discrete"):
        CompositionalLikelihood(of_counts, normal_noise(0.5, 1.5), 8, num_data=20)(X)
