"""Exact Gibbs updates of Gaussian scales inside a gradient sampler.

For ``s^2 ~ InvGamma(a, r)`` and ``w_1..w_n | s ~ N(0, s^2)``,

    s^2 | w ~ InvGamma(a + n / 2, r + sum(w^2) / 2),

so the variances of a hierarchical prior are drawn exactly while the gradient sampler moves the weights (Tran et al.
2022, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from inference.potential import LogDensity, Potential, Site

__all__ = ["BoundScaleGibbs", "ScaleGibbs"]


class BoundScaleGibbs(NamedTuple):
    """A ``ScaleGibbs`` tied to the sites of one model.

    Attributes:
        variance: the variance site.
        weights: the sites whose variance it is.
        rate: prior rate r, broadcast to the variance's shape, flat.
        concentration: posterior concentration a + n / 2, flat ``(k,)``.
        shared: whether one variance governs all weights (else one variance a weight).
    """

    variance: Site
    weights: tuple[Site, ...]
    rate: Tensor
    concentration: Tensor
    shared: bool

    def draw(self, position: Tensor, gamma: Tensor) -> Tensor:
        """New unconstrained variances ``(chain, k)`` from standard gammas of ``concentration``, given the weights in
        ``position``.
        """
        squares = [position[:, s.start : s.stop].square() for s in self.weights]
        total = torch.cat(squares, dim=1).sum(1, keepdim=True) if self.shared else squares[0]
        value = (self.rate + 0.5 * total) / gamma
        return biject_to(constraints.positive).inv(value)


class ScaleGibbs:
    """Draw a variance site from its exact conditional inside a stochastic-gradient kernel.

    Args:
        variance_site: a latent site with an inverse-gamma prior: one variance for all the weights, or a variance of
            the weights' own shape.
        weight_sites: the site or sites whose values are N(0, variance).

    The pairing is checked against the model's own density when the run starts; one that is not conjugate is refused.
    """

    def __init__(self, variance_site: str, weight_sites: str | Sequence[str]) -> None:
        self.variance_site = variance_site
        self.weight_sites = (weight_sites,) if isinstance(weight_sites, str) else tuple(weight_sites)

    def __repr__(self) -> str:
        return f"ScaleGibbs({self.variance_site!r}, {self.weight_sites!r})"

    def bind(self, potential: Potential) -> BoundScaleGibbs:
        """Look up the sites and verify the conditional numerically.

        Raises:
            ValueError: a site is missing, the prior is not inverse-gamma with fixed parameters, or the model's
                conditional is another one.
        """
        density = potential.density
        if not isinstance(density, LogDensity) or not density.priors:
            raise ValueError("Gibbs updates need a Pyro model, not a potential_fn")
        if density.data:
            raise ValueError(f"{self!r} reads one prior for all chains; it cannot be used with in_dims")
        missing = [n for n in (self.variance_site, *self.weight_sites) if n not in density.sites]
        if missing:
            raise ValueError(
                f"{self!r} names sites {missing} that the model does "
                f"not have; its latent sites are {sorted(density.sites)}"
            )
        prior = density.priors[self.variance_site]
        while isinstance(prior, dist.Independent | torch.distributions.Independent):
            prior = prior.base_dist
        if not isinstance(prior, dist.InverseGamma):
            raise ValueError(
                f"site {self.variance_site!r} has a {type(prior).__name__} "
                "prior; its Gibbs update needs an InverseGamma"
            )
        site = density.sites[self.variance_site]
        weights = tuple(density.sites[n] for n in self.weight_sites)
        size = site.stop - site.start
        counts = [s.stop - s.start for s in weights]
        shared = size == 1
        if not shared and (len(weights) != 1 or counts[0] != size):
            raise ValueError(
                f"{self!r}: the variance has {size} elements and the weights "
                f"{counts}; it must be one, or one a weight of a single site"
            )
        a = prior.concentration.detach().expand(site.shape).reshape(-1).to(potential.dtype)
        r = prior.rate.detach().expand(site.shape).reshape(-1).to(potential.dtype)
        bound = BoundScaleGibbs(site, weights, r, a + 0.5 * (sum(counts) if shared else 1), shared)
        self._verify(bound, potential)
        return bound

    def _verify(self, bound: BoundScaleGibbs, potential: Potential) -> None:
        """log p(z) along the variance must be the inverse-gamma conditional's, up to a constant, at two settings of
        all other sites.
        """
        density = potential.density
        batch = density.minibatch()
        site = bound.variance
        for seed in (1, 2):
            noise = torch.Generator().manual_seed(seed)
            base = (0.3 * torch.randn(potential.dim, generator=noise)).to(
                device=potential.device, dtype=potential.dtype
            )
            grid = torch.tensor([-1.0, 0.0, 1.0], device=potential.device, dtype=potential.dtype)
            rows = base.repeat(3, 1)
            rows[:, site.start : site.stop] = grid[:, None]
            squares = [base[s.start : s.stop].square() for s in bound.weights]
            total = torch.cat(squares).sum() if bound.shared else squares[0]
            expected = -(
                bound.concentration * grid[:, None] + (bound.rate + 0.5 * total) * torch.exp(-grid[:, None])
            ).sum(1)
            actual = -potential(rows, batch)
            error = ((actual - actual[1]) - (expected - expected[1])).abs().max()
            scale = 1 + actual.abs().max() + expected.abs().max()
            if not bool(error <= 1e-4 * scale):
                raise ValueError(
                    f"{self!r}: the model's density along {self.variance_site!r} is "
                    f"not that of an inverse-gamma variance of {self.weight_sites}; "
                    "its Gibbs update would sample another posterior"
                )
