"""Which kernel samples a network's posterior, and from where."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from inference import kernels
from inference.kernels import HMC, SGHMC, SGLD, AdaptiveSGHMC, Kernel, ScaleGibbs
from inference.runtime.generators import derive_seed, scoped_seed

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN
    from ppl_models.functional_prior_bnn.posterior import Posterior

__all__ = ["build_kernel", "sampler_class", "starting_points"]

_SAMPLERS: dict[str, type[Kernel]] = {"adaptive_sghmc": AdaptiveSGHMC, "sghmc": SGHMC, "sgld": SGLD, "hmc": HMC}
# With its mass adapted HMC sees a posterior of about unit scale. A quarter of that Gaussian's period takes it to an
# independent point; the whole period, Pyro's default, back to where it started.
_QUARTER_PERIOD = math.pi / 2


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
        return HMC(bnn, step_size=step_size, trajectory_length=_QUARTER_PERIOD)
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


def sampler_class(method: str) -> type[Kernel] | None:
    """The kernel that a posterior's ``method`` names; None for none of this library's, such as ``"map"``."""
    found = _SAMPLERS.get(method, getattr(kernels, method, None))
    return found if isinstance(found, type) else None


def starting_points(
    bnn: "FunctionalPriorBNN", x: Tensor, num_chains: int, seed: int, start_from: "Posterior | None" = None
) -> dict[str, Tensor]:
    """Unconstrained starts ``(chain, *shape)`` by site: an independent draw of the prior a chain, or the last of
    earlier chains.

    Args:
        bnn: the model.
        x: any standardised row ``(1, D)``.
        num_chains: chains.
        seed: of the draws.
        start_from: earlier chains of a model with the same sites; used in turn if there are fewer of them.

    Raises:
        ValueError: ``start_from`` has other sites or shapes.
    """
    starts: dict[str, list[Tensor]] = {}
    for chain in range(num_chains):
        with scoped_seed(derive_seed(seed, "start", chain), x.device), torch.no_grad():
            trace = poutine.trace(poutine.block(bnn, hide=["obs", "data"])).get_trace(x)
        nodes: dict[str, Any] = dict(trace.nodes.items())
        for name, site in nodes.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            value: Tensor = site["value"]
            if start_from is not None:
                earlier = start_from.samples.get(name)
                if earlier is None or earlier.shape[2:] != value.shape:
                    raise ValueError(f"start_from has no draws of site {name!r} with shape {tuple(value.shape)}")
                value = earlier[chain % len(earlier), -1].to(value)
            starts.setdefault(name, []).append(biject_to(site["fn"].support).inv(value))
    return {name: torch.stack(values) for name, values in starts.items()}
