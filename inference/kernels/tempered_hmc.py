"""One Hamiltonian Monte Carlo transition at each row's own inverse temperature: the move inside tempered SMC, AIS and
parallel tempering.

For U_beta of a :class:`inference.potential.TemperedPath`, momentum p ~ N(0, I) and a diagonal preconditioner s,

    p <- p - epsilon / 2 s grad U_beta(z),      z <- z + epsilon s p,      p <- p - epsilon / 2 s grad U_beta(z),

L times, then accepted with probability min(1, exp(H - H')), H = U_beta + |p|^2 / 2 (Neal 2011, section 4).  The move is
reversible with respect to p_beta, also where epsilon is jittered by noise of its own, so it serves a reverse annealing
run as well as a forward one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inference.kernels.base import Lift
from inference.potential import Program, TemperedPath

__all__ = ["TemperedHMC", "TemperedMove", "likelihood"]

_DIVERGENCE = 1000.0  # an energy error beyond this is a divergence, as in the other kernels


class TemperedMove(NamedTuple):
    """What a transition did.

    Attributes:
        position: z after it, ``(row, dim)``.
        energy: U_beta there, ``(row,)``.
        log_likelihood: log L there, ``(row,)``; minus infinity where it is not defined.
        acceptance: probability with which the proposal was accepted, ``(row,)``.
        diverging: 1 where the energy error was beyond bounds, ``(row,)``.
    """

    position: Tensor
    energy: Tensor
    log_likelihood: Tensor
    acceptance: Tensor
    diverging: Tensor


class TemperedHMC:
    """The transition for rows of a batch, its pieces recorded as graphs.

    Args:
        path: the densities.
        num_steps: leapfrog steps L.
        jitter: step sizes are uniform on epsilon (1 - jitter, 1), by row and transition.
        lift: records a function as a graph, as in :class:`inference.kernels.base.Kernel`; ``None`` runs them as they
            are.
    """

    def __init__(self, path: TemperedPath, num_steps: int, jitter: float, lift: Lift | None = None) -> None:
        record: Lift = lift if lift is not None else (lambda function, calls: Program(function, record=False))
        self.path, self.num_steps, self.jitter = path, num_steps, jitter
        self._begin: Callable[..., tuple[Tensor, ...]] = record(self._start, 1)
        self._step: Callable[..., tuple[Tensor, ...]] = record(self._leapfrog, num_steps)
        self._end: Callable[..., TemperedMove] = record(self._decide, 1)

    def __call__(
        self, position: Tensor, beta: Tensor, step_size: Tensor, scale: Tensor, normal: Tensor, uniform: Tensor
    ) -> TemperedMove:
        """One transition.

        Args:
            position: z ``(row, dim)``.
            beta: inverse temperatures ``(row,)``.
            step_size: epsilon ``(row,)``.
            scale: s ``(row, dim)``.
            normal: standard normals ``(row, dim)``.
            uniform: uniforms ``(row, 2)``, to accept and to jitter.
        """
        start = self._begin(position, beta, step_size, scale, normal, uniform)
        before, first_energy, first_likelihood, gradient, epsilon = start
        z, p, g, energy, rest = position, normal, gradient, first_energy, first_likelihood
        for _ in range(self.num_steps):
            z, p, g, energy, rest = self._step(z, p, g, epsilon, beta)
        return self._end(position, before, first_energy, first_likelihood, z, p, energy, rest, uniform)

    def _start(
        self, z: Tensor, beta: Tensor, step_size: Tensor, scale: Tensor, normal: Tensor, uniform: Tensor
    ) -> tuple[Tensor, ...]:
        # the gradient of another temperature does not give this one's, so it is evaluated afresh
        energy, rest, gradient = self.path.energy_and_grad(z, beta)
        epsilon = (step_size * (1 - self.jitter * uniform[:, 1]))[:, None] * scale
        return energy + 0.5 * normal.square().sum(1), energy, rest, gradient, epsilon

    def _leapfrog(self, z: Tensor, p: Tensor, gradient: Tensor, epsilon: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        p = p - 0.5 * epsilon * gradient
        z = z + epsilon * p
        energy, rest, gradient = self.path.energy_and_grad(z, beta)
        return z, p - 0.5 * epsilon * gradient, gradient, energy, rest

    def _decide(
        self,
        position: Tensor,
        before: Tensor,
        first_energy: Tensor,
        first_likelihood: Tensor,
        z: Tensor,
        p: Tensor,
        energy: Tensor,
        rest: Tensor,
        uniform: Tensor,
    ) -> TemperedMove:
        error = torch.nan_to_num(energy + 0.5 * p.square().sum(1) - before, nan=math.inf, posinf=math.inf)
        acceptance = (-error).clamp(max=0.0).exp()
        accept = uniform[:, 0] < acceptance
        return TemperedMove(
            torch.where(accept[:, None], z, position),
            torch.where(accept, energy, first_energy),
            likelihood(torch.where(accept, rest, first_likelihood)),
            acceptance,
            (error > _DIVERGENCE).to(acceptance.dtype),
        )


def likelihood(log_likelihood: Tensor) -> Tensor:
    """log L with minus infinity, which no weight survives, where it is not defined."""
    return torch.where(torch.isnan(log_likelihood), -math.inf, log_likelihood)
