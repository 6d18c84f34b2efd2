"""Exact Gibbs updates of Gaussian scales inside a gradient sampler.

For ``s^2 ~ InvGamma(a, r)`` and ``w_1..w_n | s ~ N(0, s^2)``,

    s^2 | w ~ InvGamma(a + n / 2, r + sum(w^2) / 2),

so the variances of a hierarchical prior are drawn exactly while the gradient sampler moves the weights (Tran et al.
2022, section 3).  A law tempered to p(z)^(1/T), with log s^2 in z, has both parameters of it divided by T.
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
        concentration: posterior concentration (a + n / 2) / T, flat ``(k,)``.
        shared: whether one variance governs all weights (else one variance a weight).
        temperature: T.
    """

    variance: Site
    weights: tuple[Site, ...]
    rate: Tensor
    concentration: Tensor
    shared: bool
    temperature: float

    def draw(self, position: Tensor, gamma: Tensor) -> Tensor:
        """New unconstrained variances ``(chain, k)`` from standard gammas of ``concentration``, given the weights in
        ``position``.
        """
        value = self.posterior_rate(position) / self.temperature / gamma
        return biject_to(constraints.positive).inv(value)

    def posterior_rate(self, position: Tensor) -> Tensor:
        """r + sum(w^2) / 2 at the weights in ``position``, ``(chain, k)``."""
        squares = [position[:, s.start : s.stop].square() for s in self.weights]
        total = torch.cat(squares, dim=1).sum(1, keepdim=True) if self.shared else squares[0]
        return self.rate + 0.5 * total


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

    def bind(self, potential: Potential, temperature: float = 1.0) -> BoundScaleGibbs:
        """Look up the sites and verify the conditional numerically; draws are of the law to the power 1 / temperature.

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
        bound = BoundScaleGibbs(site, weights, r, a + 0.5 * (sum(counts) if shared else 1), shared, 1.0)
        self._verify(bound, potential)
        return bound._replace(concentration=bound.concentration / temperature, temperature=temperature)

    def _verify(self, bound: BoundScaleGibbs, potential: Potential) -> None:
        """The slope of log p(z) along each variance must be that of its inverse-gamma conditional, at settings of all
        sites: other terms, of however many data, have no part in it.
        """
        noise = torch.Generator().manual_seed(0)
        z = 0.3 * torch.randn(4, potential.dim, generator=noise)
        z[:, bound.variance.start : bound.variance.stop] *= 3
        z = z.to(device=potential.device, dtype=potential.dtype)
        log_variance = z[:, bound.variance.start : bound.variance.stop]
        slope = -potential.value_and_grad(z, potential.density.minibatch())[1]
        actual = slope[:, bound.variance.start : bound.variance.stop]
        expected = bound.posterior_rate(z) * torch.exp(-log_variance) - bound.concentration
        if not bool(((actual - expected).abs() <= 1e-3 * (1 + expected.abs())).all()):
            raise ValueError(
                f"{self!r}: the model's density along {self.variance_site!r} is "
                f"not that of an inverse-gamma variance of {self.weight_sites}; "
                "its Gibbs update would sample another posterior"
            )
