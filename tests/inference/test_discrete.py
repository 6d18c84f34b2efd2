"""Gibbs draws and log Z of discrete Pyro models against enumeration."""

import itertools
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference import MCMC, DiscreteGibbs, discrete_ais
from inference.potential.discrete import DiscretePotential, draw_states

X = torch.tensor([0.0, 1.5])


def model(x: Tensor) -> None:
    """A Categorical, a Bernoulli that depends on it, and a one-hot coupled by a factor, in one site each."""
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Bernoulli(0.3 + 0.2 * z.float()))
        pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)
    h = pyro.sample("h", dist.OneHotCategorical(torch.tensor([0.5, 0.5])))
    pyro.factor("coupling", 1.5 * h[0] * (z[0] == z[1]).float())


def exact() -> tuple[dict[str, Tensor], float]:
    """Means of the sites and log Z by going through all configurations."""
    total, sums = 0.0, {"z": torch.zeros(2), "y": torch.zeros(2), "h": torch.zeros(2)}
    eye = torch.eye(2)
    for z0, z1, y0, y1, h in itertools.product(range(3), range(3), range(2), range(2), range(2)):
        values = {"z": torch.tensor([z0, z1]), "y": torch.tensor([float(y0), float(y1)]), "h": eye[h]}
        p = math.exp(poutine.trace(poutine.condition(model, data=values)).get_trace(X).log_prob_sum())
        total += p
        sums = {n: s + p * values[n] for n, s in sums.items()}
    return {n: s / total for n, s in sums.items()}, math.log(total)


def test_gibbs_draws_have_the_exact_means_and_types() -> None:
    mcmc = MCMC(DiscreteGibbs(model), 25, 8, num_chains=100, progress=False, seed=1).run(X)
    draws = mcmc.get_samples()
    assert draws["z"].dtype == torch.long and draws["h"].shape == (2500, 2)
    for name, mean in exact()[0].items():
        # 2,500 correlated draws: standard errors below 0.02 and 0.03 for z
        torch.testing.assert_close(draws[name].float().mean(0), mean, rtol=0, atol=0.07)
    again = MCMC(DiscreteGibbs(model), 5, 0, num_chains=3, progress=False, seed=1).run(X).get_samples()
    more = (
        MCMC(DiscreteGibbs(model), 5, 0, num_chains=4, progress=False, seed=1).run(X).get_samples(group_by_chain=True)
    )
    assert torch.equal(again["z"].reshape(3, 5, 2), more["z"][:3])


def test_ais_between_its_bounds() -> None:
    _, log_z = exact()
    found = discrete_ais(model, X, num_chains=100, num_temperatures=20, both_ways=True, num_burn_in=20)
    assert abs(found.value - log_z) < 4 * found.standard_error < 0.2
    assert found.lower < found.upper + 0.1


def test_a_conditional_is_the_joint_in_each_state() -> None:
    potential = DiscretePotential(model, (X,))
    states = torch.tensor([[0, 2, 1, 0, 1], [1, 1, 0, 0, 0]])
    assert potential.sizes == (3, 3, 2, 2, 2)
    energies = potential.value_and_grad(states.float())[0]  # what a run reports
    torch.testing.assert_close(energies, -potential.log_density(states))
    for j, size in enumerate(potential.sizes):
        logits = potential.conditional_logits(states, j)
        for k in range(size):
            changed = states.clone()
            changed[:, j] = k
            torch.testing.assert_close(logits[:, 0, k], potential.log_density(changed))
        assert (logits[:, 0, size:] == -math.inf).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_elements_of_a_vector_are_variables_and_the_joint_sums_to_the_evidence(masked: bool) -> None:
    probs, x = torch.tensor([0.3, 0.6]), torch.tensor(0.5)

    def vector() -> None:
        law = dist.Bernoulli(probs).to_event(1)
        z = pyro.sample("z", law.mask(True) if masked else law)
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    potential = DiscretePotential(vector)
    assert potential.sizes == (2, 2)
    rows = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    terms = dist.Bernoulli(probs).log_prob(rows.float()).sum(1) + dist.Normal(rows.sum(1), 1.0).log_prob(x)
    torch.testing.assert_close(potential.log_density(rows), terms)


def test_a_count_of_comparisons_is_a_count() -> None:
    def counted(y: Tensor) -> None:
        with pyro.plate("site", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        k = sum(z[i] == 1 for i in range(4))
        pyro.sample("y", dist.Normal(1.0 * k, 0.5), obs=y)

    states = torch.cartesian_prod(*[torch.arange(3)] * 4)
    expected = dist.Normal((states == 1).sum(1).float(), 0.5).log_prob(torch.tensor(3.0)) - 4 * math.log(3)
    torch.testing.assert_close(DiscretePotential(counted, (torch.tensor(3.0),)).log_density(states), expected)


def test_states_of_probability_zero_are_not_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(4, 1)
    drawn = draw_states(logits, torch.tensor([0.0, 0.49, 0.5, 1 - 2**-24]))
    assert drawn.tolist() == [1, 1, 3, 3]


def coin(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.4))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_resume_to_the_bit(tmp_path: Path) -> None:
    def run(folder: Path | None) -> MCMC:
        options = {"progress": False, "checkpoint": folder, "checkpoint_every": 0.0}
        return MCMC(DiscreteGibbs(coin), 150, 0, num_chains=2, **options)  # type: ignore[arg-type]

    def stop(*args: object) -> None:
        if args[3] == 130:
            raise KeyboardInterrupt

    whole = run(None).run(X[0]).get_samples()
    stopped = run(tmp_path)
    stopped.hook_fn = stop
    with pytest.warns(UserWarning, match="interrupted"):
        stopped.run(X[0])
    assert torch.equal(whole["z"], run(tmp_path).run(X[0]).get_samples()["z"])


def test_bad_input() -> None:
    def continuous() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def subsampled() -> None:
        with pyro.plate("rows", 4, subsample_size=2):
            pyro.sample("z", dist.Bernoulli(0.5))

    for bad, words in ((continuous, "no finite list"), (subsampled, "subsampled"), (lambda: None, "no discrete")):
        with pytest.raises(ValueError, match=words):
            MCMC(DiscreteGibbs(bad), 1, 0, progress=False).run()
    with pytest.raises(ValueError, match="exactly one"):
        DiscreteGibbs()
    with pytest.raises(TypeError, match="energy"):
        DiscreteGibbs(energy=3)  # type: ignore[arg-type]
    starts = {"z": torch.full((1, 2), 7.0), "y": torch.zeros(1, 2), "h": torch.zeros(1)}
    with pytest.raises(ValueError, match="integers from 0"):
        MCMC(DiscreteGibbs(model), 1, 0, initial_params=starts, progress=False).run(X)
    with pytest.raises(TypeError, match="target"):
        discrete_ais(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_logits"):
        discrete_ais(model, X, base_logits=torch.zeros(2, 2))
