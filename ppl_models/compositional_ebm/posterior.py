"""Approximate posterior of an energy's parameters by stochastic-gradient HMC.

``p(theta | x) ~ prior(theta) prod_i p~(x_i; theta) / Z(theta)`` is doubly intractable: Z depends on theta.  Here
``Z(theta)`` is replaced by its importance-sampling estimate from one fixed pool of noise, which makes an ordinary
density that is sampled by SGHMC with minibatches of data.  Both steps are approximations: the pool's error of log Z is
multiplied by the number of rows, and SGHMC has no acceptance step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import functional_call

from inference.kernels import SGHMC
from inference.mcmc import MCMC
from inference.results.brief import brief
from inference.results.export import to_arviz
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.base import check_batch_size, check_count
from ppl_models.compositional_ebm.distribution import EnergyDistribution
from ppl_models.compositional_ebm.model import EnergyModel

__all__ = ["EnergyPosterior", "sample_posterior"]


@brief
class EnergyPosterior(NamedTuple):
    """Attributes:
    parameters: name -> draws ``(chain, draw, *shape)``.
    log_partition: log Z of each draw by the pool, ``(chain, draw)``.
    mcmc: the run.
    """

    parameters: dict[str, Tensor]
    log_partition: Tensor
    mcmc: MCMC

    def to_arviz(self) -> Any:
        """ArviZ object with the groups posterior and sample_stats."""
        posterior = {**self.parameters, "log_partition": self.log_partition}
        return to_arviz(posterior=posterior, sample_stats=self.mcmc.sample_stats)


def sample_posterior(
    ebm: EnergyModel,
    x: Any,
    num_samples: int = 200,
    warmup_steps: int = 500,
    num_chains: int = 2,
    *,
    prior_scale: float = 10.0,
    pool_size: int = 2000,
    batch_size: int | None = 128,
    step_size: float = 1e-2,
    friction: float = 0.1,
    thin: int = 5,
    seed: int = 0,
    progress: bool | Callable[[dict[str, Any]], None] = True,
) -> EnergyPosterior:
    """Approximate posterior draws of the energy's parameters, from where ``ebm.fit`` ended.

    Args:
        ebm: a fitted model.
        x: its data ``(N, *event)``.
        num_samples, warmup_steps, num_chains, thin, seed, progress: as in ``inference.MCMC``.
        prior_scale: standard deviation of the normal prior on each parameter, around zero.
        pool_size: noise draws that estimate Z.
        batch_size: rows of a minibatch; None for all. The default is all rows where there are fewer.
        step_size, friction: of SGHMC. Steps are in units of parameters.

    Raises:
        RuntimeError: the model has not been fitted.
        TypeError, ValueError: bad data or settings.
        NonFiniteError: every chain became non-finite; lower ``step_size``.
    """
    ebm._fitted("sample_posterior")
    x = ebm._check(x, "x")
    rows = len(x)
    size = check_batch_size(batch_size, rows, 128)
    check_count("pool_size", pool_size, 100)
    noise, law = ebm._noise(), ebm._law(None)
    with torch.no_grad(), scoped_seed(derive_seed(seed, "pool"), x.device):
        pool = noise.draw(pool_size)
        log_q = noise.log_prob(pool)
    shapes = {n: p.shape for n, p in ebm.energy.named_parameters()}
    energy = ebm.energy

    def log_density(parameters: dict[str, Tensor], at: Tensor) -> Tensor:
        tilted = EnergyDistribution(
            lambda z: functional_call(energy, parameters, (z,)), ebm.event_shape, law.base, None, law.support
        )
        return tilted.log_prob(at)

    def model(data: Tensor) -> None:
        parameters = {
            n: pyro.sample(
                n.replace(".", "/"),
                dist.Normal(data.new_zeros(shape), prior_scale).to_event(len(shape)),
            )
            for n, shape in shapes.items()
        }
        log_z = torch.logsumexp(log_density(parameters, pool) - log_q, 0) - math.log(pool_size)
        with pyro.plate("data", rows, subsample_size=size) as index:
            pyro.factor("density", log_density(parameters, data[index]) - log_z)

    start = {n.replace(".", "/"): p.detach().expand(num_chains, *p.shape).clone() for n, p in energy.named_parameters()}
    kernel = SGHMC(model, step_size=step_size, friction=friction)
    mcmc = MCMC(
        kernel,
        num_samples,
        warmup_steps,
        initial_params=start,
        num_chains=num_chains,
        thin=thin,
        seed=seed,
        progress=progress,
    ).run(x)
    draws = mcmc.get_samples(group_by_chain=True)
    parameters = {n: draws[n.replace(".", "/")] for n in shapes}
    flat = {n: v.flatten(0, 1) for n, v in parameters.items()}
    with torch.no_grad():
        values = torch.stack(
            [
                torch.logsumexp(log_density({n: v[i] for n, v in flat.items()}, pool) - log_q, 0)
                for i in range(num_chains * num_samples)
            ]
        )
    return EnergyPosterior(parameters, (values - math.log(pool_size)).reshape(num_chains, num_samples), mcmc)
