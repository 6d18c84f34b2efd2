"""Isokinetic dynamics: what microcanonical Langevin Monte Carlo moves by (Robnik, De Luca, Silverstein and Seljak,
JMLR 24, 2023; Steeg and Galstyan, "Hamiltonian dynamics with non-Newtonian momentum for rapid sampling", 2021).

In whitened coordinates q = z / s, with a velocity u on the unit sphere of dimension d - 1,

    dq/dt = u,      du/dt = -(I - u u') g / (d - 1),      g = s grad U

Both parts have a closed form.  With e = -g / ||g||, delta = epsilon ||g|| / (d - 1) and c = e . u, a kick is

    u <- (u + e (sinh delta + c (cosh delta - 1))) / (cosh delta + c sinh delta)

It changes the volume: the energy that is conserved is U + (d - 1) log(cosh delta + c sinh delta), summed over kicks.
"""

import math

import torch
from torch import Tensor

from inference.potential import Potential

__all__ = ["check_dim", "kick", "minimal_norm_step", "unit"]

_LAMBDA = 0.1931833275037836  # of the minimal-norm integrator: McLachlan 1995, Omelyan, Mryglod and Folk 2003


def check_dim(dim: int, kernel: str) -> None:
    """Raise ``ValueError`` where there is no sphere to move on."""
    if dim < 2:
        raise ValueError(
            f"{kernel} moves with a velocity on the unit sphere and needs at least 2 latent dimensions; the model has "
            f"{dim}. Use HMC or NUTS"
        )


def unit(x: Tensor) -> Tensor:
    """Rows ``(chain, dim)`` scaled to length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def kick(velocity: Tensor, gradient: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
    """The exact flow of the velocity under a constant whitened gradient.

    Args:
        velocity: u, unit rows ``(chain, dim)``.
        gradient: g, ``(chain, dim)``.
        step_size: 0-dim, or ``(chain, 1)``.

    Returns:
        tuple: the new velocities, and the work (d - 1) log(cosh delta + c sinh delta), ``(chain,)``.
    """
    dim = velocity.shape[1]
    size = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    e = -gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
    delta = step_size * size / (dim - 1)
    c = (e * velocity).sum(1, keepdim=True)
    # Multiplied through by 2 exp(-delta), which no gradient makes overflow.
    zeta = (-delta).exp()
    new = 2 * zeta * velocity + e * ((1 - zeta) * (1 + zeta + c * (1 - zeta)))
    # The last term is at least 2 zeta^2 in exact arithmetic; rounding must not take the logarithm below zero.
    inside = (1 + c + (1 - c) * zeta.square()).clamp(min=torch.finfo(size.dtype).tiny)
    work = (dim - 1) * (delta - math.log(2.0) + inside.log())
    return unit(new), work[:, 0]


def minimal_norm_step(
    z: Tensor, velocity: Tensor, gradient: Tensor, step_size: Tensor, scale: Tensor, potential: Potential
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the five-stage minimal-norm integrator, which is reversible: kicks of lambda, 1 - 2 lambda and
    lambda with half drifts between them. Two gradients.

    Returns:
        tuple: position, velocity, dU/dz, U, work.
    """
    velocity, first = kick(velocity, scale * gradient, _LAMBDA * step_size)
    z = z + 0.5 * step_size * scale * velocity
    _, gradient = potential.value_and_grad(z)
    velocity, second = kick(velocity, scale * gradient, (1 - 2 * _LAMBDA) * step_size)
    z = z + 0.5 * step_size * scale * velocity
    energy, gradient = potential.value_and_grad(z)
    velocity, third = kick(velocity, scale * gradient, _LAMBDA * step_size)
    return z, velocity, gradient, energy, first + second + third
