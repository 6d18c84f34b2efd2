"""What ChEES-HMC and adjusted MCLMC share: trajectories of one length for all chains, learned by the ChEES criterion.

All chains take the same number L_t = ceil(h_t T / epsilon) of integrator steps in transition t, where h_t runs through
a Halton sequence and T is the longest trajectory.  No chain waits for another, and no trajectory length resonates.
With coordinates whitened by the pooled scales s, q = (z - m) / s, the criterion of Hoffman, Radul and Sountsov (2021)

    ChEES(T) = E[(||q'||^2 - ||q||^2)^2] / 4,      d ChEES / d log T = E[t (||q'||^2 - ||q||^2) q' . dq'/dt]

is raised by Adam in log T.  Expectations are over chains, weighted with the acceptance probability of each proposal.

Where this differs from the paper: adaptation is due at the end of windows of ``pooling.WINDOW`` transitions and not
after each; m is the mean over all chains in the window before, not among the current proposals; the criterion is taken
in whitened coordinates, where the paper has no mass matrix.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.kernels.adaptation import DualAverage
from inference.kernels.base import Info, Kernel, Lift, Noise, StepInputs, Transition, positive
from inference.kernels.descent import descend
from inference.kernels.pooling import (
    WINDOW,
    PooledMoments,
    crossing,
    direction,
    first_window,
    halton,
    mass_ends,
    pool,
    restarted,
    windows,
)
from inference.potential import Potential, Program
from inference.runtime.streams import Streams

__all__ = ["LengthLearner", "SharedTrajectory", "TrajectoryState"]

_DIVERGENCE = 1000.0  # an energy error beyond this is a divergence, as in Stan
_MAX_STEPS = 1024
_FIRST_STEPS = 4  # longest trajectory at the start, in steps: the way into the typical set is not paid for in gradients
# Dual averaging gains for updates that come once a window and average hundreds of acceptance probabilities; the usual
# ones, for the single noisy one of each step, would make the step size swing by factors.
_GAMMA, _T0 = 0.3, 3.0
_REASONABLE = 0.8  # acceptance of one step that the search for a first step size crosses

Carry = tuple[Tensor, ...]


class LengthLearner(NamedTuple):
    """Adam on the log of the trajectory length, without momentum (beta_1 = 0, beta_2 = 0.95), and its iterate average.

    Attributes:
        log_length: log T.
        log_average: average of log T over updates, the latest weighing most.
        second_moment: Adam's running mean of squared gradients.
        updates: number of updates.
    """

    log_length: Tensor
    log_average: Tensor
    second_moment: Tensor
    updates: Tensor

    @classmethod
    def start(cls, length: Tensor) -> "LengthLearner":
        """Begin at ``length`` (0-dim)."""
        log_length, zero = length.log(), torch.zeros_like(length)
        return cls(log_length, log_length.clone(), zero, zero.clone())

    def update(self, gradient: Tensor, rate: float, low: Tensor, high: Tensor) -> "LengthLearner":
        """One ascent step along ``gradient``, within lengths ``low`` to ``high``; none where it is not finite."""
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        count = self.updates + 1
        second = 0.95 * self.second_moment + 0.05 * gradient.square()
        size = (second / (1 - 0.95**count)).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        log_length = (self.log_length + rate * gradient / size).clamp(low.log(), high.log())
        weight = count**-0.75
        return LengthLearner(log_length, weight * log_length + (1 - weight) * self.log_average, second, count)


class Window(NamedTuple):
    """Sums over this process's chains since the last window.

    Attributes:
        acceptance: of the acceptance statistic in each transition of the window, ``(WINDOW,)``.
        chains: chains counted in each, ``(WINDOW,)``.
        weight: of the acceptance probabilities.
        slope: of d ChEES / d log T, weighted with them.
        size: of chains.
        position: of positions, ``(dim,)``.
    """

    acceptance: Tensor
    chains: Tensor
    weight: Tensor
    slope: Tensor
    size: Tensor
    position: Tensor

    @classmethod
    def start(cls, like: Tensor) -> "Window":
        """Empty sums for positions like ``(dim,)``."""
        row, zero = like.new_zeros(WINDOW), like.new_zeros(())
        return cls(row, row.clone(), zero, zero.clone(), zero.clone(), torch.zeros_like(like))


class TrajectoryState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    step_size: epsilon in whitened coordinates, 0-dim, as all that follow.
    trajectory_length: T.
    average: dual averaging of the step size.
    learner: Adam on T.
    scale: s, ``(dim,)``.
    center: m, ``(dim,)``.
    moments: of the positions since the scales were renewed.
    window: sums since the last window.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    step_size: Tensor
    trajectory_length: Tensor
    average: DualAverage
    learner: LengthLearner
    scale: Tensor
    center: Tensor
    moments: PooledMoments
    window: Window


class SharedTrajectory(Kernel):
    """A Metropolis-corrected kernel whose chains share step size, trajectory length and scales.

    Subclasses write the dynamics: ``launch``, ``integrate``, ``kinetic``.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon, in units of the scales; where the search for a first one begins if it is adapted.
        trajectory_length: T, the longest trajectory, in the same units; its start if it is adapted.  With ``None`` it
            starts at 4 steps, or with a fixed length at ``_default_length``.
        adapt_step_size, adapt_trajectory_length, adapt_mass_matrix: whether the warm-up adapts them.
        target_accept_prob: of the pooled acceptance statistic.
        learning_rate: of Adam in log T, per transition.
        max_steps: most integrator steps in a trajectory.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in Pyro.
    """

    stochastic: ClassVar[bool] = False
    harmonic: ClassVar[bool]
    gradients_per_step: ClassVar[int]

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 1.0,
        trajectory_length: float | None = None,
        adapt_step_size: bool = True,
        adapt_trajectory_length: bool = True,
        adapt_mass_matrix: bool = True,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        target_accept_prob: float = 0.651,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        *,
        learning_rate: float = 0.025,
        max_steps: int = _MAX_STEPS,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self.step_size = positive("step_size", step_size)
        self.trajectory_length = None if trajectory_length is None else positive("trajectory_length", trajectory_length)
        self.adapt_step_size, self.adapt_trajectory_length, self.adapt_mass_matrix = (
            bool(adapt_step_size),
            bool(adapt_trajectory_length),
            bool(adapt_mass_matrix),
        )
        self.target_accept_prob = positive("target_accept_prob", target_accept_prob, upper=0.999)
        self.learning_rate = positive("learning_rate", learning_rate, upper=1.0)
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")
        self.max_steps = max_steps

    # ------------------------------------------------------------------ dynamics
    @abstractmethod
    def launch(self, normal: Tensor) -> Tensor:
        """Whitened velocities ``(chain, dim)`` made of standard normals."""

    @abstractmethod
    def kinetic(self, velocity: Tensor) -> Tensor:
        """The part of the energy that the velocity at hand determines, ``(chain,)``."""

    @abstractmethod
    def integrate(self, carry: Carry, step_size: Tensor, scale: Tensor, potential: Potential) -> Carry:
        """One integrator step of ``(position, velocity, gradient, potential, work)``; ``work`` ``(chain,)`` gathers
        the part of the energy that only the way determines.
        """

    @abstractmethod
    def default_length(self, dim: int) -> float:
        """The trajectory length if none is given and none is learned."""

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Velocities, and one uniform to accept."""
        return Noise(normal=potential.dim, uniform=1)

    def init(self, position: Tensor, potential: Potential) -> TrajectoryState:
        """Unit scales at the starting points; a first step size that one integrator step accepts about as often as
        0.8.
        """
        energy, gradient = potential.value_and_grad(position)
        return self._begun(position, energy, gradient, potential)

    def _begun(self, position: Tensor, energy: Tensor, gradient: Tensor, potential: Potential) -> TrajectoryState:
        one = torch.ones_like(position[0])
        size, total = pool(one.new_full((), float(len(position))), position.sum(0))
        center = total / size
        epsilon = torch.as_tensor(self.step_size, dtype=one.dtype, device=one.device)
        if self.adapt_step_size:
            epsilon = self._reasonable_step(position, energy, gradient, epsilon, one, potential)
        if self.trajectory_length is not None:
            length = torch.full_like(epsilon, self.trajectory_length)
        elif self.adapt_trajectory_length:
            length = _FIRST_STEPS * epsilon
        else:
            length = torch.full_like(epsilon, self.default_length(position.shape[1]))
        return TrajectoryState(
            position,
            energy,
            gradient,
            epsilon,
            length,
            restarted(epsilon),
            LengthLearner.start(length),
            one,
            center,
            PooledMoments.start(center),
            Window.start(one),
        )

    def step(self, state: TrajectoryState, inputs: StepInputs, potential: Potential) -> tuple[TrajectoryState, Info]:
        """One transition of all chains."""
        run = self.build(potential, lambda function, calls: Program(function, record=False))
        return run(state, inputs, self._num_steps(self._ratio(state), float(inputs.control["jitter"])))

    def build(
        self, potential: Potential, lift: Lift
    ) -> Callable[[TrajectoryState, StepInputs, int], tuple[TrajectoryState, Info]]:
        """Three graphs: the start of a trajectory, one integrator step, the decision."""
        begin = lift(self._begin, 1)
        move = lift(lambda carry, epsilon, scale: self.integrate(carry, epsilon, scale, potential), 8)
        finish = lift(self._finish, 1)

        def run(state: TrajectoryState, inputs: StepInputs, num_steps: int) -> tuple[TrajectoryState, Info]:
            carry, before = begin(state, inputs)
            for _ in range(num_steps):
                carry = move(carry, state.step_size, state.scale)
            return finish(state, inputs, before, carry)

        return run

    def runner(
        self, potential: Potential, lift: Lift, streams: Streams
    ) -> Callable[[TrajectoryState, int, int, int], Iterator[Transition]]:
        """Transitions of as many steps as the Halton sequence has it: known beforehand from one look at the state."""
        step = self.build(potential, lift)

        def run(state: TrajectoryState, start: int, stop: int, warmup_steps: int) -> Iterator[Transition]:
            ratio = self._ratio(state)
            inputs = streams.inputs(stop - start, self.controls(start, stop, warmup_steps))
            for t, given in zip(range(start, stop), inputs, strict=True):
                num_steps = self._num_steps(ratio, halton(t))
                state, info = step(state, given, num_steps)
                yield Transition(state, info, num_steps * self.gradients_per_step * len(state.position))

        return run

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether this transition adapts, its place in the window, its share of the longest trajectory."""
        steps = range(start, stop)
        return {
            "warmup": [float(t < warmup_steps) for t in steps],
            "slot": [float(t % WINDOW) for t in steps],
            "jitter": [halton(t) for t in steps],
        }

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Short windows."""
        adapts = self.adapt_step_size or self.adapt_trajectory_length or self.adapt_mass_matrix
        return windows(warmup_steps) if adapts else []

    def end_window(self, state: TrajectoryState, step: int, warmup_steps: int, potential: Potential) -> TrajectoryState:
        """Adapt step size and trajectory length to the chains of all processes, renew the scales where that is due,
        and at the warm-up's end take the averages.  The first window only brings in chains from far out.
        """
        if step == first_window(warmup_steps) and self.boundaries(warmup_steps):
            down = descend(state.position, state.potential, state.gradient, potential)
            return self._begun(*down, potential)
        acceptance, chains, weight, slope, size, total = pool(*state.window)
        center = total / size.clamp(min=1)
        average, learner = state.average, state.learner
        if self.adapt_step_size:
            rates = chains / acceptance if self.harmonic else acceptance / chains
            rate = torch.where(chains > 0, rates, 0.0).sum() / (chains > 0).sum()
            average = average.update(rate, self.target_accept_prob, gamma=_GAMMA, t0=_T0)
        epsilon = average.log_step.exp()
        if self.adapt_trajectory_length:
            gradient = slope / weight.clamp(min=torch.finfo(slope.dtype).tiny)
            learner = learner.update(gradient, WINDOW * self.learning_rate, epsilon, self.max_steps * epsilon)
        length = learner.log_length.exp()
        scale, moments = state.scale, state.moments
        if self.adapt_mass_matrix and step in mass_ends(warmup_steps):
            mean, scale = moments.scale(scale)
            stretch = (state.scale / scale).log().mean().exp()
            moments = PooledMoments.start(mean)
            if self.adapt_trajectory_length:  # the same way in the new units
                length = length * stretch
                learner = LengthLearner.start(length)
            if self.adapt_step_size:
                epsilon = average.log_average.exp() * stretch
                if step == mass_ends(warmup_steps)[0]:  # later the scales change little
                    epsilon = self._reasonable_step(
                        state.position, state.potential, state.gradient, epsilon, scale, potential
                    )
                average = restarted(epsilon)
        if step == warmup_steps:
            epsilon, length = average.log_average.exp(), learner.log_average.exp()
        return state._replace(
            step_size=epsilon,
            trajectory_length=length,
            average=average,
            learner=learner,
            scale=scale,
            center=center,
            moments=moments,
            window=Window.start(center),
        )

    # ------------------------------------------------------------------ pieces
    @staticmethod
    def _ratio(state: TrajectoryState) -> float:
        return float(state.trajectory_length / state.step_size)

    def _num_steps(self, ratio: float, jitter: float) -> int:
        return max(1, min(self.max_steps, math.ceil(jitter * ratio)))

    def _begin(self, state: TrajectoryState, inputs: StepInputs) -> tuple[Carry, Tensor]:
        velocity = self.launch(inputs.noise["normal"])
        carry = (state.position, velocity, state.gradient, state.potential, torch.zeros_like(state.potential))
        return carry, state.potential + self.kinetic(velocity)

    def _finish(
        self, state: TrajectoryState, inputs: StepInputs, before: Tensor, carry: Carry
    ) -> tuple[TrajectoryState, Info]:
        z, velocity, gradient, energy, work = carry
        after = energy + self.kinetic(velocity) + work
        error = torch.nan_to_num(after - before, nan=math.inf, posinf=math.inf)
        acceptance = (-error).clamp(max=0.0).exp()
        accept = inputs.noise["uniform"][:, 0] < acceptance
        row = accept[:, None]
        position = torch.where(row, z, state.position)
        adapting = inputs.control["warmup"]
        new = state._replace(
            position=position,
            potential=torch.where(accept, energy, state.potential),
            gradient=torch.where(row, gradient, state.gradient),
            moments=state.moments.update(position, adapting),
            window=self._observe(state, inputs, position, acceptance, z, velocity),
        )
        info = {
            "potential_energy": new.potential,
            "energy": torch.where(accept, after, before),
            "acceptance_rate": acceptance,
            "diverging": (error > _DIVERGENCE).to(acceptance.dtype),
            "step_size": state.step_size.expand_as(acceptance),
            "trajectory_length": state.trajectory_length.expand_as(acceptance),
        }
        return new, info

    def _observe(
        self,
        state: TrajectoryState,
        inputs: StepInputs,
        position: Tensor,
        acceptance: Tensor,
        proposal: Tensor,
        velocity: Tensor,
    ) -> Window:
        """The window's sums with this transition's."""
        control, window = inputs.control, state.window
        adapting = control["warmup"]
        before = (state.position - state.center) / state.scale
        after = (proposal - state.center) / state.scale
        gain = after.square().sum(1) - before.square().sum(1)
        time = control["jitter"] * state.trajectory_length
        slope = acceptance * time * gain * (after * velocity).sum(1)
        slope = torch.where(torch.isfinite(slope) & (acceptance > 0), slope, 0.0)
        statistic = 1 / acceptance.clamp(min=1e-12) if self.harmonic else acceptance
        here = adapting * (torch.arange(WINDOW, device=acceptance.device) == control["slot"]).to(acceptance.dtype)
        return Window(
            window.acceptance + here * statistic.sum(),
            window.chains + here * len(acceptance),
            window.weight + adapting * acceptance.sum(),
            window.slope + adapting * slope.sum(),
            window.size + adapting * len(acceptance),
            window.position + adapting * position.sum(0),
        )

    def _reasonable_step(
        self,
        position: Tensor,
        energy: Tensor,
        gradient: Tensor,
        start: Tensor,
        scale: Tensor,
        potential: Potential,
    ) -> Tensor:
        """Half the step size at which the mean acceptance of one step, over all processes, crosses 0.8."""
        velocity = self.launch(direction(position))
        before = energy + self.kinetic(velocity)
        carry = (position, velocity, gradient, energy, torch.zeros_like(energy))

        def acceptance(epsilon: Tensor) -> Tensor:
            _, v, _, u, work = self.integrate(carry, epsilon, scale, potential)
            error = torch.nan_to_num(u + self.kinetic(v) + work - before, nan=math.inf)
            total, chains = pool((-error).clamp(max=0.0).exp().sum(), torch.full_like(epsilon, float(len(error))))
            return total / chains

        return 0.5 * crossing(acceptance, start, _REASONABLE)  # a trajectory needs a smaller one than a single step
