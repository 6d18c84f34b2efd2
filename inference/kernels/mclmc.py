"""Microcanonical Langevin Monte Carlo (Robnik, De Luca, Silverstein and Seljak, "Microcanonical Hamiltonian Monte
Carlo", JMLR 24, 2023; Robnik and Seljak, "Fluctuation without dissipation: Microcanonical Langevin Monte Carlo", 2023).

One step is a minimal-norm step of the isokinetic dynamics (``isokinetic``), then a partial refreshment of the velocity

    u <- (u + nu n) / ||u + nu n||,      nu^2 = (exp(2 epsilon / L) - 1) / d,      n ~ N(0, I)

Continuous time would sample the target exactly.  No Metropolis test removes the error of the discretisation: its size
is held by the energy error E of one step, whose variance per dimension grows as epsilon^6,

    epsilon = (target / mean(E^2 / d / epsilon^6))^(1/6)

with the mean over chains and recent warm-up steps.  L, the way on which the velocity forgets itself, is sqrt(d) at
first, and 0.4 times the way on which the position forgets itself once that is known.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info, Kernel, Noise, StepInputs, positive
from inference.kernels.descent import descend
from inference.kernels.isokinetic import check_dim, minimal_norm_step, unit
from inference.kernels.pooling import WINDOW, PooledMoments, crossing, direction, first_window, mass_ends, pool, windows
from inference.potential import Potential

__all__ = ["MCLMC", "MCLMCState"]

_DIVERGENCE = 1000.0
_WORST = 1.0  # an energy error of sqrt(d) in one step says "far too large" and no more; its size would rule the mean
_MEMORY = 0.9  # of the mean energy error, from window to window
_LAGS = 32
_L_PER_CORRELATION = 0.4


class MCLMCState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    velocity: u, unit rows ``(chain, dim)``.
    step_size: epsilon in whitened coordinates, 0-dim.
    trajectory_length: L, 0-dim.
    scale: s, ``(dim,)``.
    center: m, ``(dim,)``, the mean when the scales were renewed.
    error: decaying sum of E^2 / (d epsilon^6), 0-dim.
    errors: decaying number of terms in it, 0-dim.
    window_error: sum of min(E^2 / d, 1) over this process's chains since the last window.
    window_size: number of terms in it.
    moments: of the positions since the scales were renewed.
    anchor: whitened positions at lag 0, ``(chain, dim)``.
    lagged: sums of products of whitened positions at each lag, ``(lag,)``.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    velocity: Tensor
    step_size: Tensor
    trajectory_length: Tensor
    scale: Tensor
    center: Tensor
    error: Tensor
    errors: Tensor
    window_error: Tensor
    window_size: Tensor
    moments: PooledMoments
    anchor: Tensor
    lagged: Tensor


class MCLMC(Kernel):
    """Microcanonical Langevin Monte Carlo without a Metropolis test, for one chain to thousands.

    **Biased**: the law of the draws differs from the target by an amount that falls with ``desired_energy_variance``
    (about as its cube root, since epsilon^6 ~ variance and the bias is of second order).  At the default the error of
    posterior variances is of the order of one per cent; ``AdjustedMCLMC`` has none.

    Args:
        model: any Pyro model with at least two continuous latent dimensions; or give ``potential_fn``.
        step_size: epsilon, the way of a step in units of the scales; where the search for a first one begins if it is
            adapted.
        trajectory_length: L, the way on which the velocity forgets itself; sqrt(d) if not given.
        desired_energy_variance: variance of one step's energy error, per dimension.
        adapt_step_size, adapt_trajectory_length, adapt_mass_matrix: whether the warm-up adapts epsilon, L and the
            scales.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in ``pyro.infer.HMC``.

    Raises:
        ValueError, TypeError: a setting outside its range; a model with one latent dimension.

    A step costs two gradients and its draws are correlated: give ``MCMC`` a ``thin``.  Draws carry ``energy_error``,
    the error E of their own step, ``step_size``, ``trajectory_length`` and ``diverging``.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "robnik2023microcanonical",
            author="Robnik, Jakob and De Luca, G. Bruno and Silverstein, Eva and Seljak, Uro\\v{s}",
            title="Microcanonical {H}amiltonian {M}onte {C}arlo",
            journal="Journal of Machine Learning Research",
            volume=24,
            year=2023,
        ),
    )

    stochastic: ClassVar[bool] = False

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
        desired_energy_variance: float = 5e-4,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self.step_size = positive("step_size", step_size)
        self.trajectory_length = None if trajectory_length is None else positive("trajectory_length", trajectory_length)
        self.adapt_step_size, self.adapt_trajectory_length, self.adapt_mass_matrix = (
            bool(adapt_step_size),
            bool(adapt_trajectory_length),
            bool(adapt_mass_matrix),
        )
        self.desired_energy_variance = positive("desired_energy_variance", desired_energy_variance, upper=0.1)

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """One normal a coordinate."""
        check_dim(potential.dim, type(self).__name__)
        return Noise(normal=potential.dim)

    def init(self, position: Tensor, potential: Potential) -> MCLMCState:
        """Unit scales, L = sqrt(d), and a step size with about the desired energy error at the starting points."""
        # One direction for all chains, until the first step draws each its own.
        velocity = unit(direction(position))
        return self._begun(position, *potential.value_and_grad(position), velocity, potential)

    def _begun(
        self, position: Tensor, energy: Tensor, gradient: Tensor, velocity: Tensor, potential: Potential
    ) -> MCLMCState:
        one = torch.ones_like(position[0])
        zero = one.new_zeros(())
        total, size = pool(position.sum(0), one.new_full((), float(len(position))))
        length = self.trajectory_length if self.trajectory_length is not None else len(one) ** 0.5
        state = MCLMCState(
            position,
            energy,
            gradient,
            velocity,
            torch.full_like(zero, self.step_size),
            torch.full_like(zero, length),
            one,
            total / size,
            zero,
            zero.clone(),
            zero.clone(),
            zero.clone(),
            PooledMoments.start(total / size),
            torch.zeros_like(position),
            one.new_zeros(_LAGS),
        )
        return self._with_reasonable_step(state, potential) if self.adapt_step_size else state

    def step(self, state: MCLMCState, inputs: StepInputs, potential: Potential) -> tuple[MCLMCState, Info]:
        """One step of all chains; a chain that would become non-finite stays and keeps only its new velocity."""
        normal, control = inputs.noise["normal"], inputs.control
        started = torch.where(control["start"] > 0, unit(normal), state.velocity)
        z, velocity, gradient, energy, work = minimal_norm_step(
            state.position, started, state.gradient, state.step_size, state.scale, potential
        )
        error = energy - state.potential + work
        fine = torch.isfinite(error) & torch.isfinite(z).all(1) & torch.isfinite(gradient).all(1)
        row = fine[:, None]
        # exp(-r) (u + nu z), whose direction is that of u + nu z, and which does not overflow where r is large.
        ratio = state.step_size / state.trajectory_length
        kept, renewed = (-ratio).exp(), (-torch.expm1(-2 * ratio) / normal.shape[1]).sqrt()
        velocity = unit(kept * torch.where(row, velocity, started) + renewed * normal)
        position = torch.where(row, z, state.position)
        adapting, lag = control["warmup"], control["lag"]
        squared = torch.where(fine, error.square() / normal.shape[1], _WORST).clamp(max=_WORST)
        whitened = (position - state.center) / state.scale
        anchor = torch.where(lag == 0, whitened, state.anchor)
        here = (torch.arange(_LAGS, device=position.device) == lag).to(position.dtype)
        new = state._replace(
            position=position,
            potential=torch.where(fine, energy, state.potential),
            gradient=torch.where(row, gradient, state.gradient),
            velocity=velocity,
            window_error=state.window_error + adapting * squared.sum(),
            window_size=state.window_size + adapting * len(position),
            moments=state.moments.update(position, adapting),
            anchor=anchor,
            lagged=state.lagged + here * (anchor * whitened).sum(),
        )
        info = {
            "potential_energy": new.potential,
            "energy_error": torch.where(fine, error, torch.inf),
            "diverging": (~fine | (error.abs() > _DIVERGENCE)).to(position.dtype),
            "step_size": state.step_size.expand_as(energy),
            "trajectory_length": state.trajectory_length.expand_as(energy),
        }
        return new, info

    def plan(self, state: MCLMCState) -> int:
        """Gradients a step."""
        return 2

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether velocities are drawn anew, whether this step adapts, and its lag in the correlation (or -1)."""
        steps = range(start, stop)
        first, lags = self._stage(warmup_steps)
        place = {first + lag: float(k) for k, lag in enumerate(lags)}
        return {
            "start": [float(t == 0) for t in steps],
            "warmup": [float(t < warmup_steps) for t in steps],
            "lag": [place.get(t, -1.0) for t in steps],
        }

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Short windows."""
        return windows(warmup_steps) if self.adapt_step_size or self.adapt_mass_matrix else []

    def end_window(self, state: MCLMCState, step: int, warmup_steps: int, potential: Potential) -> MCLMCState:
        """Step size from the energy errors, scales where they are due, and L at the warm-up's end.  The first window
        only brings in chains from far out.
        """
        if step == first_window(warmup_steps) and self.boundaries(warmup_steps):
            down = descend(state.position, state.potential, state.gradient, potential)
            return self._begun(*down, state.velocity, potential)
        if self.adapt_step_size:
            window_error, window_size = pool(state.window_error, state.window_size)
            error = _MEMORY * state.error + window_error / state.step_size**6
            errors = _MEMORY * state.errors + window_size
            wanted = (self.desired_energy_variance * errors / error).clamp(min=0).pow(1 / 6)
            epsilon = torch.minimum(torch.maximum(wanted, 0.5 * state.step_size), 2 * state.step_size)
            zero = torch.zeros_like(error)
            state = state._replace(
                step_size=epsilon, error=error, errors=errors, window_error=zero, window_size=zero.clone()
            )
        if self.adapt_mass_matrix and step in mass_ends(warmup_steps):
            state = self._with_scales(state, first=step == mass_ends(warmup_steps)[0], potential=potential)
        if step == warmup_steps and self.adapt_trajectory_length:
            state = self._with_length(state, warmup_steps)
        return state

    # ------------------------------------------------------------------ adaptation
    @staticmethod
    def _stage(warmup_steps: int) -> tuple[int, list[int]]:
        """First step of the warm-up's last stage, whose scales are final, and the lags whose correlation it sees: each
        of the first ones, then further and further apart, for a correlation of few steps or of hundreds.
        """
        ends = mass_ends(warmup_steps)
        first = ends[-1] + WINDOW if ends else warmup_steps
        last = warmup_steps - 1 - first
        if last < _LAGS:
            return first, list(range(last + 1))
        return first, sorted({0, *(round(last ** (k / (_LAGS - 2))) for k in range(_LAGS - 1))})

    def _with_scales(self, state: MCLMCState, *, first: bool, potential: Potential) -> MCLMCState:
        mean, scale = state.moments.scale(state.scale)
        zero = torch.zeros_like(state.error)
        state = state._replace(
            scale=scale, center=mean, moments=PooledMoments.start(mean), error=zero, errors=zero.clone()
        )
        if not self.adapt_step_size or not first:  # later the scales change little
            return state
        return self._with_reasonable_step(state, potential)

    def _with_length(self, state: MCLMCState, warmup_steps: int) -> MCLMCState:
        """L from the whitened positions' autocorrelation, a mean over coordinates and chains: twice its integral up to
        its first zero.
        """
        _, lags = self._stage(warmup_steps)
        if len(lags) < 4:
            return state
        (lagged,) = pool(state.lagged)
        rho = lagged[: len(lags)] / lagged[0]
        rho = rho * (rho > 0).cumprod(0)
        gaps = torch.tensor(lags, dtype=rho.dtype, device=rho.device).diff()
        time = (gaps * (rho[1:] + rho[:-1])).sum().clamp(min=1.0)
        return state._replace(trajectory_length=_L_PER_CORRELATION * state.step_size * time)

    def _with_reasonable_step(self, state: MCLMCState, potential: Potential) -> MCLMCState:
        dim = state.position.shape[1]
        velocity = unit(direction(state.position))

        def score(epsilon: Tensor) -> Tensor:
            _, _, _, energy, work = minimal_norm_step(
                state.position, velocity, state.gradient, epsilon, state.scale, potential
            )
            squared = (energy - state.potential + work).square() / dim
            total, size = pool(
                torch.nan_to_num(squared, nan=_WORST).clamp(max=_WORST).sum(),
                torch.full_like(epsilon, float(len(squared))),
            )
            return -total / size

        return state._replace(step_size=crossing(score, state.step_size, -self.desired_energy_variance))
