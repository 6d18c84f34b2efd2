"""Adjusted MCLMC: isokinetic trajectories with a Metropolis test (Robnik, Cohn-Gordon and Seljak, "Metropolis Adjusted
Microcanonical Hamiltonian Monte Carlo", 2025, arXiv:2503.01707).

Each transition draws a velocity uniformly from the unit sphere, makes L_t steps of the isokinetic dynamics
(``isokinetic``), and is accepted with probability min(1, exp(-W)), where

    W = U(z') - U(z) + sum over kicks of (d - 1) log(cosh delta + c sinh delta)

is the energy error: the sum is minus the logarithm of the change of volume of the way, so that this is the
Metropolis-Hastings ratio of a deterministic, reversible map.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Noise
from inference.kernels.isokinetic import check_dim, minimal_norm_step, unit
from inference.kernels.shared_trajectory import Carry, SharedTrajectory
from inference.potential import Potential

__all__ = ["AdjustedMCLMC"]


class AdjustedMCLMC(SharedTrajectory):
    """Metropolis-adjusted microcanonical sampling, for tens to thousands of chains; leaves the target invariant after
    the warm-up.

    Args:
        model: any Pyro model with at least two continuous latent dimensions; or give ``potential_fn``.
        step_size: epsilon, the way of one integrator step in units of the scales; where the search for a first one
            begins if it is adapted.
        trajectory_length: the longest way T, its start if it is adapted; 4 steps, or pi sqrt(d) if it is not adapted.
            The ways are uniform on (0, T).
        adapt_step_size, adapt_trajectory_length, adapt_mass_matrix: whether the warm-up adapts them.
        target_accept_prob: of the mean acceptance probability; 0.9 is the paper's.
        learning_rate: of Adam in log T, per transition.
        max_steps: most integrator steps in a trajectory, of two gradients each.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in ``pyro.infer.HMC``.

    Raises:
        ValueError, TypeError: a setting outside its range; a model with one latent dimension.

    Where this differs from the paper: the length comes from the ChEES criterion over chains (``shared_trajectory``) and
    not from one chain's autocorrelation, and the velocity is drawn anew for each trajectory and not along it.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "misc",
            "robnik2025metropolis",
            author="Robnik, Jakob and Cohn-Gordon, Reuben and Seljak, Uro\\v{s}",
            title="Metropolis Adjusted Microcanonical {H}amiltonian {M}onte {C}arlo",
            eprint="2503.01707",
            archiveprefix="arXiv",
            year=2025,
        ),
    )

    harmonic: ClassVar[bool] = False
    gradients_per_step: ClassVar[int] = 2

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
        target_accept_prob: float = 0.9,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        *,
        learning_rate: float = 0.025,
        max_steps: int = 1024,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            step_size,
            trajectory_length,
            adapt_step_size,
            adapt_trajectory_length,
            adapt_mass_matrix,
            transforms,
            max_plate_nesting,
            target_accept_prob,
            init_strategy,
            learning_rate=learning_rate,
            max_steps=max_steps,
        )

    def noise(self, potential: Potential) -> Noise:
        """Velocities, and one uniform to accept."""
        check_dim(potential.dim, type(self).__name__)
        return super().noise(potential)

    def launch(self, normal: Tensor) -> Tensor:
        """Uniform on the unit sphere."""
        return unit(normal)

    def kinetic(self, velocity: Tensor) -> Tensor:
        """None: the speed is constant, and the work of the kicks takes the place of a kinetic energy."""
        return velocity.new_zeros(len(velocity))

    def integrate(self, carry: Carry, step_size: Tensor, scale: Tensor, potential: Potential) -> Carry:
        """One minimal-norm step."""
        z, velocity, gradient, _, work = carry
        z, velocity, gradient, energy, added = minimal_norm_step(z, velocity, gradient, step_size, scale, potential)
        return z, velocity, gradient, energy, work + added

    def default_length(self, dim: int) -> float:
        """Half of it, the mean way, takes a standard normal a quarter of a turn: the speed of q / sqrt(d) is
        1 / sqrt(d).
        """
        return math.pi * math.sqrt(dim)
