"""Which kernel samples a network's posterior, and from where."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from inference.kernels import HMC, SGHMC, SGLD, AdaptiveSGHMC, Kernel, ScaleGibbs
from inference.runtime.generators import derive_seed, scoped_seed

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN

__all__ = ["build_kernel", "latent_values", "starting_points"]

_SAMPLERS = ("adaptive_sghmc", "sghmc", "sgld", "hmc")


def build_kernel(
    bnn: "FunctionalPriorBNN",
    sampler: str | Callable[["FunctionalPriorBNN"], Kernel],
    *,
    step_size: float,
    friction: float,
    temperature: float,
    max_grad_norm: float | None,
    gibbs_every: int,
    full_batch: bool,
) -> Kernel:
    """The kernel of that name; see ``FunctionalPriorBNN.fit``.

    Args:
        bnn: the model.
        sampler: a name, or a function of the model that builds a kernel.
        step_size: of the sampler.
        friction: of SGHMC.
        temperature: of the tempered posterior.
        max_grad_norm: of the potential's gradient, in the warm-up.
        gibbs_every: steps between draws of the variances.
        full_batch: gradients carry no minibatch noise, so none is to be taken off the injected noise.

    Raises:
        TypeError, ValueError: an unknown sampler or a bad setting.
    """
    if callable(sampler):
        return sampler(bnn)
    if sampler not in _SAMPLERS:
        raise ValueError(f"sampler must be one of {list(_SAMPLERS)} or a function of the model, got {sampler!r}")
    if sampler == "hmc":
        if temperature != 1.0:
            raise ValueError(
                "temperature is for stochastic-gradient samplers; sampler='hmc' samples the posterior itself"
            )
        return HMC(bnn, step_size=step_size)
    options: dict[str, Any] = {
        "step_size": step_size,
        "temperature": temperature,
        "max_grad_norm": max_grad_norm,
        "gibbs": tuple(ScaleGibbs(variance, weight) for variance, weight in bnn.prior.gibbs_sites()),
        "gibbs_every": gibbs_every,
    }
    if sampler == "sgld":
        return SGLD(bnn, **options)
    if sampler == "sghmc":
        return SGHMC(bnn, friction=friction, **options)
    return AdaptiveSGHMC(bnn, friction=friction, noise_correction=not full_batch, **options)


def starting_points(bnn: "FunctionalPriorBNN", x: Tensor, num_chains: int, seed: int) -> dict[str, Tensor]:
    """A draw of the prior for each chain, unconstrained: ``(chain, *shape)`` by site; ``x`` is any standardised row."""
    starts = []
    for chain in range(num_chains):
        with scoped_seed(derive_seed(seed, "start", chain), x.device), torch.no_grad():
            latent = _latent_nodes(bnn, x)
        starts.append({n: biject_to(s["fn"].support).inv(s["value"]) for n, s in latent.items()})
    return {n: torch.stack([s[n] for s in starts]) for n in starts[0]}


def latent_values(bnn: "FunctionalPriorBNN", x: Tensor) -> dict[str, Tensor]:
    """One draw of the prior by latent site, constrained, from the global generator."""
    return {n: s["value"] for n, s in _latent_nodes(bnn, x).items()}


def _latent_nodes(bnn: "FunctionalPriorBNN", x: Tensor) -> dict[str, Any]:
    trace = poutine.trace(poutine.block(bnn, hide=["obs", "data"])).get_trace(x)
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
