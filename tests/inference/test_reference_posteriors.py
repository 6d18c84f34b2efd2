"""Samplers against published draws: every mean and standard deviation, in Monte Carlo standard errors."""

import pytest
import torch
from torch import Tensor

from inference.potential import LogDensity, Potential
from inference.results.diagnostics import mcse_mean
from tests.inference import posteriordb


def unconstrained(density: LogDensity, reference: dict[str, Tensor]) -> Tensor:
    """Reference draws as positions ``(chain, draw, dim)``; a positive scalar's unconstrained value is its logarithm."""
    draws = dict(reference)
    for name in [n for n in draws if n.startswith("theta[")]:
        draws[name.replace("theta", "theta_trans")] = (draws.pop(name) - draws["mu"]) / draws["tau"]
    values = {}
    for name, site in density.sites.items():
        if name in draws:
            values[name] = draws[name].log() if name in ("sigma", "tau") else draws[name]
        else:
            values[name] = torch.stack([draws[f"{name}[{i + 1}]"] for i in range(site.shape.numel())], -1)
    flat = {n: v.flatten(0, 1) for n, v in values.items()}
    return density.flatten(flat).unflatten(0, (10, 1000))


@pytest.mark.parametrize("name", posteriordb.NAMES)
def test_the_models_are_those_that_the_reference_was_drawn_from(name):
    """Stein's identity holds for draws of the right density alone: E[grad U] = 0 and E[z_i dU/dz_j] = [i = j]."""
    model, args, reference = posteriordb.load(name)
    potential = Potential(density := LogDensity(model, args))
    z = unconstrained(density, reference)
    gradient = potential.value_and_grad(z.flatten(0, 1))[1].unflatten(0, (10, 1000))
    centred = z - z.mean((0, 1))
    products = (centred.unsqueeze(-1) * gradient.unsqueeze(-2)).flatten(2)
    eye = torch.eye(potential.dim, dtype=z.dtype).flatten()
    for moments, expected in ((gradient, 0.0), (products, eye)):
        off = (moments.mean((0, 1)) - expected) / mcse_mean(moments)
        # up to 110 quantities a posterior: the largest of so many standard normals exceeds 4.5 once in 1,300 times
        assert off.abs().max() < 4.5, off
