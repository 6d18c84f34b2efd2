"""Samplers on laws in large units, from one point, and with sites of several types."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value

from inference import HMC, MCLMC, MCMC, MEADS

QUIET = {"progress": False, "compile": False}


def normal(dim: int, scale: float):
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(dim), torch.tensor(scale)).to_event(1))

    return model


@pytest.mark.parametrize(("dim", "scale"), [(4, 100.0), (50, 50.0), (4, 1e5)])
def test_mclmc_moves_before_it_knows_the_scale(dim: int, scale: float) -> None:
    """expm1(2 eps / L) overflowed while L was in raw units, and velocities of NaN stay NaN."""
    mcmc = MCMC(MCLMC(normal(dim, scale)), 200, 500, num_chains=16, thin=2, **QUIET).run()
    assert float(mcmc.get_samples()["x"].std()) / scale == pytest.approx(1.0, abs=0.06)
    assert float(mcmc.sample_stats["diverging"].sum()) == 0


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_meads_from_one_point(start: float) -> None:
    """Chains at one place have no largest eigenvalue: 0 / 0 made the damping NaN for good."""
    kernel = MEADS(normal(3, 1.0), init_strategy=init_to_value(values={"x": torch.full((3,), start)}))
    mcmc = MCMC(kernel, 200, 200, num_chains=64, thin=5, **QUIET).run()
    assert float(mcmc.get_samples()["x"].std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("full_mass", [True, [("x",)]])
def test_a_dense_mass_matrix_of_few_positions_in_large_units(full_mass: object) -> None:
    """The first window has 25 positions, whose covariance is of low rank in 40 dimensions."""
    kernel = HMC(normal(40, 100.0), full_mass=full_mass, num_steps=8)
    mcmc = MCMC(kernel, 100, 600, num_chains=2, seed=1, **QUIET).run()
    assert float(mcmc.get_samples()["x"].std()) / 100 == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("first", ["a", "b"])
def test_sites_of_several_types_keep_their_digits(first: str) -> None:
    """Positions were kept in the type of the first site."""
    start = {"a": torch.zeros(4, 1), "b": torch.full((4, 1), 1e8, dtype=torch.float64)}
    start = dict(sorted(start.items(), key=lambda item: item[0] != first))

    def energy(z: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.5 * z["a"].double().square().sum() + 0.5 * (z["b"] - 1e8).square().sum()

    drawn = MCMC(HMC(potential_fn=energy), 500, 200, initial_params=start, num_chains=4, **QUIET).run().get_samples()
    assert drawn["a"].dtype == torch.float32 and drawn["b"].dtype == torch.float64
    assert float(drawn["b"].std()) == pytest.approx(1.0, abs=0.15)


def test_divergences_between_kept_draws_are_counted_over_blocks() -> None:
    """Blocks have 128 steps; of thinner draws only the steps of the last block counted."""

    def energy(z: dict[str, torch.Tensor]) -> torch.Tensor:
        y = z["x"][1]
        return 0.5 * z["x"].square().sum() + torch.where(y > 2.5, 2000.0, 0.0)

    kernel = HMC(potential_fn=energy, step_size=1.0, num_steps=3, adapt_step_size=False, adapt_mass_matrix=False)
    start = {"x": torch.zeros(8, 2)}
    options = {"initial_params": start, "num_chains": 8, "warmup_steps": 0, **QUIET}
    with pytest.warns(UserWarning, match="diverg"):
        every = MCMC(kernel, 4096, thin=1, **options).run().sample_stats["diverging"]
        thinned = MCMC(kernel, 8, thin=512, **options).run().sample_stats["diverging"]
    assert torch.equal(thinned > 0, every.reshape(8, 8, 512).amax(2) > 0)
