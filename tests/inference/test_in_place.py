"""Models that fill tensors element by element are recorded, mapped over chains, and cost what a stack costs."""

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.potential import LogDensity, Potential

F64 = torch.float64
Y = torch.tensor([0.3, -0.4, 0.5, 1.2, 0.1, -0.7], dtype=F64)
V = torch.linspace(-1.0, 1.0, 6, dtype=F64)


def moving_average(a: Tensor, v: Tensor) -> Tensor:
    errors, last = torch.zeros(6, dtype=F64), torch.zeros((), dtype=F64)
    for t in range(6):
        last = Y[t] - a * last
        errors[t] = last
    return errors * v


def from_data(a: Tensor, v: Tensor) -> Tensor:
    filled = torch.zeros_like(Y)
    for t in range(1, 6):
        filled[t] = a * Y[t - 1]
    return filled + v


def triangle(a: Tensor, v: Tensor) -> Tensor:
    factor = torch.zeros(3, 3, dtype=F64)
    for i in range(3):
        for j in range(i + 1):
            factor[i, j] = v[i + j].exp() if i == j else a
    return torch.linalg.solve_triangular(factor, Y[:3, None], upper=False)


def jitter(a: Tensor, v: Tensor) -> Tensor:
    kernel = a.exp() * (-(v[:, None] - V).square()).exp()
    gram = kernel @ kernel.T
    gram.diagonal().add_(0.1)
    gram.view(-1)[::7] += a.square()
    return torch.linalg.cholesky(gram)


def slices(a: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(4, 6, dtype=torch.float32)
    out[0, 1:] = a * Y[:-1]
    out[1:3, :] = v
    out[3, ::2] = a
    out[:, -1] *= 2.0
    out[2].mul_(a.float())
    return out.T


def masked(a: Tensor, v: Tensor) -> Tensor:
    out = Y.clone()
    out[Y > 0] = a
    out.index_add_(0, torch.tensor([0, 0, 2, 2, 1, 1]), v)
    return out


def masked_by_values(a: Tensor, v: Tensor) -> Tensor:
    out = torch.outer(v, V + a)
    out[out < 0.2] = 0.0  # as in the density of a multinomial
    out[v > 0.1] = 1.0
    return out


@pytest.mark.parametrize(
    "fill", [moving_average, from_data, triangle, jitter, slices, masked, masked_by_values], ids=lambda f: f.__name__
)
def test_a_model_that_fills_a_tensor_is_recorded(fill: Callable[[Tensor, Tensor], Tensor], capfd):
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        v = pyro.sample("v", dist.Normal(V, 1.0).to_event(1))
        pyro.factor("fit", -(fill(a, v) - 0.5).square().sum().to(F64))

    density = LogDensity(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential = Potential(density)
        z = torch.randn(3, density.dim, dtype=F64, generator=torch.Generator().manual_seed(0))
        found = potential.value_and_grad(z)
    assert potential.captured
    assert "performance drop" not in capfd.readouterr().err  # a loop of torch's own over chains
    for ours, direct in zip(found, Potential(density, capture=False).value_and_grad(z), strict=True):
        assert torch.allclose(ours, direct, rtol=1e-6, atol=1e-6)


def test_filling_costs_no_more_operations_than_a_stack():
    def errors(a: Tensor) -> list[Tensor]:
        made = [Y[0]]
        for t in range(1, 100):
            made.append(Y[t % 6] - a * made[-1])
        return made

    def filled() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        out = torch.zeros(100, dtype=F64)
        for t, value in enumerate(errors(a)):
            out[t] = value
        pyro.sample("out", dist.Normal(0.0, 1.0).expand([100]).to_event(1), obs=out)

    def stacked() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("out", dist.Normal(0.0, 1.0).expand([100]).to_event(1), obs=torch.stack(errors(a)))

    sizes = [len(Potential(LogDensity(model))._graph.graph.nodes) for model in (filled, stacked)]
    assert sizes[0] <= 1.2 * sizes[1]
