"""Samplers against published draws: every mean and standard deviation, in Monte Carlo standard errors."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from inference import HMC, MCMC, NUTS
from inference.kernels.base import Kernel
from inference.potential import LogDensity, Potential
from inference.results.diagnostics import mcse_mean, rhat
from tests.inference import posteriordb

# Eight schools diverge now and then where the between-school scale is small; the comparison says whether it matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged:inference.SamplerWarning")


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


def least_squares(x: Tensor, y: Tensor, chains: int) -> dict[str, Tensor]:
    """Starting points of a regression's coefficients and log residual scale, which is spread a little."""
    beta = torch.linalg.lstsq(x, y).solution
    spread = 0.2 * torch.randn(chains, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    return {"beta": beta.expand(chains, -1).clone(), "sigma": (y - x @ beta).std().log() + spread}


def starting_points(name: str, args: tuple[Tensor, ...], chains: int) -> dict[str, Tensor] | None:
    """Where the default start, uniform on (-2, 2), is hundreds of posterior widths from the mode, least squares."""
    if name == "blr":
        return least_squares(*args, chains)
    if name == "kidscore_momiq":
        return least_squares(torch.stack([torch.ones_like(args[0]), args[0]], 1), args[1], chains)
    return None


class Engine(NamedTuple):
    """How to build a kernel for a posterior, whether it must find the typical set by itself, and its bound."""

    kernel: Callable[[Callable[..., object], str], Kernel]
    finds_its_way: bool
    k: float


# An engine is a line.
ENGINES = {
    "HMC": Engine(lambda model, name: HMC(model, num_steps=10, full_mass=name == "kidscore_momiq"), False, 4.0),
    "NUTS": Engine(lambda model, name: NUTS(model), True, 4.0),
}
CHAINS = 64


@pytest.mark.parametrize("name", posteriordb.NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_means_and_standard_deviations(engine, name):
    """4 Monte Carlo standard errors: with at most 20 numbers a posterior, a right sampler is out once in 800 runs."""
    model, args, reference = posteriordb.load(name)
    build, finds_its_way, k = ENGINES[engine]
    # Compiled where trees are deep, which uncompiled takes a minute and more.
    steep = engine == "NUTS" and name != "eight_schools_noncentered"
    start = None if finds_its_way else starting_points(name, args, CHAINS)
    mcmc = MCMC(build(model, name), 120, 200, start, CHAINS, progress=False, compile=steep).run(*args)
    samples = mcmc.get_samples(group_by_chain=True)
    # error bars of chains that disagree would excuse anything
    assert all((rhat(draws) < 1.05).all() for draws in samples.values())
    posteriordb.assert_agrees(samples, reference, k=k)


def test_the_comparison_notices_a_tenth_of_a_standard_deviation():
    """A shift by 0.1 sd, or a scale off by 7%, is beyond 4 standard errors of a run of the size above."""
    _, _, reference = posteriordb.load("arK")
    half = {n: v[:5] for n, v in reference.items()}
    other = {n: v[5:] for n, v in reference.items()}
    sites = {
        "alpha": half["alpha"],
        "sigma": half["sigma"],
        "beta": torch.stack([half[f"beta[{i}]"] for i in range(1, 6)], -1),
    }
    posteriordb.assert_agrees(sites, other)
    for wrong in ({"alpha": sites["alpha"] + 0.1 * sites["alpha"].std()}, {"beta": 1.07 * sites["beta"]}):
        with pytest.raises(AssertionError, match="off by more than 4"):
            posteriordb.assert_agrees({**sites, **wrong}, other)
    stuck = {**sites, "alpha": torch.full_like(sites["alpha"], torch.nan)}
    with pytest.raises(AssertionError, match="alpha"):
        posteriordb.assert_agrees(stuck, other)
