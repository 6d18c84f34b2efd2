"""Unnormalised models and noise with closed forms, for the tests of their objectives."""

import math
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from inference.runtime.generators import generator

DOUBLE = torch.float64


class Tilted(PyroModule):
    """``l(x) = theta x - x^2 / 2 + gauge``; Z = sqrt(2 pi) exp(theta^2 / 2 + gauge), the mean is theta."""

    def __init__(self, theta: float = 0.0, gauge: float = 0.0, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.theta, self.gauge = torch.nn.Parameter(torch.tensor(theta, dtype=dtype)), gauge

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", self.theta * x - x**2 / 2 + self.gauge)

    def log_z(self) -> float:
        return 0.5 * math.log(2 * math.pi) + self.theta.item() ** 2 / 2 + self.gauge


class Quadratic(PyroModule):
    """``l(x) = t1 x + t2 x^2``."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.t = torch.nn.Parameter(torch.zeros(2, device=device) - torch.arange(2, device=device) / 5)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", self.t[0] * x + self.t[1] * x**2)

    def moments(self) -> tuple[float, float, float]:
        """Mean, variance and log Z."""
        a, b = self.t.double().tolist()
        return -a / (2 * b), -1 / (2 * b), -(a**2) / (4 * b) + 0.5 * math.log(math.pi / -b)


class Nodes(TorchDistribution):  # type: ignore[misc, unused-ignore]
    """A quadrature as noise: its draws are the grid, its density makes the weights those of the rule."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, low: float, high: float, size: int) -> None:
        self.grid = torch.linspace(low, high, size, dtype=DOUBLE)
        self.value = -math.log((high - low) / (size - 1) * size)
        super().__init__(self.grid.shape, torch.Size(), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.grid

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.value)


def grid_noise(low: float, high: float, size: int = 2001) -> Any:
    law = Nodes(low, high, size)
    return lambda: pyro.sample("x", law)


def normal_noise(mean: float, scale: float, dtype: torch.dtype = DOUBLE) -> Any:
    law = dist.Normal(torch.tensor(mean, dtype=dtype), torch.tensor(scale, dtype=dtype))
    return lambda: pyro.sample("x", law)


def data(n: int, mean: float, scale: float, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return mean + scale * torch.randn(n, generator=generator(seed, "data"), dtype=dtype)
