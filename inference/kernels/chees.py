"""ChEES-HMC: Hamiltonian Monte Carlo for many chains, whose common trajectory length is learned (Hoffman, Radul and
Sountsov, "An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte Carlo", AISTATS 2021).

With whitened velocities v = s r, one leapfrog step of size epsilon is

    v <- v - epsilon / 2 s grad U(z),      z <- z + epsilon s v,      v <- v - epsilon / 2 s grad U(z)

and L_t = ceil(h_t T / epsilon) of them are accepted with probability min(1, exp(H - H')), H = U + ||v||^2 / 2.  The
warm-up learns T by Adam on the ChEES criterion (``shared_trajectory``), epsilon by dual averaging of the harmonic mean
of the chains' acceptance probabilities, which a single stuck chain pulls down, and s from the chains' variance.
"""

import math
from typing import ClassVar

from torch import Tensor

from inference.citation import Paper
from inference.kernels.shared_trajectory import Carry, SharedTrajectory
from inference.potential import Potential

__all__ = ["ChEES"]


class ChEES(SharedTrajectory):
    """ChEES-HMC, for tens to thousands of chains; leaves the target invariant after the warm-up.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon in units of the scales; where the search for a first one begins if it is adapted.
        trajectory_length: the longest trajectory T in the same units, its start if it is adapted; 4 steps, or 2 pi if
            it is not adapted.  Trajectories are uniform on (0, T).
        adapt_step_size, adapt_trajectory_length, adapt_mass_matrix: whether the warm-up adapts them.
        target_accept_prob: of the harmonic mean of the acceptance probability; 0.651 is the paper's.
        learning_rate: of Adam in log T, per transition.
        max_steps: most leapfrog steps in a trajectory.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in ``pyro.infer.HMC``.

    Raises:
        ValueError, TypeError: a setting outside its range.

    Draws carry ``acceptance_rate``, ``step_size``, ``trajectory_length``, ``energy`` and ``diverging``.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "hoffman2021chees",
            author="Hoffman, Matthew D. and Radul, Alexey and Sountsov, Pavel",
            title="An Adaptive-{MCMC} Scheme for Setting Trajectory Lengths in {H}amiltonian {M}onte {C}arlo",
            booktitle="International Conference on Artificial Intelligence and Statistics",
            year=2021,
        ),
    )

    harmonic: ClassVar[bool] = True
    gradients_per_step: ClassVar[int] = 1

    def launch(self, normal: Tensor) -> Tensor:
        """Standard normal velocities."""
        return normal

    def kinetic(self, velocity: Tensor) -> Tensor:
        """||v||^2 / 2."""
        return 0.5 * velocity.square().sum(1)

    def integrate(self, carry: Carry, step_size: Tensor, scale: Tensor, potential: Potential) -> Carry:
        """One leapfrog step."""
        z, v, gradient, _, work = carry
        half = 0.5 * step_size * scale
        v = v - half * gradient
        z = z + step_size * scale * v
        energy, gradient = potential.value_and_grad(z)
        return z, v - half * gradient, gradient, energy, work

    def default_length(self, dim: int) -> float:
        """The period of a standard normal."""
        return 2 * math.pi
