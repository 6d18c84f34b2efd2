"""A way down for chains that start far out, where the energy is thousands above that of the typical set.

Samplers whose chains share one step size need it: a step that the steepest chain survives moves no chain.  In the
warm-up, each chain follows its gradient with the step of Barzilai and Borwein ("Two-point step size gradient methods",
IMA Journal of Numerical Analysis 8, 1988), alpha = s's / s'y, as long as that lowers its energy by much more than the
width of the typical set.  It is no search for a mode, which in a hierarchical model would be the wrong place: a chain
that starts where chains belong is left where it is.
"""

import torch
from torch import Tensor

from inference.potential import Potential

__all__ = ["descend"]

_ROUND = 20  # gradients between looks
_ROUNDS = 15
_MAX_ROUNDS = 150  # of chains whose energy still falls by orders of magnitude, as where a recursion explodes
_WIDTHS = 5.0  # energies vary by about sqrt(dim / 2) around their mean in the typical set


def descend(position: Tensor, energy: Tensor, gradient: Tensor, potential: Potential) -> tuple[Tensor, Tensor, Tensor]:
    """Lower the energy of chains far out; each depends on itself alone.

    Args:
        position: ``(chain, dim)``.
        energy: U, ``(chain,)``.
        gradient: dU/dz, ``(chain, dim)``.
        potential: evaluated at most 300 times, or 3,000 if an energy goes on halving every 20 times.

    Returns:
        tuple: position, energy and gradient, as they were for chains that could gain no more than 5 (dim + 10).
    """
    much = _WIDTHS * (position.shape[1] + 10)
    best = (position, energy, gradient)
    z, u, g = best
    tiny = torch.finfo(energy.dtype).tiny
    # The first step, a hundredth of a unit long, is within reach of any scale that later steps find.
    # By the largest component: squares overflow where the energy is 1e200.
    alpha = 0.01 / g.abs().amax(1, keepdim=True).clamp(min=tiny)
    alive = torch.ones_like(energy, dtype=torch.bool)
    for count in range(_MAX_ROUNDS):
        before = best[1]
        for _ in range(_ROUND):
            new_z = z - alpha * g
            new_u, new_g = potential.value_and_grad(new_z)
            fine = (torch.isfinite(new_u) & torch.isfinite(new_g).all(1) & (new_u <= u + much))[:, None]
            s, y = new_z - z, new_g - g
            curvature = (s * y).sum(1, keepdim=True)
            step = s.square().sum(1, keepdim=True) / curvature.clamp(min=tiny)
            step = torch.where(curvature > 0, step, 2 * alpha)
            alpha = torch.where(fine, torch.minimum(step, 1e3 * alpha), 0.1 * alpha)
            z, g = torch.where(fine, new_z, z), torch.where(fine, new_g, g)
            u = torch.where(fine[:, 0], new_u, u)
            lower = alive & (u < best[1])
            best = (
                torch.where(lower[:, None], z, best[0]),
                torch.where(lower, u, best[1]),
                torch.where(lower[:, None], g, best[2]),
            )
        alive = alive & (before - best[1] > much)
        if count >= _ROUNDS:
            alive = alive & (best[1] < 0.5 * before)
        if not bool(alive.any()):
            break
    moved = energy - best[1] > much
    row = moved[:, None]
    return (
        torch.where(row, best[0], position),
        torch.where(moved, best[1], energy),
        torch.where(row, best[2], gradient),
    )
