"""log Z of a fitted energy, each way with its error.

    log Z = log E_q[ b(x) exp(-E(x)) / q(x) ],      q the noise of the fit,

by importance sampling from q, by annealing from q both ways, by a bridge between q and Markov chains, or by quadrature.
"""

import math
import warnings
from typing import Any

import torch

from inference._errors import SamplerWarning
from inference.log_partition import ais_sandwich, bridge_sampling
from inference.objectives.unnormalised.guards import FEWEST
from inference.objectives.unnormalised.noise import Noise
from inference.objectives.unnormalised.quasi_random import QuasiRandomNoise
from inference.results.evidence import LogPartition, from_weights, with_upper_bound
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.compositional_ebm.distribution import EnergyDistribution
from ppl_models.compositional_ebm.sampling import Unconstrained, chains, resample

__all__ = ["estimate", "importance", "quadrature"]

_METHODS = ("importance", "ais", "bridge", "quadrature")
_CHUNK = 16_384
_UNRELIABLE_K = 0.7


def importance(law: EnergyDistribution, noise: Noise, num_samples: int, seed: int) -> LogPartition:
    """Importance sampling from the noise, with a stochastic bound on either side."""
    noise = noise.plain if isinstance(noise, QuasiRandomNoise) else noise  # the error is that of independent draws
    like = next(iter([*noise.buffers(), *noise.parameters()]), None)
    blocks = []
    with torch.no_grad(), scoped_seed(derive_seed(seed, "log Z"), None if like is None else like.device):
        for start in range(0, num_samples, _CHUNK):
            z = noise.draw(min(_CHUNK, num_samples - start))
            blocks.append((law.log_prob(z) - noise.log_prob(z)).double())
    return with_upper_bound(from_weights(torch.cat(blocks), "importance"))


def quadrature(law: EnergyDistribution, noise: Noise, num_samples: int, seed: int) -> LogPartition:
    """The midpoint rule on a box that holds the noise and half as much again, in one or two dimensions.

    The standard error is the change when every other point is left out. A support with edges ends the box.
    """
    shape = torch.Size(noise.event_shape)
    dim = max(1, shape.numel())
    if dim > 2:
        raise ValueError(f"quadrature is for one or two dimensions, this event has {dim}")
    if law.support.is_discrete:
        raise ValueError("quadrature is for continuous events: use method='importance'")
    with scoped_seed(seed):
        drawn = noise.draw(10_000).reshape(-1, dim)
    low, high = drawn.amin(0), drawn.amax(0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    inner = getattr(law.support, "base_constraint", law.support)
    for name, edges, pick in (("lower_bound", low, torch.maximum), ("upper_bound", high, torch.minimum)):
        bound = getattr(inner, name, None)
        if bound is not None:
            edges.copy_(pick(edges, torch.as_tensor(bound, dtype=edges.dtype, device=edges.device).expand_as(edges)))
    points = max(16, int(num_samples ** (1 / dim)) // 2 * 2)
    width = (high - low) / points
    steps = torch.arange(points, dtype=low.dtype, device=low.device) + 0.5
    axes = [low[i] + width[i] * steps for i in range(dim)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, *shape)
    with torch.no_grad():
        values = torch.cat([law.log_prob(part).double() for part in grid.split(_CHUNK)])
    value = torch.logsumexp(values, 0) + width.double().log().sum()
    coarse = values.reshape((points,) * dim)[(slice(None, None, 2),) * dim]
    other = torch.logsumexp(coarse.reshape(-1), 0) + width.double().log().sum() + dim * math.log(2)
    error = abs(float(value - other))
    empty = values[:0]
    return LogPartition(
        value=float(value),
        standard_error=error,
        lower=float(value) - error,
        upper=float(value) + error,
        ess=math.nan,
        pareto_k=math.nan,
        exact=False,
        method="quadrature",
        log_weights=empty,
        reverse_log_weights=empty,
    )


def estimate(law: EnergyDistribution, noise: Noise, method: str, num_samples: int, seed: int, **options: Any) -> Any:
    """log Z of an unnormalised law by the named method; see ``EnergyModel.log_partition``."""
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if method in ("importance", "quadrature"):
        if options:
            raise TypeError(f"method={method!r} takes no options, got {sorted(options)}")
        found = (importance if method == "importance" else quadrature)(law, noise, num_samples, seed)
        if found.khat > _UNRELIABLE_K:
            warnings.warn(
                f"the weights have Pareto k = {found.khat:.2f} > {_UNRELIABLE_K}: neither log Z nor its error can be "
                "trusted; use method='ais', or noise with heavier tails",
                SamplerWarning,
                stacklevel=3,
            )
        elif found.ess < FEWEST:
            warnings.warn(
                f"{found.ess:.3g} of {num_samples} draws carry log Z: neither it nor its error can be trusted; use "
                "method='ais', or noise that covers the model",
                SamplerWarning,
                stacklevel=3,
            )
        return found
    if law.support.is_discrete:
        raise ValueError(f"method={method!r} moves along gradients, and the data are discrete: use 'importance'")
    space = Unconstrained(law, noise)
    if method == "ais":
        exact = options.pop("posterior_samples", None)
        if exact is not None:
            options["posterior_samples"] = {n: space.flat(x) for n, x in exact.items()}
        return ais_sandwich(space.path(), seed=seed, **options)
    start = resample(law, noise, options.pop("num_chains", 64), seed)
    draws = chains(law, start, "hmc", options.pop("num_draws", 200), seed).get_samples(group_by_chain=True)["x"]
    return bridge_sampling(space.path(), {"x": space.flat(draws)}, seed=seed, **options)
