"""Mass matrices that Hamiltonian kernels share: diagonal, dense, or dense within blocks of sites.

A kernel works with momenta p ~ N(0, I) in the space whitened by a factor L of the inverse mass, W = L L', so that the
kinetic energy is p' p / 2 whatever the form:

    p <- p - epsilon / 2 L' grad U(z),      z <- z + epsilon L p

Only ``factor`` (``(dim,)``, the diagonal of L, or ``(dim, dim)``, its lower triangle) enters a step.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inference.potential import Potential

__all__ = ["FullMass", "MassMatrix", "to_momentum", "to_position"]

FullMass = bool | Sequence[Sequence[str]]


def to_position(factor: Tensor, p: Tensor) -> Tensor:
    """L p for each chain's row of ``p``, ``(chain, dim)``."""
    return p * factor if factor.dim() == 1 else p @ factor.T


def to_momentum(factor: Tensor, gradient: Tensor) -> Tensor:
    """L' g for each chain's row of ``gradient``, ``(chain, dim)``."""
    return gradient * factor if factor.dim() == 1 else gradient @ factor


class MassMatrix:
    """The form of a kernel's mass matrix on one potential.

    Args:
        full_mass: ``False`` for a diagonal, ``True`` for a dense matrix, or groups of site names, as in Pyro: dense
            within each group, diagonal elsewhere.
        potential: whose sites the groups name.

    Attributes:
        dense: whether the factor is a matrix.

    Raises:
        ValueError: a group names a site that the model does not have, or two groups share one.
    """

    def __init__(self, full_mass: FullMass, potential: Potential) -> None:
        self.dense = bool(full_mass)
        self._mask: Tensor | None = None
        if not isinstance(full_mass, bool) and self.dense:
            self._mask = _block_mask(full_mass, potential)

    def identity(self, position: Tensor) -> Tensor:
        """The factor of a unit mass for chains ``(chain, dim)``."""
        one = torch.ones_like(position[0])
        return torch.diag(one) if self.dense else one

    def factor(self, covariance: Tensor) -> Tensor:
        """The factor whose inverse mass is ``covariance``, ``(dim,)`` or ``(dim, dim)``."""
        if not self.dense:
            return covariance.sqrt()
        # Row by row, as a checkpoint gives it back: products with a matrix in another order round differently.
        return torch.linalg.cholesky(covariance if self._mask is None else covariance * self._mask).contiguous()


def check_full_mass(full_mass: FullMass) -> FullMass:
    """``full_mass`` as a bool or a tuple of tuples of names.

    Raises:
        TypeError, ValueError: it is neither, or a name stands in two groups.
    """
    if isinstance(full_mass, bool):
        return full_mass
    wrong = TypeError(f"full_mass must be a bool or a list of tuples of site names, got {full_mass!r}")
    if not isinstance(full_mass, list | tuple):
        raise wrong
    if any(not isinstance(group, list | tuple) or not all(isinstance(n, str) for n in group) for group in full_mass):
        raise wrong
    names = [name for group in full_mass for name in group]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"full_mass names sites {repeated} more than once")
    return tuple(tuple(group) for group in full_mass)


def _block_mask(groups: Sequence[Sequence[str]], potential: Potential) -> Tensor:
    sites: Mapping[str, object] = potential.sites
    unknown = sorted({name for group in groups for name in group} - set(sites))
    if unknown:
        raise ValueError(
            f"full_mass names sites {unknown} that the model does not have; its latent sites are {sorted(sites)}"
        )
    mask = torch.eye(potential.dim, dtype=potential.dtype, device=potential.device)
    for group in groups:
        inside = torch.zeros_like(mask[0])
        for name in group:
            site = potential.sites[name]
            inside[site.start : site.stop] = 1.0
        mask = torch.maximum(mask, torch.outer(inside, inside))
    return mask
