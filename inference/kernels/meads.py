"""MEADS: generalised Hamiltonian Monte Carlo that many chains tune by eigenvalues (Hoffman and Sountsov, "Tuning-Free
Generalized Hamiltonian Monte Carlo", AISTATS 2022), with Neal's persistent slice (Neal, "Non-reversibly updating a
uniform [0, 1] value for Metropolis accept/reject decisions", 2020, arXiv:2001.11950).

One step in whitened coordinates q = z / s, velocity v, slice u in [-1, 1):

    v <- sqrt(1 - alpha) v + sqrt(alpha) n,      alpha = 1 - exp(-2 gamma epsilon),      n ~ N(0, I)
    u <- ((u + 1 + delta) mod 2) - 1,            delta = alpha / 2
    one leapfrog step of size epsilon to (q', v'), with H' - H the change of U + ||v||^2 / 2
    if |u| < exp(H - H'):  accept, u <- u exp(H' - H);      else:  stay, v <- -v

With sample covariances over chains, s is their standard deviation and

    epsilon = min(1, lambda_max(cov(s grad U))^(-1/2)) / 2,      gamma = max(lambda_max(cov(q))^(-1/2), 1 / (t epsilon))

where lambda_max(C) is estimated by tr(C^2) / tr(C), from below.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info, Kernel, Noise, StepInputs, positive
from inference.kernels.descent import descend
from inference.kernels.pooling import first_window, pool, windows
from inference.potential import Potential
from inference.runtime.distributed import sum_over_ranks

__all__ = ["MEADS", "MEADSState", "largest_eigenvalue"]

_DIVERGENCE = 1000.0


class MEADSState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    velocity: v, ``(chain, dim)``.
    slice: u, ``(chain,)``.
    step_size: epsilon of each fold, ``(fold,)``.
    damping: gamma of each fold, ``(fold,)``.
    scale: s of each fold, ``(fold, dim)``.
    center: mean of all chains, ``(dim,)``.
    log_step_size, log_damping, variance: sums over windows of the warm-up's last quarter, 0-dim and ``(dim,)``.
    windows: number of windows in these sums, 0-dim.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    velocity: Tensor
    slice: Tensor
    step_size: Tensor
    damping: Tensor
    scale: Tensor
    center: Tensor
    log_step_size: Tensor
    log_damping: Tensor
    variance: Tensor
    windows: Tensor


class MEADS(Kernel):
    """Generalised HMC tuned by eigenvalues over chains; for tens to thousands of chains.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon, if it is not adapted.
        damping: gamma, the rate at which velocities are forgotten, if it is not adapted.
        adapt_step_size, adapt_damping, adapt_mass_matrix: whether the warm-up adapts epsilon, gamma and s.
        num_folds: chains are dealt to this many folds, and each fold is tuned by the chains of the one before it, so
            that no chain's step depends on its own position.
        step_size_multiplier: the factor 1 / 2 above.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in ``pyro.infer.HMC``.

    Raises:
        ValueError, TypeError: a setting outside its range; fewer than two chains a fold; with many processes, a number
            of chains on one of them that the folds do not divide.

    A step costs one gradient and moves little: give ``MCMC`` a ``thin``.

    Where this differs from the paper: statistics are renewed at the end of short windows and not at each step; chains
    stay in their folds; after the warm-up all chains share the averages (of logarithms, and of variances) over its
    last quarter, frozen, so that what is kept is drawn by one Markov kernel that leaves the target invariant; and for
    the damping tr(C^2) leaves out each chain's product with itself, without which few chains in many dimensions would
    always see a large eigenvalue (for the step size it stays in: a single chain in a steep place must count).
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "hoffman2022meads",
            author="Hoffman, Matthew D. and Sountsov, Pavel",
            title="Tuning-Free Generalized {H}amiltonian {M}onte {C}arlo",
            booktitle="International Conference on Artificial Intelligence and Statistics",
            year=2022,
        ),
        Paper(
            "misc",
            "neal2020nonreversibly",
            author="Neal, Radford M.",
            title="Non-reversibly Updating a Uniform [0, 1] Value for {M}etropolis Accept/Reject Decisions",
            eprint="2001.11950",
            archiveprefix="arXiv",
            year=2020,
        ),
    )

    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 0.5,
        damping: float = 1.0,
        adapt_step_size: bool = True,
        adapt_damping: bool = True,
        adapt_mass_matrix: bool = True,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        *,
        num_folds: int = 4,
        step_size_multiplier: float = 0.5,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self.step_size, self.damping = positive("step_size", step_size), positive("damping", damping)
        self.adapt_step_size, self.adapt_damping, self.adapt_mass_matrix = (
            bool(adapt_step_size),
            bool(adapt_damping),
            bool(adapt_mass_matrix),
        )
        if not isinstance(num_folds, int) or isinstance(num_folds, bool) or num_folds < 2:
            raise ValueError(f"num_folds must be an integer of at least 2, got {num_folds!r}")
        self.num_folds = num_folds
        self.step_size_multiplier = positive("step_size_multiplier", step_size_multiplier, upper=2.0)

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Velocities, and one uniform for the slice's start."""
        return Noise(normal=potential.dim, uniform=1)

    def init(self, position: Tensor, potential: Potential) -> MEADSState:
        """Tuned by the starting points; velocities and slices are drawn by the first step."""
        folds, chains = self.num_folds, len(position)
        if self._adapts:
            total = sum_over_ranks(torch.ones_like(position[:, 0]).sum())
            if bool(total < 2 * folds):
                raise ValueError(f"MEADS needs two chains a fold: {2 * folds} for num_folds={folds}, got {chains}")
            if bool(total != chains) and chains % folds:
                raise ValueError(f"this process has {chains} chains, which num_folds={folds} does not divide")
        energy, gradient = potential.value_and_grad(position)
        zero = position.new_zeros(())
        state = MEADSState(
            position,
            energy,
            gradient,
            torch.zeros_like(position),
            torch.zeros_like(energy),
            position.new_full((folds,), self.step_size),
            position.new_full((folds,), self.damping),
            position.new_ones((folds, position.shape[1])),
            torch.zeros_like(position[0]),
            zero,
            zero.clone(),
            torch.zeros_like(position[0]),
            zero.clone(),
        )
        return self._tuned(state, 1) if self._adapts else state

    def step(self, state: MEADSState, inputs: StepInputs, potential: Potential) -> tuple[MEADSState, Info]:
        """The equations above, for all chains."""
        start = inputs.control["start"] > 0
        normal, uniform = inputs.noise["normal"], inputs.noise["uniform"][:, 0]
        fold = self._folds(state.position)
        epsilon, scale = state.step_size[fold], state.scale[fold]
        alpha = -torch.expm1(-2 * state.damping[fold] * epsilon)
        kept = torch.where(start, 0.0, 1 - alpha)[:, None]
        v = kept.sqrt() * state.velocity + (1 - kept).sqrt() * normal
        u = torch.where(start, 2 * uniform - 1, torch.remainder(state.slice + 1 + 0.5 * alpha, 2.0) - 1)

        half = 0.5 * epsilon[:, None] * scale
        v_new = v - half * state.gradient
        z = state.position + epsilon[:, None] * scale * v_new
        energy, gradient = potential.value_and_grad(z)
        v_new = v_new - half * gradient
        before = state.potential + 0.5 * v.square().sum(1)
        after = energy + 0.5 * v_new.square().sum(1)
        error = torch.nan_to_num(after - before, nan=torch.inf, posinf=torch.inf)
        accept = u.abs() < (-error).exp()
        row = accept[:, None]
        new = state._replace(
            position=torch.where(row, z, state.position),
            potential=torch.where(accept, energy, state.potential),
            gradient=torch.where(row, gradient, state.gradient),
            velocity=torch.where(row, v_new, -v),
            slice=torch.where(accept, u * error.exp(), u),
        )
        info = {
            "potential_energy": new.potential,
            "energy": torch.where(accept, after, before),
            "acceptance_rate": (-error).clamp(max=0.0).exp(),
            "diverging": (error > _DIVERGENCE).to(error.dtype),
            "step_size": epsilon,
            "damping": state.damping[fold],
        }
        return new, info

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether velocity and slice are drawn anew."""
        return {"start": [float(t == 0) for t in range(start, stop)]}

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Short windows."""
        return windows(warmup_steps) if self._adapts else []

    def end_window(self, state: MEADSState, step: int, warmup_steps: int, potential: Potential) -> MEADSState:
        """Tune each fold by the one before it; at the warm-up's end, all by the averages.  The first window also brings
        in chains from far out.
        """
        if not self._adapts:
            return state
        if step == first_window(warmup_steps):
            position, energy, gradient = descend(state.position, state.potential, state.gradient, potential)
            state = state._replace(position=position, potential=energy, gradient=gradient)
        state = self._tuned(state, step)
        if 4 * step > 3 * warmup_steps:
            state = state._replace(
                log_step_size=state.log_step_size + state.step_size.log().mean(),
                log_damping=state.log_damping + state.damping.log().mean(),
                variance=state.variance + state.scale.square().mean(0),
                windows=state.windows + 1,
            )
        if step == warmup_steps:
            state = state._replace(
                step_size=(state.log_step_size / state.windows).exp().expand_as(state.step_size).clone(),
                damping=(state.log_damping / state.windows).exp().expand_as(state.damping).clone(),
                scale=(state.variance / state.windows).sqrt().expand_as(state.scale).clone(),
            )
        return state

    # ------------------------------------------------------------------ adaptation
    @property
    def _adapts(self) -> bool:
        return self.adapt_step_size or self.adapt_damping or self.adapt_mass_matrix

    def _folds(self, position: Tensor) -> Tensor:
        return torch.arange(len(position), device=position.device) % self.num_folds

    def _tuned(self, state: MEADSState, step: int) -> MEADSState:
        """Each fold's parameters from the chains of the fold before it."""
        fold = self._folds(state.position)
        member = (fold == torch.arange(self.num_folds, device=fold.device)[:, None]).to(state.position.dtype)
        shifted = state.position - state.center
        size, total, square = pool(member.sum(1), member @ shifted, member @ shifted.square())
        size = size[:, None]
        mean = total / size
        scale = state.scale
        if self.adapt_mass_matrix:
            variance = ((square - size * mean.square()) / (size - 1)).clamp(min=0)
            # Chains that all stand at one place say nothing of the scale; it stays then.
            scale = torch.where(variance > 0, variance.sqrt(), state.scale.roll(-1, 0))
        whitened = (shifted - mean[fold]) / scale[fold]
        step_size, damping = state.step_size.roll(-1), state.damping.roll(-1)
        if self.adapt_step_size:
            stiffest = largest_eigenvalue(state.gradient * scale[fold], member, own=True)
            # Chains far out have gradients whose squares overflow.
            stiffest = stiffest.nan_to_num(nan=torch.inf)
            step_size = self.step_size_multiplier * stiffest.rsqrt().clamp(torch.finfo(stiffest.dtype).tiny, 1.0)
        if self.adapt_damping:
            damping = torch.maximum(largest_eigenvalue(whitened, member, own=False).rsqrt(), 1 / (step * step_size))
        return state._replace(
            step_size=step_size.roll(1),
            damping=damping.roll(1),
            scale=scale.roll(1, 0),
            center=state.center + total.sum(0) / size.sum(),
        )


def largest_eigenvalue(x: Tensor, member: Tensor, *, own: bool) -> Tensor:
    """tr(C^2) / tr(C) for the second moments C of each fold's rows, over all processes; at least the mean eigenvalue.

    tr(C^2) is the mean of (x_i . x_j)^2 over pairs of a fold's rows.

    Args:
        x: rows ``(chain, dim)``.
        member: 1 where a row belongs to a fold, ``(fold, chain)``.
        own: whether i = j counts.  With it one outlying row shows; without it tr(C^2) is unbiased.

    Returns:
        Tensor: ``(fold,)``.
    """
    dim = x.shape[1]
    norms = x.square().sum(1)
    size, trace, fourth = pool(member.sum(1), member @ norms, member @ norms.square())
    if bool(size.sum() == len(x)) and len(x) < dim:  # one process: pairs of chains are fewer than pairs of coordinates
        squares = ((member @ (x @ x.T).square()) * member).sum(1)
    else:
        squares = sum_over_ranks(torch.einsum("fc,ci,cj->fij", member, x, x)).square().sum((1, 2))
    second = squares / size.square() if own else (squares - fourth) / (size * (size - 1))
    trace = trace / size
    # Rows of zeros, of chains that all stand at one place or at a mode, say nothing: one, as in a law's own units.
    return torch.where(trace == 0, 1.0, torch.maximum(second, trace.square() / dim) / trace)
