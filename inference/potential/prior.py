"""Draws of a Pyro model's latent sites as flat unconstrained vectors: from the prior, or from draws that are given.

A site's support may depend on another site (``Uniform(0, theta)``), so both need the model to run; it runs vectorised
over draws, as it does for ``Predictive``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference.potential.log_density import LogDensity, scoped_model
from inference.potential.potential import PotentialFunction
from inference.results._over_draws import CountBytes, Draws, noting, over_draws, scope

__all__ = ["prior_positions", "unconstrained"]


def prior_positions(density: LogDensity, num: int, seeds: Sequence[int]) -> Tensor:
    """Draws from the prior in unconstrained space, ``(len(seeds) * num, dim)``; each seed's block of ``num`` depends on
    that seed alone.

    Raises:
        ValueError: there is no model, or a prior is flat.
    """
    if isinstance(density, PotentialFunction):
        raise ValueError("potential_fn has no prior to draw from: give a reference distribution (reference=...)")
    density._refuse_flat_priors()
    return torch.cat([_positions(density, {}, num, seed) for seed in seeds])


def unconstrained(density: LogDensity, samples: Mapping[str, Tensor]) -> Tensor:
    """Draws ``(draw, *shape)`` of every latent site, in constrained space, as flat vectors ``(draw, dim)``.

    Raises:
        ValueError: a site is missing, or has another shape than in the model, or the numbers of draws differ.
    """
    missing = sorted(set(density.sites) - set(samples))
    if missing:
        raise ValueError(f"draws of the latent sites {missing} are missing; the model has {sorted(density.sites)}")
    chosen = {
        n: torch.as_tensor(samples[n]).detach().to(device=density.device, dtype=s.dtype)
        for n, s in density.sites.items()
    }
    for name, value in chosen.items():
        shape = density.sites[name].shape
        if value.dim() == 0 or value.shape[1:] != shape:
            raise ValueError(f"draws of {name!r} have shape {tuple(value.shape)}; needed is (draw, *{tuple(shape)})")
    sizes = {n: len(v) for n, v in chosen.items()}
    if len(set(sizes.values())) > 1 or not next(iter(sizes.values())):
        raise ValueError(f"every site needs the same number of draws, at least one; got {sizes}")
    num = next(iter(sizes.values()))
    if isinstance(density, PotentialFunction):
        return density.flatten(
            {n: density.transforms[n](v) if n in density.transforms else v for n, v in chosen.items()}
        )
    return _positions(density, chosen, num, 0)


def _positions(density: LogDensity, samples: Draws, num: int, seed: int) -> Tensor:
    def one(draws: Draws) -> Draws:
        with poutine.trace() as recorder, poutine.condition(data=draws):
            density.model(*density.args, **density.kwargs)
        nodes: dict[str, Any] = dict(recorder.trace.nodes)
        parts = [
            density._to_unconstrained(name, nodes[name]["fn"], nodes[name]["value"]).reshape(-1).to(density.dtype)
            for name in density.sites
        ]
        return {"position": torch.cat(parts)}

    inputs = (samples, density.args, density.kwargs)
    with scope(seed, False, inputs, (density.model,)), scoped_model(validate=False):
        first = {name: value.select(0, 0) for name, value in samples.items()}
        with noting("in the run of the model on the first draw"), CountBytes() as counted:
            one(first)
        return over_draws(one, samples, num, None, counted, seed=seed, stacklevel=6)["position"]
