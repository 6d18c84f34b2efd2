"""Hamiltonian Monte Carlo with dual averaging and a mass matrix, both pooled over chains.

One leapfrog step of size epsilon with inverse mass W:

    r <- r - epsilon / 2 grad U(z),      z <- z + epsilon W r,      r <- r - epsilon / 2 grad U(z)

L of them are proposed and accepted with probability min(1, exp(H - H')), H = U + r' W r / 2 (Neal 2011).  All chains
share the step size, which is jittered per chain
and step so that no trajectory length resonates, and the mass matrix, whose variance is taken over all chains of a
window: many chains adapt fast.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.kernels.adaptation import DualAverage, Moments, mass_windows
from inference.kernels.base import Info, Kernel, Lift, Noise, StepInputs, positive
from inference.potential import Potential

__all__ = ["HMC", "HMCState"]

_DIVERGENCE = 1000.0  # an energy error beyond this is a divergence, as in Stan
_MAX_STEPS = 1024
_READ_BACK_EVERY = 10  # warm-up steps between looks at the adapted step size, which sets the number of leapfrog steps


class HMCState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    average: dual averaging of the step size.
    moments: pooled moments of the current window.
    inverse_mass: W, ``(dim,)`` or ``(dim, dim)``.
    mass_factor: square root of W (diagonal), or its lower Cholesky factor.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    average: DualAverage
    moments: Moments
    inverse_mass: Tensor
    mass_factor: Tensor


class HMC(Kernel):
    """Hamiltonian Monte Carlo; arguments, defaults and meaning are those of ``pyro.infer.HMC``.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon at the start.
        trajectory_length: epsilon times the number of leapfrog steps; 2 pi if neither this nor ``num_steps`` is given.
        num_steps: number of leapfrog steps; with an adapted step size it stays this number.
        adapt_step_size, adapt_mass_matrix: whether the warm-up adapts them.
        full_mass: dense instead of diagonal mass.
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

    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 1.0,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool = False,
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
        self.step_size = positive("step_size", step_size)
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
        self.adapt_step_size, self.adapt_mass_matrix, self.full_mass = (
            bool(adapt_step_size),
            bool(adapt_mass_matrix),
            bool(full_mass),
        )
        self.target_accept_prob = positive("target_accept_prob", target_accept_prob, upper=0.999)
        self.min_stepsize, self.max_stepsize = (
            positive("min_stepsize", min_stepsize),
            positive("max_stepsize", max_stepsize),
        )
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter!r}")
        self.jitter = float(jitter)

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Momenta, one uniform to accept and one to jitter."""
        return Noise(normal=potential.dim, uniform=2)

    def init(self, position: Tensor, potential: Potential) -> HMCState:
        """Unit mass at the starting points, and a first step size that a single leapfrog step accepts about as often
        as 0.8.
        """
        energy, gradient = potential.value_and_grad(position)
        one = torch.ones_like(position[0])
        dense = self.full_mass
        eye = torch.diag(one) if dense else one
        step = torch.as_tensor(self.step_size, dtype=position.dtype, device=position.device)
        state = HMCState(
            position, energy, gradient, DualAverage.start(step), Moments.start(position, dense=dense), eye, eye.clone()
        )
        return self._with_reasonable_step(state, potential) if self.adapt_step_size else state

    def step(self, state: HMCState, inputs: StepInputs, potential: Potential) -> tuple[HMCState, Info]:
        """One transition of all chains."""
        run = self.build(potential, lambda function, calls: function)
        return run(state, inputs, self.plan(state))

    def build(self, potential: Potential, lift: Lift) -> Callable[[HMCState, StepInputs, int], tuple[HMCState, Info]]:
        """Three graphs: the start of a trajectory, one leapfrog step, the decision."""
        begin = lift(self._begin, 1)
        leapfrog = lift(lambda z, r, g, e, s: self._leapfrog(z, r, g, e, s, potential), self.num_steps or 16)
        finish = lift(self._finish, 1)

        def run(state: HMCState, inputs: StepInputs, num_steps: int) -> tuple[HMCState, Info]:
            momentum, energy, epsilon = begin(state, inputs)
            z, r, g, u = state.position, momentum, state.gradient, state.potential
            for _ in range(num_steps):
                z, r, g, u = leapfrog(z, r, g, epsilon, state.inverse_mass)
            return finish(state, inputs, energy, z, r, g, u)

        return run

    def plan(self, state: HMCState) -> int:
        """Leapfrog steps of the coming block."""
        if self.num_steps is not None:
            return self.num_steps
        step = float(self._step_size(state, adapting=False).item())
        return max(1, min(_MAX_STEPS, int(self.trajectory_length / step)))

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether this step adapts, and whether its position counts for the mass matrix."""
        first, ends = mass_windows(warmup_steps)
        last = ends[-1] if ends else 0
        return {
            "warmup": [float(t < warmup_steps) for t in range(start, stop)],
            "collect": [float(self.adapt_mass_matrix and first <= t < last) for t in range(start, stop)],
        }

    def boundaries(self, warmup_steps: int) -> list[int]:
        """The mass windows' ends, and looks at the step size in between."""
        if not (self.adapt_step_size or self.adapt_mass_matrix):
            return []
        return sorted({*mass_windows(warmup_steps)[1], *range(_READ_BACK_EVERY, warmup_steps, _READ_BACK_EVERY)})

    def end_window(self, state: HMCState, step: int, warmup_steps: int, potential: Potential) -> HMCState:
        """Renew the mass matrix from the window's moments, and start dual averaging afresh; at the warm-up's end,
        take the averaged step size.
        """
        if self.adapt_mass_matrix and step in mass_windows(warmup_steps)[1]:
            covariance = state.moments.regularised()
            factor = torch.linalg.cholesky(covariance) if self.full_mass else covariance.sqrt()
            state = state._replace(
                inverse_mass=covariance, mass_factor=factor, moments=Moments.start(state.position, dense=self.full_mass)
            )
            if self.adapt_step_size:
                state = self._with_reasonable_step(state, potential)
        return state

    # ------------------------------------------------------------------ pieces
    def _step_size(self, state: HMCState, *, adapting: bool) -> Tensor:
        log_step = state.average.log_step if adapting else state.average.log_average
        return log_step.exp().clamp(self.min_stepsize, self.max_stepsize)

    def _begin(self, state: HMCState, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        normal = inputs.noise["normal"]
        if self.full_mass:
            momentum = torch.linalg.solve_triangular(state.mass_factor.T, normal.T, upper=True).T
        else:
            momentum = normal / state.mass_factor
        energy = state.potential + 0.5 * normal.square().sum(1)
        adapting = inputs.control["warmup"] > 0
        epsilon = torch.where(adapting, self._step_size(state, adapting=True), self._step_size(state, adapting=False))
        return momentum, energy, epsilon * (1 - self.jitter * inputs.noise["uniform"][:, 1:])

    def _velocity(self, momentum: Tensor, inverse_mass: Tensor) -> Tensor:
        return momentum @ inverse_mass if self.full_mass else momentum * inverse_mass

    def _leapfrog(
        self, z: Tensor, r: Tensor, gradient: Tensor, epsilon: Tensor, inverse_mass: Tensor, potential: Potential
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r = r - 0.5 * epsilon * gradient
        z = z + epsilon * self._velocity(r, inverse_mass)
        energy, gradient = potential.value_and_grad(z)
        return z, r - 0.5 * epsilon * gradient, gradient, energy

    def _finish(
        self,
        state: HMCState,
        inputs: StepInputs,
        before: Tensor,
        z: Tensor,
        r: Tensor,
        gradient: Tensor,
        energy: Tensor,
    ) -> tuple[HMCState, Info]:
        after = energy + 0.5 * (r * self._velocity(r, state.inverse_mass)).sum(1)
        error = torch.nan_to_num(after - before, nan=math.inf, posinf=math.inf)
        acceptance = (-error).clamp(max=0.0).exp()
        accept = inputs.noise["uniform"][:, 0] < acceptance
        row = accept[:, None]
        adapting, collecting = inputs.control["warmup"] > 0, inputs.control["collect"] > 0
        position = torch.where(row, z, state.position)
        average, moments = state.average, state.moments
        if self.adapt_step_size:
            updated = average.update(acceptance.mean(), self.target_accept_prob)
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
            "diverging": (error > _DIVERGENCE).to(acceptance.dtype),
            "step_size": self._step_size(state, adapting=False).expand_as(acceptance),
        }
        return new, info

    def _with_reasonable_step(self, state: HMCState, potential: Potential) -> HMCState:
        """Double or halve the step size until the chains' mean acceptance of one leapfrog step crosses 0.8, and
        restart dual averaging there.
        """
        z = state.position
        log_step = state.average.log_average
        generator = torch.Generator(device=z.device).manual_seed(0)
        normal = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        if self.full_mass:
            momentum = torch.linalg.solve_triangular(state.mass_factor.T, normal.T, upper=True).T
        else:
            momentum = normal / state.mass_factor
        before = state.potential + 0.5 * normal.square().sum(1)
        direction = 0
        for _ in range(60):
            epsilon = log_step.exp().expand(len(z), 1)
            _, r, _, energy = self._leapfrog(z, momentum, state.gradient, epsilon, state.inverse_mass, potential)
            after = energy + 0.5 * (r * self._velocity(r, state.inverse_mass)).sum(1)
            acceptance = (-torch.nan_to_num(after - before, nan=math.inf)).clamp(max=0.0).exp().mean()
            new_direction = 1 if bool(acceptance > 0.8) else -1
            if direction and new_direction != direction:
                break
            direction = new_direction
            log_step = log_step + direction * math.log(2.0)
        step = log_step.exp().clamp(self.min_stepsize, self.max_stepsize)
        return state._replace(average=DualAverage.start(step))
