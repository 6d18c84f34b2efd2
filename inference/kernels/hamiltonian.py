"""What samplers by Hamiltonian dynamics share: the target's arguments, the leapfrog step, and the warm-up.

One leapfrog step of size epsilon, with momenta p ~ N(0, I) in the space whitened by the mass matrix's factor L:

    p <- p - epsilon / 2 L' grad U(z),      z <- z + epsilon L p,      p <- p - epsilon / 2 L' grad U(z)

In the warm-up each chain averages its own step size (Hoffman and Gelman 2014, section 3.2), and all chains share the
positions that the mass matrix is made of; where windows end, step sizes are averaged over chains, so many adapt fast.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from inference.kernels.adaptation import DualAverage, Moments, mass_windows
from inference.kernels.base import Kernel, positive
from inference.kernels.descent import descend
from inference.kernels.mass_matrix import FullMass, MassMatrix, check_full_mass, to_momentum, to_position
from inference.potential import Potential
from inference.runtime.distributed import sum_over_ranks

__all__ = ["DIVERGENCE", "Hamiltonian", "leapfrog"]

DIVERGENCE = 1000.0  # an energy error beyond this is a divergence, as in Stan
_FIRST_ACCEPTANCE = 0.8  # of one leapfrog step, at the step size that dual averaging starts from
_MINUTE = 1e-6  # a first step size so small is that of a chain far out: energies there fall by orders of magnitude


class HamiltonianState(Protocol):
    """The fields that the warm-up needs of a state."""

    @property
    def position(self) -> Tensor:
        """z, ``(chain, dim)``."""

    @property
    def potential(self) -> Tensor:
        """U, ``(chain,)``."""

    @property
    def gradient(self) -> Tensor:
        """dU/dz, ``(chain, dim)``."""

    @property
    def average(self) -> DualAverage:
        """Dual averaging of each chain's step size."""

    @property
    def moments(self) -> Moments:
        """Moments of the current window's positions."""

    @property
    def mass_factor(self) -> Tensor:
        """L, ``(dim,)`` or ``(dim, dim)``."""


def leapfrog(
    z: Tensor, p: Tensor, gradient: Tensor, epsilon: Tensor, factor: Tensor, potential: Potential
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of each chain.

    Args:
        z, p, gradient: position, whitened momentum and dU/dz, ``(chain, dim)``.
        epsilon: step sizes, ``(chain, 1)``; negative ones go back in time.
        factor: L.
        potential: U.

    Returns:
        Position, momentum, gradient and U ``(chain,)``.
    """
    p = p - 0.5 * epsilon * to_momentum(factor, gradient)
    z = z + epsilon * to_position(factor, p)
    energy, gradient = potential.value_and_grad(z)
    return z, p - 0.5 * epsilon * to_momentum(factor, gradient), gradient, energy


class Hamiltonian(Kernel):
    """Base of HMC and NUTS; their arguments are documented there."""

    stochastic: ClassVar[bool] = False
    pool_every: ClassVar[int]  # warm-up steps between looks at all chains' step sizes

    def _set_dynamics(
        self,
        step_size: float,
        adapt_step_size: bool,
        adapt_mass_matrix: bool,
        full_mass: FullMass,
        target_accept_prob: float,
        min_stepsize: float,
        max_stepsize: float,
    ) -> None:
        self.step_size = positive("step_size", step_size)
        self.adapt_step_size, self.adapt_mass_matrix = bool(adapt_step_size), bool(adapt_mass_matrix)
        self.full_mass = check_full_mass(full_mass)
        self.target_accept_prob = positive("target_accept_prob", target_accept_prob, upper=0.999)
        self.min_stepsize, self.max_stepsize = (
            positive("min_stepsize", min_stepsize),
            positive("max_stepsize", max_stepsize),
        )

    @abstractmethod
    def start(
        self, position: Tensor, energy: Tensor, gradient: Tensor, average: DualAverage, moments: Moments, factor: Tensor
    ) -> Any:
        """The kernel's state of these parts."""

    # ------------------------------------------------------------------ contract
    def init(self, position: Tensor, potential: Potential) -> Any:
        """Unit mass at the starting points, and a first step size that a single leapfrog step accepts about as often
        as 0.8.

        A chain whose own step would be minute (a recursion that explodes, say) is first brought in: dual averaging
        could not make the step grow again as fast as the energy falls, and the chains' average would stop all of them.
        """
        mass = MassMatrix(self.full_mass, potential)
        energy, gradient = potential.value_and_grad(position)
        average = DualAverage.start(torch.full_like(energy, self.step_size))
        moments = Moments.start(position, dense=mass.dense)
        state = self.start(position, energy, gradient, average, moments, mass.identity(position))
        if not self.adapt_step_size:
            return state
        far = self._with_reasonable_step(state, potential, each=True).average.log_step < math.log(_MINUTE)
        if bool(far.any()):
            position, energy, gradient = descend(position, energy, gradient, potential)
            row = far[:, None]
            state = state._replace(
                position=torch.where(row, position, state.position),
                potential=torch.where(far, energy, state.potential),
                gradient=torch.where(row, gradient, state.gradient),
            )
        return self._with_reasonable_step(state, potential)

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether this step adapts, and whether its position counts for the mass matrix."""
        first, ends = mass_windows(warmup_steps)
        last = ends[-1] if ends else 0
        return {
            "warmup": [float(t < warmup_steps) for t in range(start, stop)],
            "collect": [float(self.adapt_mass_matrix and first <= t < last) for t in range(start, stop)],
        }

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Where collecting begins and the mass windows end, and looks at the step sizes in between."""
        if not (self.adapt_step_size or self.adapt_mass_matrix):
            return []
        first, ends = mass_windows(warmup_steps)
        looks = range(self.pool_every, warmup_steps, self.pool_every)
        return sorted({first, *ends, *looks, warmup_steps} - {0})

    def end_window(self, state: Any, step: int, warmup_steps: int, potential: Potential) -> Any:
        """Average the chains' step sizes; where a mass window ends, renew the mass matrix and start dual averaging
        afresh.
        """
        if self.adapt_step_size:
            state = state._replace(average=state.average.pooled())
        if self.adapt_mass_matrix and step in mass_windows(warmup_steps)[1]:
            mass = MassMatrix(self.full_mass, potential)
            state = state._replace(
                mass_factor=mass.factor(state.moments.pooled().regularised()),
                moments=Moments.start(state.position, dense=mass.dense),
            )
            if self.adapt_step_size:
                state = self._with_reasonable_step(state, potential)
        return state

    # ------------------------------------------------------------------ pieces
    def _bounded(self, log_step: Tensor) -> Tensor:
        return log_step.exp().clamp(self.min_stepsize, self.max_stepsize)

    def _with_reasonable_step(self, state: Any, potential: Potential, *, each: bool = False) -> Any:
        """Double or halve the step size until the acceptance of one leapfrog step crosses 0.8, and restart dual
        averaging there: the mean acceptance of all chains, or with ``each`` every chain's own.
        """
        z = state.position
        generator = torch.Generator(device=z.device).manual_seed(0)
        # The same momentum for all: the step found must not depend on which chains this process runs.
        p = torch.randn(z.shape[1], generator=generator, dtype=z.dtype, device=z.device).expand_as(z)
        before = state.potential + 0.5 * p.square().sum(1)
        log_step = state.average.log_average
        chains = sum_over_ranks(torch.ones_like(before).sum())
        direction, moving = torch.zeros_like(before), torch.ones_like(before, dtype=torch.bool)
        for _ in range(60):
            epsilon = log_step.exp()[:, None]
            _, r, _, energy = leapfrog(z, p, state.gradient, epsilon, state.mass_factor, potential)
            error = torch.nan_to_num(energy + 0.5 * r.square().sum(1) - before, nan=math.inf)
            acceptance = (-error).clamp(max=0.0).exp()
            if not each:
                acceptance = (sum_over_ranks(acceptance.sum()) / chains).expand_as(acceptance)
            way = torch.where(acceptance > _FIRST_ACCEPTANCE, 1.0, -1.0).to(direction.dtype)
            moving = moving & ((direction == 0) | (direction == way))
            if not bool(moving.any()):
                break
            direction, log_step = way, torch.where(moving, log_step + way * math.log(2.0), log_step)
        return state._replace(average=DualAverage.start(self._bounded(log_step)))
