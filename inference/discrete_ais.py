"""Annealed importance sampling of discrete models with Gibbs sweeps: log Z with its error, one way or both.

The path goes from independent variables to the law, ``log f_k = (1 - beta_k) log f_0 + beta_k log p~``, and one sweep
of Gibbs draws leaves each f_k invariant (Neal 2001; Salakhutdinov and Murray, "On the quantitative analysis of deep
belief networks", ICML 2008, for Boltzmann machines).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.kernels.base import count
from inference.log_partition import annealed_log_weights
from inference.potential.discrete import DiscreteEnergy, DiscretePotential, draw_states, gibbs_sweep
from inference.results.evidence import LogPartition, from_weights, sandwich
from inference.runtime.generators import generator

__all__ = ["discrete_ais"]


def discrete_ais(
    target: DiscreteEnergy | Callable[..., Any],
    *args: Any,
    base_logits: Tensor | None = None,
    initial: Tensor | None = None,
    num_chains: int = 500,
    num_temperatures: int = 100,
    both_ways: bool = False,
    num_burn_in: int = 100,
    seed: int = 0,
    **kwargs: Any,
) -> LogPartition:
    """log of the sum of ``p~`` over all configurations.

    Args:
        target: a ``DiscreteEnergy``, or a Pyro model all of whose latent sites are discrete.
        args, kwargs: the model's arguments.
        base_logits: of the independent variables that the path starts from, ``(dim, K)``; uniform by default.
        initial: state numbers ``(dim,)`` of variables that belong to no block: they are held there, and the sum runs
            over the others.
        num_chains: independent weights.
        num_temperatures: K, one sweep at each of equally spaced beta.
        both_ways: add chains in reverse from draws of the law (after ``num_burn_in`` sweeps at it), whose average is an
            upper bound if those draws are good, and return the bridge between both.
        num_burn_in: as above.
        seed: same seed, same machine, same result to the bit.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    energy: DiscreteEnergy
    if isinstance(target, DiscreteEnergy):
        if args or kwargs:
            raise ValueError("model arguments were given, and target is an energy, which takes none")
        energy = target
    elif callable(target):
        energy = DiscretePotential(target, args, kwargs)
    else:
        raise TypeError(f"target must be a DiscreteEnergy or a Pyro model, got {type(target).__name__}")
    count("num_chains", num_chains, 2)
    count("num_temperatures", num_temperatures, 1)
    count("num_burn_in", num_burn_in, 0)
    dim, widest, device = len(energy.sizes), max(energy.sizes), energy.device
    shape = (dim, widest)
    logits = torch.zeros(shape, dtype=energy.dtype, device=device) if base_logits is None else base_logits.detach()
    if tuple(logits.shape) != shape:
        raise ValueError(f"base_logits must be {shape}, got {tuple(logits.shape)}")
    sizes = torch.tensor(energy.sizes, device=device)
    beyond = torch.arange(widest, device=device) >= sizes[:, None]
    log_base = logits.masked_fill(beyond, -math.inf).log_softmax(1)
    if not bool(torch.isfinite(log_base[~beyond]).all()):
        raise ValueError("base_logits must be finite: a state that the path cannot start in would never be weighed")
    moving = torch.cat(list(energy.blocks)) if len(energy.blocks) else torch.empty(0, dtype=torch.long, device=device)
    noise = generator(seed, "discrete ais", device=device)

    def uniform() -> Tensor:
        return torch.rand(num_chains, dim, generator=noise, dtype=energy.dtype, device=device)

    def log_ratio(states: Tensor) -> Tensor:
        base = log_base[moving].expand(len(states), -1, -1).gather(2, states[:, moving, None])[..., 0].sum(1)
        return energy.log_density(states).double() - base.double()

    def tempered(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
        def temper(conditional: Tensor, variables: Tensor) -> Tensor:
            mixed = (1 - beta) * log_base[variables] + beta * conditional
            return mixed.masked_fill(beyond[variables], -math.inf)

        return temper

    def increment(states: Tensor, k: int) -> Tensor:
        return log_ratio(states) / num_temperatures

    def sweep(states: Tensor, k: int) -> Tensor:
        return gibbs_sweep(energy, states, uniform(), temper=tempered(k / num_temperatures))

    def sweep_back(states: Tensor, k: int) -> Tensor:
        return gibbs_sweep(energy, states, uniform(), temper=tempered(k / num_temperatures), backwards=True)

    with torch.no_grad():
        fixed = torch.zeros(dim, dtype=torch.long, device=device) if initial is None else initial.long()
        states = fixed.repeat(num_chains, 1)
        states[:, moving] = draw_states(log_base, uniform())[:, moving]
        states, forward = annealed_log_weights(states, num_temperatures, increment, sweep)
        if not both_ways:
            return from_weights(forward, "AIS")
        for _ in range(num_burn_in):
            states = gibbs_sweep(energy, states, uniform())
        reverse = annealed_log_weights(states, num_temperatures, increment, sweep_back, reverse=True)[1]
    return sandwich(forward, reverse, "AIS sandwich", exact=False)
