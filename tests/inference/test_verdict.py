"""What a run says of itself when its chains have not mixed, or rounding kept them from it."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import HMC, MCMC, NUTS, SGLD, SamplerWarning
from inference.potential import LogDensity, Potential
from inference.results.verdict import rounding_of_energy, warn_of_poor_mixing

NOT_MIXED = "the chains have not mixed"


def two_modes():
    """Modes at -20 and 20, between which no chain goes."""
    x = pyro.sample("x", dist.Normal(0.0, 20.0).expand([2]).to_event(1))
    pyro.factor("modes", torch.logaddexp(-0.5 * (x - 20).square(), -0.5 * (x + 20).square()).sum())


def starts():
    return {"x": torch.tensor([[20.0, 20.0], [20.0, -20.0]])}


def draws(chains, number, scalars, seed=0):
    return torch.randn(chains, number, scalars, generator=torch.Generator().manual_seed(seed))


def test_separate_modes_are_reported_at_the_end_of_the_run():
    mcmc = MCMC(NUTS(two_modes), 400, 100, num_chains=2, initial_params=starts(), progress=False)
    with pytest.warns(SamplerWarning, match=rf"{NOT_MIXED}: .* 1 of 2 scalars and .* at x, scalar 1") as caught:
        mcmc.run()
    assert caught[0].filename == __file__


def test_kernels_of_minibatches_are_not_judged():
    """They are for networks, whose weights have symmetries; their models judge the function."""
    MCMC(SGLD(two_modes, step_size=1e-3), 100, 10, num_chains=2, initial_params=starts(), progress=False).run()


def test_chains_with_data_of_their_own_are_not_compared():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 100.0)), 1.0), obs=y)

    kernel = HMC(model, num_steps=8)
    MCMC(kernel, 100, 50, num_chains=2, in_dims=(0,), progress=False).run(torch.tensor([-50.0, 50.0]))


@pytest.mark.parametrize(
    ("chains", "number", "scalars"), [(2, 100, 500), (4, 100, 1000), (4, 1000, 1), (64, 400, 400), (1024, 200, 100)]
)
def test_independent_draws_are_not_accused(chains, number, scalars):
    for seed in range(3):
        warn_of_poor_mixing({"x": draws(chains, number, scalars, seed)}, stacklevel=1)


@pytest.mark.parametrize(("chains", "number", "scalars"), [(2, 100, 1), (4, 400, 100), (1024, 200, 100)])
def test_one_scalar_that_has_not_mixed_is_named(chains, number, scalars):
    x, y = draws(chains, number, scalars), draws(chains, number, 1, seed=1)[..., 0]
    y[: chains // 2] += 2
    x[..., 0] = torch.nan
    with pytest.warns(SamplerWarning, match=rf"{NOT_MIXED}: .* for 1 of {scalars + 1} scalars .* at y"):
        warn_of_poor_mixing({"x": x, "constant": torch.ones(chains, number)[..., :0], "y": y}, stacklevel=1)


def test_too_few_numbers_say_nothing():
    apart = torch.arange(4.0)[:, None].expand(4, 200) + draws(4, 200, 1)[..., 0] * 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_poor_mixing({"x": apart[:1]}, stacklevel=1)
        warn_of_poor_mixing({"x": apart[:, :99]}, stacklevel=1)
        warn_of_poor_mixing({"x": apart.long()}, stacklevel=1)
        warn_of_poor_mixing({}, stacklevel=1)
    with pytest.warns(SamplerWarning, match=NOT_MIXED):
        warn_of_poor_mixing({"x": apart}, stacklevel=1)


def test_chains_that_stand_still_apart_have_an_infinite_r_hat():
    with pytest.warns(SamplerWarning, match=rf"{NOT_MIXED}: .* and inf at x"):
        warn_of_poor_mixing({"x": torch.arange(4.0)[:, None].expand(4, 100)}, stacklevel=1)


def counts(x, y):
    a = pyro.sample("a", dist.Normal(x.new_zeros(()), 20.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Poisson(torch.exp(a + x)), obs=y)


def test_counts_beyond_single_precision_are_reported_with_the_cure():
    """Each term of the density is about 1e7, of which float32 holds one part in 1e7; the energy itself is 400."""
    x = torch.linspace(-0.5, 0.5, 50, dtype=torch.float64)
    y = (1e6 * x.exp()).round()
    start = {"a": torch.full((2,), 13.8155)}
    wide, narrow = (Potential(LogDensity(counts, (x.to(t), y.to(t)))) for t in (torch.float64, torch.float32))
    z = torch.tensor([[13.8155], [13.8154]])
    assert rounding_of_energy(narrow, z) > 1.0
    assert rounding_of_energy(wide, z.double()) < 1e-6
    with pytest.warns(SamplerWarning, match=r"float32 is too coarse for this density: .*torch.set_default_dtype"):
        MCMC(NUTS(counts, max_tree_depth=2), 2, 2, num_chains=2, initial_params=start, progress=False).run(
            x.float(), y.float()
        )


def test_energies_that_rounding_does_not_move_are_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MCMC(NUTS(counts, max_tree_depth=2), 2, 10, num_chains=2, progress=False).run(
            torch.linspace(-0.5, 0.5, 50), torch.full((50,), 100.0)
        )


def test_a_factorisation_that_rounding_breaks_is_reported():
    """The smallest eigenvalue, 1e-7, is lost in the rounding of the matrix: whether it has a root is chance."""
    grid = torch.linspace(0.0, 1.0, 8)
    smooth = torch.exp(-(grid[:, None] - grid).square()) + 1e-7 * torch.eye(8)

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.factor("root", torch.linalg.cholesky(scale * smooth).diagonal().log().sum())

    potential = Potential(LogDensity(model))
    z = torch.linspace(-1.0, 1.0, 200)[:, None]
    finite = torch.isfinite(potential(z))
    assert 0 < finite.sum() < 200
    assert rounding_of_energy(potential, z) == float("inf")
