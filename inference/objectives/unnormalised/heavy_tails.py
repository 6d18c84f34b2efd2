"""Noise with tails of a power law, and whether data have such tails."""

import math
from typing import Self

import torch
from torch import Tensor

from inference.objectives.unnormalised.noise import Noise, _rows, cholesky_of, positive

__all__ = ["StudentTNoise", "heavy_tailed"]

_DEGREES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0)
_HEAVY = 10.0  # degrees of freedom up to which a normal of 1.3 times the standard deviation lets the weights collapse
_EM_STEPS = 40
_FEWEST, _MOST = 20, 5000  # rows that are looked at


class StudentTNoise(Noise):
    """A multivariate t law; ``fit`` is its maximum likelihood, with half the degrees of freedom and a wider scale.

    Args:
        mean: location ``(*event,)``.
        factor: Cholesky factor of the scale matrix of the flattened event, ``(dim, dim)``.
        degrees: of freedom; the density falls with their power plus the dimension.
    """

    mean: Tensor
    factor: Tensor
    inverse: Tensor
    degrees: Tensor

    def __init__(self, mean: Tensor, factor: Tensor, degrees: float) -> None:
        super().__init__(mean.shape)
        self.register_buffer("mean", mean.detach().clone().reshape(-1))
        self.register_buffer("factor", factor.detach().clone(memory_format=torch.contiguous_format))
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(self.factor, eye, upper=False)
        self.register_buffer("inverse", inverse.contiguous())
        self.register_buffer("degrees", mean.new_tensor(positive("degrees", degrees)))

    @classmethod
    def fit(cls, x: Tensor, inflation: float = 1.3) -> Self:
        """The law for data ``(row, *event)``: tails heavier than theirs, a scale of ``inflation`` times theirs."""
        _, mean, factor, degrees = _best(x)
        return cls(
            mean.to(x.dtype).reshape(x.shape[1:]),
            positive("inflation", inflation) * factor.to(x.dtype),
            max(degrees / 2, 1.0),
        )

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        z = torch.randn(num, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        half = (self.degrees / 2).expand(num, 1)
        weight = torch._standard_gamma(half) / half  # chi-squared over its degrees of freedom
        return (self.mean + (z / weight.sqrt()) @ self.factor.T).reshape(num, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        return _log_density(_rows(x) - self.mean, self.inverse, self.degrees)


def _log_density(centred: Tensor, inverse: Tensor, degrees: Tensor) -> Tensor:
    dim = centred.shape[1]
    square = (centred @ inverse.T).square().sum(1)
    power = (degrees + dim) / 2
    constant = power.lgamma() - (degrees / 2).lgamma() - dim / 2 * (degrees * math.pi).log()
    return constant + inverse.diagonal().log().sum() - power * (square / degrees).log1p()


def _maximum_likelihood(x: Tensor, degrees: float) -> tuple[float, Tensor, Tensor, float]:
    """Mean log-density, location, factor of the scale and degrees of freedom of a t law with these, by expectation
    maximisation (Liu and Rubin, Statistica Sinica 5, 1995) from the medians.
    """
    mean = x.median(0).values
    spread = (x - mean).abs().median(0).values
    factor = torch.where(spread > 0, spread, x.std(0)).clamp(min=1e-300).diag()
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    nu = x.new_tensor(degrees)
    for _ in range(_EM_STEPS):
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        square = ((x - mean) @ inverse.T).square().sum(1, keepdim=True)
        weight = (degrees + x.shape[1]) / (degrees + square)
        mean = (weight * x).sum(0) / weight.sum()
        centred = x - mean
        factor = cholesky_of((weight * centred).T @ centred / len(x), mean)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return float(_log_density(x - mean, inverse, nu).mean()), mean, factor, degrees


def heavy_tailed(x: Tensor) -> bool:
    """Whether a t law of at most ten degrees of freedom fits data ``(row, *event)`` better than one of thirty.

    So it is of data of logistic, Laplace's, Cauchy's and log-normal laws, and not of normal, uniform or clustered ones.
    Fewer than twenty rows, and rows with a constant column, do not tell.
    """
    flat = _rows(x)
    if len(flat) < _FEWEST or not bool((flat.amax(0) > flat.amin(0)).all()):
        return False
    return _best(x)[3] <= _HEAVY


def _best(x: Tensor) -> tuple[float, Tensor, Tensor, float]:
    flat = _rows(x)[:_MOST].double()
    return max((_maximum_likelihood(flat, degrees) for degrees in _DEGREES), key=lambda found: found[0])
