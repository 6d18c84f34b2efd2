"""Hamiltonian Monte Carlo with dual averaging and a mass matrix, both pooled over chains.

L leapfrog steps (``hamiltonian.py``) are proposed and accepted with probability min(1, exp(H - H')), H = U + p' p / 2
(Neal 2011).  All chains share the number of steps and the mass matrix; step sizes are jittered per chain and step so
that no trajectory length resonates.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.adaptation import DualAverage, Moments
from inference.kernels.base import Info, Lift, Noise, StepInputs, positive
from inference.kernels.hamiltonian import DIVERGENCE, Hamiltonian, leapfrog
from inference.kernels.mass_matrix import FullMass
from inference.potential import Potential, Program

__all__ = ["HMC", "HMCState"]

_MAX_STEPS = 1024


class HMCState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    average: dual averaging of each chain's step size.
    moments: moments of the current window.
    mass_factor: L, ``(dim,)`` or ``(dim, dim)``; the inverse mass is L L'.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    average: DualAverage
    moments: Moments
    mass_factor: Tensor


class HMC(Hamiltonian):
    """Hamiltonian Monte Carlo; arguments, defaults and meaning are those of ``pyro.infer.HMC``.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon at the start.
        trajectory_length: epsilon times the number of leapfrog steps; 2 pi if neither this nor ``num_steps`` is given.
        num_steps: number of leapfrog steps; with an adapted step size it stays this number.
        adapt_step_size, adapt_mass_matrix: whether the warm-up adapts them.
        full_mass: dense instead of diagonal mass, or groups of site names: dense within a group.
        target_accept_prob: of dual averaging.
        jitter: step sizes are uniform on epsilon (1 - jitter, 1).  With a trajectory of 2 pi, the full period of a
            standard normal, the default makes the draws of one
            uncorrelated: cos averages to zero over (pi, 2 pi).  Without jitter such a trajectory returns to where it
                began.
        min_stepsize, max_stepsize: bounds of the adapted step size.
        jit_compile, jit_options, ignore_jit_warnings: accepted for Pyro's sake; graphs are what this library runs
            anyway.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in Pyro.

    At most 1,024 leapfrog steps are taken in a trajectory.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "duane1987hybrid",
            author="Duane, Simon and Kennedy, A. D. and Pendleton, Brian J. and Roweth, Duncan",
            title="Hybrid {M}onte {C}arlo",
            journal="Physics Letters B",
            volume=195,
            number=2,
            pages="216--222",
            year=1987,
        ),
        Paper(
            "incollection",
            "neal2011mcmc",
            author="Neal, Radford M.",
            title="{MCMC} Using {H}amiltonian Dynamics",
            booktitle="Handbook of {M}arkov Chain {M}onte {C}arlo",
            year=2011,
        ),
    )

    pool_every = 10

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 1.0,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = False,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        jit_options: dict[str, Any] | None = None,
        ignore_jit_warnings: bool = False,
        target_accept_prob: float = 0.8,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        *,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
        jitter: float = 0.5,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self._set_dynamics(
            step_size, adapt_step_size, adapt_mass_matrix, full_mass, target_accept_prob, min_stepsize, max_stepsize
        )
        if trajectory_length is not None and num_steps is not None:
            raise ValueError("give trajectory_length or num_steps, not both")
        if num_steps is not None and (
            not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= _MAX_STEPS
        ):
            raise ValueError(f"num_steps must be an integer from 1 to {_MAX_STEPS}, got {num_steps!r}")
        self.num_steps = num_steps
        self.trajectory_length = (
            2 * math.pi if trajectory_length is None else positive("trajectory_length", trajectory_length)
        )
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter!r}")
        self.jitter = float(jitter)

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Momenta, one uniform to accept and one to jitter."""
        return Noise(normal=potential.dim, uniform=2)

    def start(self, *parts: Any) -> HMCState:
        """An ``HMCState``."""
        return HMCState(*parts)

    def step(self, state: HMCState, inputs: StepInputs, potential: Potential) -> tuple[HMCState, Info]:
        """One transition of all chains."""
        run = self.build(potential, lambda function, calls: Program(function, record=False))
        return run(state, inputs, self.plan(state))

    def build(self, potential: Potential, lift: Lift) -> Callable[[HMCState, StepInputs, int], tuple[HMCState, Info]]:
        """Three graphs: the start of a trajectory, one leapfrog step, the decision."""
        begin = lift(self._begin, 1)
        move = lift(lambda z, p, g, e, factor: leapfrog(z, p, g, e, factor, potential), self.num_steps or 16)
        finish = lift(self._finish, 1)

        def run(state: HMCState, inputs: StepInputs, num_steps: int) -> tuple[HMCState, Info]:
            p, energy, epsilon = begin(state, inputs)
            z, g, u = state.position, state.gradient, state.potential
            for _ in range(num_steps):
                z, p, g, u = move(z, p, g, epsilon, state.mass_factor)
            return finish(state, inputs, energy, z, p, g, u)

        return run

    def plan(self, state: HMCState) -> int:
        """Leapfrog steps of the coming block."""
        if self.num_steps is not None:
            return self.num_steps
        # Chains agree, to rounding, where a block begins.
        step = float(self._bounded(state.average.log_average)[0].item())
        return max(1, min(_MAX_STEPS, int(self.trajectory_length / step)))

    # ------------------------------------------------------------------ pieces
    def _begin(self, state: HMCState, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        p = inputs.noise["normal"]
        adapting = inputs.control["warmup"] > 0
        epsilon = self._bounded(torch.where(adapting, state.average.log_step, state.average.log_average))
        energy = state.potential + 0.5 * p.square().sum(1)
        return p, energy, epsilon[:, None] * (1 - self.jitter * inputs.noise["uniform"][:, 1:])

    def _finish(
        self,
        state: HMCState,
        inputs: StepInputs,
        before: Tensor,
        z: Tensor,
        p: Tensor,
        gradient: Tensor,
        energy: Tensor,
    ) -> tuple[HMCState, Info]:
        after = energy + 0.5 * p.square().sum(1)
        error = torch.nan_to_num(after - before, nan=math.inf, posinf=math.inf)
        acceptance = (-error).clamp(max=0.0).exp()
        accept = inputs.noise["uniform"][:, 0] < acceptance
        row = accept[:, None]
        adapting, collecting = inputs.control["warmup"] > 0, inputs.control["collect"] > 0
        position = torch.where(row, z, state.position)
        average, moments = state.average, state.moments
        if self.adapt_step_size:
            updated = average.update(acceptance, self.target_accept_prob)
            average = DualAverage(*(torch.where(adapting, new, old) for new, old in zip(updated, average, strict=True)))
        if self.adapt_mass_matrix:
            added = moments.update(position)
            moments = Moments(*(torch.where(collecting, new, old) for new, old in zip(added, moments, strict=True)))
        new = state._replace(
            position=position,
            potential=torch.where(accept, energy, state.potential),
            gradient=torch.where(row, gradient, state.gradient),
            average=average,
            moments=moments,
        )
        info = {
            "potential_energy": new.potential,
            "energy": torch.where(accept, after, before),
            "acceptance_rate": acceptance,
            "diverging": (error > DIVERGENCE).to(acceptance.dtype),
            "step_size": self._bounded(average.log_average),
        }
        return new, info
